"""`python -m seppo_fast.quickstart.video [--model unet|flow] [--out FOLDER] [--seed 0]`: a tiny video model before and after SePPO.

`unet` is an AnimateDiff, whose UNet learns by DDPM; `flow` a Wan, whose transformer learns by flow matching.
"""

import sys
from pathlib import Path

from seppo_fast.extras import need
from seppo_fast.quickstart.steps import explained, parser_of

PACKAGES = ("sklearn", "matplotlib", "tokenizers", "torchmetrics", "av", "ftfy")
OUT = {"unet": "runs/quickstart_video", "flow": "runs/quickstart_video_flow"}


@explained
def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, or the training's own; 2 where a package is missing or the folder is not the quickstart's."""
    parser = parser_of("python -m seppo_fast.quickstart.video", __doc__, OUT["unet"])
    parser.add_argument("--model", choices=OUT, default="unet", help="the kind of model (default: %(default)s)")
    parser.set_defaults(out=None)
    given = parser.parse_args(argv)
    for package in PACKAGES:
        need(package, "the video quickstart", "seppo-fast[quickstart,video]")
    from seppo_fast.quickstart.video.run import run

    return run(given.out or Path(OUT[given.model]), given.seed, given.model)


if __name__ == "__main__":
    sys.exit(main())
