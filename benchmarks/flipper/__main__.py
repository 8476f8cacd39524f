"""Does the flipper judge rightly, on digits: `python -m benchmarks.flipper --out benchmarks/results`.

The sign looks at the winner alone. This measures whether it tells that the reference's sample is better than the policy's own, and
whether signs of several noises (`seppo.aaf_draws`) end better. Each seed has its own base model, data and trainings, as in the
ablation; `--bases` takes those of an earlier --work, also the ablation's. Writes flipper.json, flipper_table.md and flipper.png.
Finished runs in --work are kept: after an interruption the same command continues, and with more seeds or methods it adds runs.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.ablation.runs import take_bases
from benchmarks.by_seed import checked, made, open_work, parser_of, result_of
from benchmarks.flipper.runs import BASE, METHODS, Settings
from seppo_fast.errors import UserError
from seppo_fast.quickstart.steps import explained


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The checked command line; `settings` are made from --set."""
    parser = parser_of("flipper", __doc__, METHODS, Settings())
    parser.add_argument("--bases", type=Path, metavar="WORK", help="another --work, whose base models and data are used")
    parser.add_argument("--first-seed", type=int, default=0, help="0 by default; others are for trying settings out")
    given = checked(parser.parse_args(argv), METHODS, Settings())
    settings = given.settings
    if settings.watched > settings.updates // 2:
        raise UserError(f"--set watched={settings.watched}: at most {settings.updates // 2} of an iteration's {settings.updates}"
                        " updates can be watched")
    if settings.averaged > settings.watched:
        raise UserError(f"--set averaged={settings.averaged}: only {settings.watched} updates of an iteration are watched")
    return given


@explained
def main(argv: list[str] | None = None) -> int:
    """Make the unfinished runs and report all. Exit status: 0, 2 with a message, 130 when interrupted."""
    given = arguments(argv)
    out, work = given.out, given.work.resolve()
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    open_work(work, given.settings)
    if given.bases:
        take_bases(work, given.bases, seeds.stop, given.settings)
    from benchmarks.flipper.plots import figures  # this takes seconds, and bad input is refused before
    from benchmarks.flipper.report import report
    from benchmarks.result_files import about

    began, started = about("cpu", "diffusers", "deepspeed"), time.perf_counter()
    # The bases come first, because all other runs need them. The longest runs come next, so that both workers end at about the
    # same time.
    if not made("benchmarks.flipper.runs", work, seeds, ([BASE], given.methods)):
        return 130
    result = result_of(work, seeds, (BASE, *given.methods), given.settings, began, started)
    (out / "flipper.json").write_text(json.dumps(result, indent=1) + "\n")
    figures(out, result)
    text = report(result)
    (out / "flipper_table.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
