"""`python -m seppo_fast.quickstart.video [--out FOLDER] [--seed 0]`: a tiny AnimateDiff, before and after SePPO."""

import sys

from seppo_fast.extras import need
from seppo_fast.quickstart.steps import explained, parser_of

PACKAGES = ("sklearn", "matplotlib", "tokenizers", "torchmetrics", "av")


@explained
def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, or the training's own; 2 where a package is missing or the folder is not the quickstart's."""
    given = parser_of("python -m seppo_fast.quickstart.video", __doc__, "runs/quickstart_video").parse_args(argv)
    for package in PACKAGES:
        need(package, "the video quickstart", "seppo-fast[quickstart,video]")
    from seppo_fast.quickstart.video.run import run

    return run(given.out, given.seed)


if __name__ == "__main__":
    sys.exit(main())
