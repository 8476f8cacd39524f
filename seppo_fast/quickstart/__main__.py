"""`python -m seppo_fast.quickstart [--out FOLDER] [--seed 0]`: a tiny Stable Diffusion, before and after SePPO."""

import sys

from seppo_fast.extras import need
from seppo_fast.quickstart.steps import arguments, explained

PACKAGES = ("sklearn", "matplotlib", "tokenizers")


@explained
def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, or the training's own; 2 where a package is missing or the folder is not the quickstart's."""
    given = arguments(argv, "python -m seppo_fast.quickstart", __doc__, "runs/quickstart")
    for package in PACKAGES:
        need(package, "the quickstart", "seppo-fast[quickstart]")
    from seppo_fast.quickstart.run import run

    return run(given.out, given.seed)


if __name__ == "__main__":
    sys.exit(main())
