"""Where a second of your training goes: `python -m seppo_fast.profile_run --config X [--set KEY=VALUE ...] [--updates 3]`.

Trains for a few updates in a temporary folder, which is removed afterwards (the latent cache stays, as after any run). Prints the
phases of an update, the operators that took longest, and what could be turned on. On several ranks:
`deepspeed seppo_fast/profile_run.py --config X`.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seppo_fast.signals import StopSignals

if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:  # see train.py
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


def parse_arguments(argv: list[str] | None = None, prog: str = "python -m seppo_fast.profile_run") -> argparse.Namespace:
    """The command line; `--local_rank` is what DeepSpeed's launcher adds."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a JSON file, or the name of one in seppo_fast/configs")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="override keys of the configuration, e.g. train_batch_size=64 for a shorter update")
    parser.add_argument("--updates", type=int, default=3, help="updates to measure, 3 by default; two more are not measured")
    parser.add_argument("--rows", type=int, default=15, help="operators in each table, 15 by default")
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, prog: str = "python -m seppo_fast.profile_run") -> int:
    """The exit status, as `carried_out` gives it; `prog` is what the command is called in messages."""
    arguments = parse_arguments(argv, prog)
    from seppo_fast.command import carried_out

    return carried_out(lambda signals, lost: run(arguments, signals, lost))


def run(arguments: argparse.Namespace, signals: "StopSignals", lost: Callable[[str], None]) -> None:
    """Profile, and print what was found; `lost` prints the message of a process that ends because another one is gone."""
    from seppo_fast.configfile import load_config
    from seppo_fast.errors import UserError
    from seppo_fast.nodes import check_programs
    from seppo_fast.profiling.profiled import profile
    from seppo_fast.ranks import join

    if arguments.updates < 1:
        raise UserError(f"--updates {arguments.updates}: at least one update has to be measured")
    config = load_config(arguments.config, arguments.overrides)
    ranks = join(lost)
    check_programs(ranks, config.as_dict())
    text = profile(config, ranks, signals, arguments.updates, arguments.rows)
    if ranks.rank == 0:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
