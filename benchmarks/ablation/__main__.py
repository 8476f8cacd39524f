"""The paper's Table 4 and Figures 2 and 3 for a toy of digits: `python -m benchmarks.ablation --out benchmarks/results`.

Each seed has its own base model, data and trainings, by the trainer's own command with the quickstart's configuration.
Writes ablation.json, ablation_table.md, ablation_figure2.png and ablation_figure3.png. Finished runs in --work are kept: after an
interruption the same command continues, and with more seeds or methods it adds runs. To look for the reason of a result, use
`--set lr=1e-4 beta=500` with another --work and --out, perhaps with few --seeds and --methods. `--bases` then takes the base models
of an earlier --work. `--model flow` makes the main rows with the quickstart's Stable Diffusion 3, and writes ablation_flow.json and
ablation_flow_table.md.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.ablation.runs import BASE, METHODS, ROWS, SETTINGS, take_bases
from benchmarks.by_seed import checked, made, open_work, parser_of, result_of
from seppo_fast.quickstart.steps import explained


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The checked command line; `settings` are made from --set."""
    parser = parser_of("ablation", __doc__, METHODS, SETTINGS["unet"])
    parser.add_argument("--bases", type=Path, metavar="WORK", help="another --work, whose base models and data are used")
    parser.add_argument("--model", choices=SETTINGS, default="unet",
                        help="the quickstart's model; flow has runs/ablation_flow, the main rows and other settings by default")
    parser.set_defaults(work=None, methods=None)
    given = parser.parse_args(argv)
    given.name = "ablation" if given.model == "unet" else f"ablation_{given.model}"
    given.work, given.methods = given.work or Path("runs") / given.name, given.methods or ROWS[given.model]
    return checked(given, METHODS, SETTINGS[given.model])


@explained
def main(argv: list[str] | None = None) -> int:
    """Make the unfinished runs and report all. Exit status: 0, 2 with a message, 130 when interrupted."""
    given = arguments(argv)
    out, work = given.out, given.work.resolve()
    open_work(work, given.settings)
    if given.bases:
        take_bases(work, given.bases, given.seeds, given.settings)
    from benchmarks.ablation.plots import figures  # this takes seconds, and bad input is refused before
    from benchmarks.ablation.report import report
    from benchmarks.result_files import about

    began, started = about("cpu", "diffusers", "deepspeed"), time.perf_counter()
    # The bases come first, because all other runs need them. SFT, the shortest, comes last, so that both workers end at about
    # the same time.
    if not made("benchmarks.ablation.runs", work, range(given.seeds), ([BASE], given.methods[::-1])):
        return 130
    result = result_of(work, range(given.seeds), (BASE, *given.methods), given.settings, began, started)
    (out / f"{given.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    if given.model == "unet":  # the others have not the methods that the figures compare
        figures(out, result)
    text = report(result)
    (out / f"{given.name}_table.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
