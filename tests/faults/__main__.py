"""`python -m tests.faults --minutes 20 --seed 1`: runs meet random faults; exit 1 if one does not end as it must."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as in pytest: tests are not a package

from faults.kinds import KINDS  # noqa: E402
from faults.program import play_for  # noqa: E402


def main() -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, metavar="N", help="play this case of the seed alone")
    parser.add_argument("--only", nargs="+", choices=[*KINDS], default=[*KINDS], metavar="FAULT",
                        help=f"these faults alone: {'; '.join(KINDS)}")
    arguments = parser.parse_args()
    alone = {} if arguments.case is None else {"first": arguments.case, "cases": 1}
    tally = play_for(60 * arguments.minutes, arguments.seed, arguments.only, **alone)
    print(f"\n{tally.table()}\n")
    for wrong in tally.wrong:
        print(wrong)
    print(f"{len(tally.wrong)} wrong" if tally.wrong else "all as it must be")
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
