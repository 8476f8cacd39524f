"""Did the model get better? `python -m seppo_fast.evaluate --models base=PATH tuned=PATH --prompts FILE ... --out DIR`.

Draws samples of every prompt with every model from the same noise, scores them and writes scores.json, scores.csv, table.md and
index.html. After an interruption the same command continues; models, prompts and scores may be added to it. A score that lacks its
weights is reported at once and left out; if every score is missing, the exit status is 2. On several GPUs:
`deepspeed seppo_fast/evaluate.py --models ...`.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:  # see train.py
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


def parse_arguments(argv: list[str] | None = None, prog: str = "python -m seppo_fast.evaluate") -> argparse.Namespace:
    """The command line; `--local_rank` is what DeepSpeed's launcher adds."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", required=True, metavar="NAME=PATH",
        help="pipeline directories or hub ids, or LoRA weights, which are put on the first model (or write PIPELINE+LORA);"
             " PATH@OTHER is an improvement model: it improves the samples of OTHER, a model named before it; win rates compare"
             " with the first model")
    add("--prompts", nargs="+", required=True, metavar="[NAME=]FILE",
        help="text, JSONL, CSV, Parti-prompts' TSV, HPSv2's JSON files or their folder, Pick-a-Pic's parquet")
    add("--out", type=Path, required=True, help="the folder for samples, scores and the page")
    add("--scores", nargs="+", metavar="SCORE", help="which scores; by default all for images, or all for videos")
    add("--weights", nargs="+", action="extend", default=[], metavar="SCORE=PATH",
        help="a file or folder with a score's weights, in place of the hub's; SCORE.PART=PATH where there are several")
    add("--real", type=Path, metavar="FOLDER", help="real clips that videos are compared with, named by the prompts' videoid")
    add("--per-prompt", type=int, default=1, help="samples of each prompt")
    add("--limit", type=int, help="use only the first LIMIT prompts of each set")
    add("--seed", type=int, default=0, help="of the noise; 0 by default")
    add("--solver", choices=("ddim", "dpmsolver++", "pndm", "unipc", "euler"),
        help="by default ddim, or euler where one of the models is a flow")
    add("--steps", type=int, default=50, help="of the solver; 50 by default")
    add("--guidance-scale", type=float, default=7.5,
        help="of the models that draw from a prompt alone: classifier-free, or an input of the network (FLUX.1-dev); 7.5 by"
             " default, 1 is none")
    add("--improvement-guidance-scale", type=float, metavar="S_T",
        help="of improvement models: strength of the prompt (s_T of Eq. 9); 3.5 by default, 1 is none")
    add("--image-guidance-scale", type=float, metavar="S_I",
        help="of improvement models: how near they stay to the sample that they improve (s_I of Eq. 9); 3.0 by default, 1 is none")
    add("--resolution", type=int, help="pixels along a side; by default the model's own")
    add("--frames", type=int, help="frames of a video; by default 16, or 17 where one of the models is a Wan, which makes 4k + 1")
    add("--motion-adapter", metavar="PATH", help="makes an AnimateDiff of Stable Diffusion 1.x")
    add("--variant", help='variant of the weight files, such as "fp16"')
    add("--dtype", choices=("auto", "float32", "float16", "bfloat16"), default="auto",
        help="auto: on a GPU float16, or bfloat16 where one of the models is a flow; else float32")
    add("--batch-size", type=int, help="samples drawn at once; by default it is measured")
    add("--score-batch-size", type=int, default=16, help="samples scored at once; 16 by default")
    add("--compile", choices=("none", "regional", "full"), default="none", help="torch.compile of the network; none by default")
    add("--vae-tiling", action="store_true", help="the VAE takes large pictures in overlapping tiles: less memory, slightly other"
                                                  " pixels")
    add("--vae-slicing", action="store_true", help="the VAE takes one image, or frame, at a time: less memory")
    add("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    for name, least in (("per_prompt", 1), ("limit", 1), ("steps", 1), ("frames", 1), ("batch_size", 1), ("score_batch_size", 1),
                        ("resolution", 8), ("seed", 0), ("guidance_scale", 0), ("improvement_guidance_scale", 0),
                        ("image_guidance_scale", 0)):
        value = getattr(arguments, name)
        if value is not None and not least <= value < math.inf:
            parser.error(f"--{name.replace('_', '-')} {value}: a number of at least {least} is needed")
    return arguments


def main(argv: list[str] | None = None, prog: str = "python -m seppo_fast.evaluate") -> int:
    """The exit status, as `carried_out` gives it; `prog` is what the command is called in messages."""
    arguments = parse_arguments(argv, prog)
    from seppo_fast.command import carried_out

    return carried_out(lambda signals, lost: run(arguments, lost), "what is drawn is kept, and the same command goes on from there")


def run(arguments: argparse.Namespace, lost: Callable[[str], None] | None = None) -> None:
    """Evaluate, and print the tables; UserError on every rank where each score that was asked for is missing.

    `lost` prints the message of a process that ends because another one is gone.
    """
    from seppo_fast.contact import to_stderr
    from seppo_fast.errors import UserError
    from seppo_fast.evaluation.arguments import request_of
    from seppo_fast.evaluation.report.table import markdown
    from seppo_fast.evaluation.run import evaluate, nothing_scored
    from seppo_fast.nodes import check_programs, check_shared
    from seppo_fast.ranks import join

    ranks = join(lost or to_stderr)
    check_programs(ranks, vars(arguments) | {"local_rank": None})
    check_shared({"--out": arguments.out}, ranks)
    result = evaluate(request_of(arguments, ranks, ranks.say), ranks, ranks.say)
    if result is not None:
        print(f"\n{markdown(result)}\n{arguments.out / 'index.html'}", flush=True)
    if ranks.from_first(result is not None and nothing_scored(result)):
        raise UserError(f"every score that was asked for is missing; what each lacks is said above. The samples are kept in"
                        f" {arguments.out}, and the same command scores them once it is there")


if __name__ == "__main__":
    sys.exit(main())
