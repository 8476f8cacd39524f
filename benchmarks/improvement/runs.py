"""One run of the benchmark in a process of its own: `python -m benchmarks.improvement.runs WORK SEED METHOD`.

The method "base" makes the seed's base model and its pairs, "improvement" its improvement model; the others train from them and
judge their policies.

    WORK/seed_0/base/                 a pipeline directory
    WORK/seed_0/pairs.parquet         the data, as in Pick-a-Pic
    WORK/seed_0/improvement/final/    an InstructPix2Pix pipeline directory
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.by_seed import Run, assignments, iterations, policy_file, report_run, train, training

if TYPE_CHECKING:  # the command itself and the README need none of the networks
    from torch import Tensor

BASE, IMPROVEMENT = "base", "improvement"
APPLIED = 3  # times, one upon the other
FIRST_SEED = 1  # 0 and 100 were used to choose the settings


@dataclass(frozen=True)
class Settings:
    """The quickstart's, but for a longer first stage. `lr` and `beta` were chosen on two seeds that are not reported, so that
    iterative DPO does not go too far in its later iterations."""

    unet_steps: int = 700
    improvement_updates: int = 900
    improvement_lr: float = 1e-3
    improve_share: float = 0.6
    reconstruct_share: float = 0.2
    batch_size: int = 64
    iterations: int = 3
    updates: int = 30
    samples: int = 640
    few_samples: int = 64
    lr: float = 2e-5
    sft_lr: float = 1e-4
    beta: float = 1000.0
    sampler_steps: int = 8
    guidance_scale: float = 2.0
    text_scale: float = 1.5
    image_scale: float = 1.5
    judge_samples: int = 400
    judge_steps: int = 8


@dataclass(frozen=True)
class Method:
    """What a policy is trained by: `method` as in the configuration, `samples` the name of the setting."""

    label: str
    method: str
    samples: str | None = "samples"
    from_spin: bool = False


METHODS = {
    "sft": Method("SFT on the winners", "sft", None),
    "dpo": Method("offline DPO", "dpo", None),
    "spin": Method("SPIN", "spin"),
    "iterative": Method("iterative DPO from the base", "iterative_dpo"),
    "iterative_few": Method("iterative DPO from the base, few samples", "iterative_dpo", samples="few_samples"),
    "iterative_spin": Method("iterative DPO from SPIN", "iterative_dpo", from_spin=True),
}


def overrides(home: Path, seed: int, method: str, settings: Settings) -> list[str]:
    """What a run changes in the quickstart's configuration of its stage."""
    home, first = home.resolve(), method == IMPROVEMENT
    updates = settings.improvement_updates if first else settings.iterations * settings.updates
    given = training(home, seed, method, settings.batch_size, updates)
    if first:
        tasks = {"improve": settings.improve_share, "reconstruct": settings.reconstruct_share,
                 "unconditional": round(1 - settings.improve_share - settings.reconstruct_share, 6)}
        return assignments(given | {"optimizer.params.lr": settings.improvement_lr, "seppo.updates_per_iteration": updates}
                           | {f"seppo.improvement.tasks.{task}": share for task, share in tasks.items()})
    row = METHODS[method]
    iterative = row.method == "iterative_dpo"
    given |= {
        "optimizer.params.lr": settings.sft_lr if method == "sft" else settings.lr, "seppo.method": row.method,
        "seppo.beta": settings.beta,
        "seppo.sampler.steps": settings.sampler_steps, "seppo.sampler.guidance_scale": settings.guidance_scale,
        "seppo.sampler.samples_per_iteration": getattr(settings, row.samples) if row.samples else "null",
        "seppo.improvement.path": home / IMPROVEMENT / "final" if iterative else "null",
        "seppo.improvement.guidance_scale": settings.text_scale, "seppo.improvement.image_guidance_scale": settings.image_scale,
    }
    given |= iterations(method, settings.iterations, settings.updates)
    if row.from_spin:  # the reference stays the base
        given |= {"seppo.model.start_from": policies(home / "spin", "spin", settings)[-1],
                  "seppo.reference_model.path": home / "base"}
    return assignments(given)


