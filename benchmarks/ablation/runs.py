"""One run of the ablation in a process of its own: `python -m benchmarks.ablation.runs WORK SEED METHOD`.

The method "base" makes the seed's base model and its data; the others train from them and judge the past policies.

    WORK/seed_0/base/              a pipeline directory
    WORK/seed_0/pairs.parquet      the data, as in Pick-a-Pic
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.by_seed import Run, assignments, iterations, policy_file, report_run, result_file, train, training
from seppo_fast.errors import UserError

if TYPE_CHECKING:  # the command and the README need no network
    from seppo_fast.quickstart.base import Recipe
    from seppo_fast.quickstart.digits import Digits
    from seppo_fast.quickstart.judge import Scores

BASE = "base"
RECIPE = ("model", "vae_steps", "text_steps", "denoiser_steps")  # what decides a seed's base
OF_BASES = (*RECIPE, "guidance_scale", "judge_samples", "judge_steps")


@dataclass(frozen=True)
class Settings:
    """Settings of all methods: the quickstart's with half its batch and fewer sampling steps, so that 40 trainings take an hour."""

    model: str = "unet"  # as the quickstart's --model
    vae_steps: int = 240
    text_steps: int = 500
    denoiser_steps: int = 700
    iterations: int = 8
    updates: int = 12
    batch_size: int = 32
    lr: float = 2.5e-4
    beta: float = 250.0
    sampler_steps: int = 6
    guidance_scale: float = 2.0
    judge_samples: int = 300
    judge_steps: int = 8


SETTINGS = {"unet": Settings(), "flow": Settings(model="flow", denoiser_steps=1200, beta=65.0)}


@dataclass(frozen=True)
class Method:
    """A row of the table. `curve`: all past policies are judged, for the figures, not only the last one."""

    label: str
    overrides: tuple[str, ...] = ()
    curve: bool = False


METHODS = {
    "sft": Method("SFT", ("seppo.method=sft",), curve=True),
    "no_aaf": Method("without AAF (reference uniform)", ("seppo.flipper=none",)),
    "indicator": Method("indicator instead of sign", ("seppo.flipper=indicator",)),
    "initial": Method("reference = initial", ("seppo.reference=initial",), curve=True),
    "latest": Method("reference = latest", ("seppo.reference=latest",), curve=True),
    "seppo_w": Method("SePPO-w (uniform, independent noise)", curve=True),
    "seppo_r": Method("SePPO-r", ("seppo.data.choose=random",)),
    "shared": Method("SePPO-w, shared noise", ("seppo.noise=shared",)),
}
ROWS = {"unet": tuple(METHODS), "flow": ("sft", "no_aaf", "seppo_w")}  # what is made by default


