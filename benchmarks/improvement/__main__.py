"""The second paper's tables in form, on digits: `python -m benchmarks.improvement --out benchmarks/results`.

Every seed has a base model, pairs, an improvement model and trainings of its own, each by the trainer's own command in the
configurations of `make quickstart-improvement`. Writes improvement.json, improvement_table.md and improvement.png. What is finished
in --work is kept: the same command goes on after an interruption, and one with more seeds or methods adds to it.
`--set lr=5e-5 beta=500` with another --work and --out, perhaps with few --seeds and --methods, is for finding the reason of a
result.
"""

import json
import sys
import time

from benchmarks.by_seed import checked, made, open_work, parser_of, result_of
from benchmarks.improvement.runs import BASE, FIRST_SEED, IMPROVEMENT, METHODS, Settings
from seppo_fast.errors import UserError
from seppo_fast.quickstart.steps import explained


@explained
def main(argv: list[str] | None = None) -> int:
    """Make what is unfinished and report everything. Exit status: 0, 2 with a message, 130 when interrupted."""
    methods = [IMPROVEMENT, *METHODS]  # those after it need it, so it is made whichever are asked for
    given = checked(parser_of("improvement", __doc__, methods, Settings(), FIRST_SEED).parse_args(argv), methods, Settings())
    given.methods = [method for method in given.methods if method != IMPROVEMENT]
    if needing := [method for method in given.methods if METHODS[method].from_spin and "spin" not in given.methods]:
        raise UserError(f"--methods {' '.join(needing)} begins with SPIN's policy: give spin, too")
    work = given.work.resolve()
    open_work(work, given.settings)
    from benchmarks.improvement.plots import figures  # this takes seconds, and bad input is refused before
    from benchmarks.improvement.report import report
    from benchmarks.result_files import about

    seeds = range(FIRST_SEED, FIRST_SEED + given.seeds)
    began, started = about("cpu", "diffusers", "deepspeed"), time.perf_counter()
    rest = [method for method in given.methods if method != "spin"]
    stages = [BASE], [IMPROVEMENT, *(method for method in given.methods if method == "spin")], rest[::-1]
    if not made("benchmarks.improvement.runs", work, seeds, stages):
        return 130
    result = result_of(work, seeds, (BASE, IMPROVEMENT, *given.methods), given.settings, began, started)
    (given.out / "improvement.json").write_text(json.dumps(result, indent=1) + "\n")
    figures(given.out, result)
    text = report(result)
    (given.out / "improvement_table.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