def policies(run: Path, method: str, settings: Settings) -> list[Path]:
    """The policies' weights after each iteration."""
    return [policy_file(run, method, k, settings.updates) for k in range(1, settings.iterations + 1)]


def make_base(home: Path, seed: int, settings: Settings) -> Run:
    """The seed's base and data; scores of the base's samples, and of the data's losers and winners."""
    from dataclasses import replace

    from seppo_fast.quickstart.digits import split_digits
    from seppo_fast.quickstart.improvement import base
    from seppo_fast.quickstart.improvement.judge import Judge
    from seppo_fast.quickstart.improvement.pairs import make_pairs, write_pairs

    digits, held_out = split_digits(seed)
    base.make_base(home / "base", replace(base.recipe_of(seed), denoiser_steps=settings.unet_steps))
    pairs = make_pairs(digits, seed, base.COPIES)
    write_pairs(home / "pairs.parquet", pairs)
    judge, few = Judge(held_out, seed), slice(settings.judge_samples)
    data = {name: asdict(judge.score(of.pixels[few], of.labels[few].tolist()))
            for name, of in (("losers", pairs.losers), ("winners", pairs.winners))}
    return {"points": judged(home, [drawn(home, seed, settings)], seed, settings), "data": data}


def train_and_judge(home: Path, seed: int, method: str, settings: Settings) -> Run:
    """A run from wherever an earlier attempt left it; the process ends here when the trainer stops early."""
    from seppo_fast.quickstart.report import iteration_mean, read_metrics

    run = home / method
    config = "quickstart_improvement.json" if method == IMPROVEMENT else "quickstart_iterative_dpo.json"
    train(run, config, overrides(home, seed, method, settings))
    if method == IMPROVEMENT:
        return {"points": judged(home, applied(home, seed, settings), seed, settings)}
    rows = read_metrics(run / "metrics.jsonl")
    rates = {"implicit_acc": [iteration_mean(rows, "implicit_acc", k) for k in range(settings.iterations)]
             } if "implicit_acc" in rows[0] else {}
    samples = [drawn(home, seed, settings, weights) for weights in policies(run, method, settings)]
    return {"points": judged(home, samples, seed, settings), **rates}


def labels_of(settings: Settings) -> list[int]:
    """The digits that are asked for."""
    return [index % 10 for index in range(settings.judge_samples)]


def drawn(home: Path, seed: int, settings: Settings, weights: Path | None = None) -> "Tensor":
    """Samples of the base, or of the base with other weights, from the same noise for all policies of a seed."""
    from seppo_fast.quickstart.judge import draw

    return draw(home / "base", labels_of(settings), seed, settings.judge_steps, settings.guidance_scale, weights=weights)


def applied(home: Path, seed: int, settings: Settings) -> list["Tensor"]:
    """The base's samples, improved once, twice, thrice."""
    from seppo_fast.quickstart.improvement.judge import improve

    samples, made = drawn(home, seed, settings), []
    for time in range(APPLIED):
        samples = improve(home / IMPROVEMENT / "final", samples, labels_of(settings), seed + 1000 * time, settings.judge_steps,
                          settings.text_scale, settings.image_scale)
        made.append(samples)
    return made


def judged(home: Path, samples: Sequence["Tensor"], seed: int, settings: Settings) -> list[dict[str, float]]:
    """The scores of each."""
    from seppo_fast.quickstart.digits import split_digits
    from seppo_fast.quickstart.improvement.judge import Judge

    judge = Judge(split_digits(seed)[1], seed)
    return [asdict(judge.score(pixels, labels_of(settings))) for pixels in samples]


def main(work: Path, seed: int, method: str) -> None:
    """Make one run's result file."""
    settings, home = Settings(**json.loads((work / "settings.json").read_text())), work / f"seed_{seed}"
    report_run(work, seed, method, lambda: make_base(home, seed, settings) if method == BASE
               else train_and_judge(home, seed, method, settings))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