def overrides(work: Path, seed: int, method: str, settings: Settings) -> list[str]:
    """What a run changes in the quickstart's configuration for its model."""
    home, total = (work / f"seed_{seed}").resolve(), settings.iterations * settings.updates
    changes: dict[str, object] = {
        "optimizer.params.lr": settings.lr, "seppo.beta": settings.beta,
        "scheduler.params.warmup_num_steps": max(2, total // 12),  # the quickstart's share
        "seppo.sampler.steps": settings.sampler_steps, "seppo.sampler.guidance_scale": settings.guidance_scale,
    }
    changes |= training(home, seed, method, settings.batch_size, total) | iterations(method, settings.iterations, settings.updates)
    return [*assignments(changes), *METHODS[method].overrides]


def policies(run: Path, method: str, settings: Settings) -> dict[int, Path]:
    """The files of the weights to judge, by the number of updates that made them."""
    last = settings.iterations
    return {k * settings.updates: policy_file(run, method, k, settings.updates)
            for k in range(1 if METHODS[method].curve else last, last + 1)}


def recipe_of(seed: int, settings: Settings) -> "Recipe":
    from seppo_fast.quickstart.models import KINDS

    return replace(KINDS[settings.model].recipe, seed=seed, vae_steps=settings.vae_steps, text_steps=settings.text_steps,
                   denoiser_steps=settings.denoiser_steps)


def take_bases(work: Path, other: Path, seeds: int, settings: Settings) -> None:
    """Link the bases that another folder of runs has, and take their scores: a base depends on its recipe and its judge alone."""
    check_bases(other, settings, OF_BASES)
    for seed in range(seeds):
        here, finished = result_file(work, seed, BASE), result_file(other, seed, BASE)
        if finished.exists() and not here.exists():
            link_base(here.parent, finished.parent)
            here.write_text(finished.read_text())


def check_bases(other: Path, settings: Settings, keys: Sequence[str]) -> None:
    """Refuse another folder of runs whose bases were made with other values of these settings."""
    try:
        there = json.loads((other / "settings.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--bases {other}: {error}; give the --work of an earlier command") from error
    differing = [f"{key} {there.get(key)} there, {getattr(settings, key)} now" for key in keys
                 if there.get(key) != getattr(settings, key)]
    if differing:
        raise UserError(f"--bases {other}: its bases were made or judged otherwise ({'; '.join(differing)})")


def link_base(home: Path, there: Path) -> None:
    """Link a seed's base and data into another seed's folder."""
    home.mkdir(exist_ok=True)
    for name in ("base", "pairs.parquet"):
        (home / name).symlink_to((there / name).resolve())


def make_base(home: Path, seed: int, settings: Settings) -> Run:
    """The seed's base and data, and the base's scores."""
    make_data(home, seed, settings)
    return {"points": judge(home / "base", {0: None}, seed, settings)}


def make_data(home: Path, seed: int, settings: Settings) -> None:
    """The seed's base and the pairs."""
    from seppo_fast.quickstart.digits import split_digits
    from seppo_fast.quickstart.models import KINDS

    recipe = recipe_of(seed, settings)
    KINDS[settings.model].make_base(home / "base", recipe)
    write_pairs(home / "pairs.parquet", split_digits(seed)[0], recipe)


def write_pairs(path: Path, digits: "Digits", recipe: "Recipe") -> None:
    """Write pairs: each digit and a faulty picture that the base's training data has under the same caption, sides at random."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from seppo_fast.pictures import png
    from seppo_fast.quickstart.digits import CAPTIONS, sloppy_crawl
    from seppo_fast.seeds import generator

    crawl = sloppy_crawl(digits, recipe.seed, recipe.copies, recipe.wrong_captions, recipe.degraded)
    degraded = (crawl.pixels != digits.pixels.repeat(recipe.copies, 1, 1, 1)).flatten(1).any(dim=1)
    faulty = degraded | (crawl.labels != digits.labels.repeat(recipe.copies))
    under = [torch.nonzero(faulty & (crawl.labels == label)).flatten() for label in range(len(CAPTIONS))]
    random, rows = generator(recipe.seed, "pairs"), []
    for pixels, label in zip(digits.pixels, digits.labels.tolist(), strict=True):
        loser = under[label][torch.randint(len(under[label]), (), generator=random)]
        first = bool(torch.rand((), generator=random) < 0.5)
        pictures = [png(pixels), png(crawl.pixels[loser])][:: 1 if first else -1]
        rows.append({"jpg_0": pictures[0], "jpg_1": pictures[1], "label_0": float(first), "caption": CAPTIONS[label]})
    pq.write_table(pa.Table.from_pylist(rows), path)


def train_and_judge(home: Path, seed: int, method: str, settings: Settings) -> Run:
    """Train, from where an earlier attempt stopped, and judge. The process ends here when the trainer stops early."""
    from seppo_fast.quickstart.models import KINDS
    from seppo_fast.quickstart.report import iteration_mean, read_metrics

    run = home / method
    train(run, KINDS[settings.model].config, overrides(home.parent, seed, method, settings))
    rates = {}
    if method != "sft":
        rows = read_metrics(run / "metrics.jsonl")
        rates = {key: [iteration_mean(rows, key, k) for k in range(settings.iterations)] for key in ("aaf_rate", "implicit_acc")
                 if key in rows[0]}
    return {"points": judge(home / "base", policies(run, method, settings), seed, settings), **rates}


def judge(base: Path, weights: Mapping[int, Path | None], seed: int, settings: Settings) -> list[dict[str, float]]:
    """The quickstart's judge on samples of the base with these weights (None: its own), from the same noise for all."""
    from seppo_fast.quickstart.digits import CAPTIONS, split_digits
    from seppo_fast.quickstart.judge import Judge, draw

    digits, held_out = split_digits(seed)
    judged, points = Judge(held_out, digits, seed), []
    labels = [index % len(CAPTIONS) for index in range(settings.judge_samples)]
    for update, file in weights.items():
        samples = draw(base, labels, seed, settings.judge_steps, settings.guidance_scale, weights=file)
        scores = judged.score(samples, labels)
        points.append(point(update, scores))
        print(points[-1], flush=True)
    return points


def point(update: int, scores: "Scores") -> dict[str, float]:
    return {"update": update, "prompt_accuracy": scores.prompt_accuracy, "cleanliness": scores.cleanliness}


def main(work: Path, seed: int, method: str) -> None:
    """Make one run's result file."""
    settings, home = Settings(**json.loads((work / "settings.json").read_text())), work / f"seed_{seed}"
    report_run(work, seed, method, lambda: make_base(home, seed, settings) if method == BASE
               else train_and_judge(home, seed, method, settings))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
