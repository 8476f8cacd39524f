"""`python -m seppo_fast.quickstart.improvement [--out FOLDER] [--seed 0]`: an improvement model from pairs, and iterative DPO.

The pairs' winners range from poor to good. The improvement model learns what makes a winner of a loser, and the base then learns
from pairs of its own samples and what the improvement model makes of them.
"""

import sys

from seppo_fast.extras import need
from seppo_fast.quickstart.__main__ import PACKAGES
from seppo_fast.quickstart.steps import explained, parser_of


@explained
def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, or the training's own; 2 where a package is missing or the folder is not the quickstart's."""
    given = parser_of("python -m seppo_fast.quickstart.improvement", __doc__, "runs/quickstart_improvement").parse_args(argv)
    for package in PACKAGES:
        need(package, "the quickstart", "seppo-fast[quickstart]")
    from seppo_fast.quickstart.improvement.run import run

    return run(given.out, given.seed)


if __name__ == "__main__":
    sys.exit(main())
