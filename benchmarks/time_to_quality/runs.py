"""One run of the benchmark in a process of its own: `python -m benchmarks.time_to_quality.runs WORK SEED METHOD`.

"base" makes the seed's base model and its data, as for the ablation, "distilled" its few-step adapter; "drawn" compares what the
ways draw with the base; "timed" measures seconds, and needs the machine for itself; the others train, and judge the policies on the
way.

    WORK/seed_0/base/                 a pipeline directory
    WORK/seed_0/pairs.parquet         the data, as in Pick-a-Pic
    WORK/seed_0/adapter/              the LoRA file
"""

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.ablation import runs as ablation
from benchmarks.by_seed import Run, policy_file, report_run, train
from benchmarks.time_to_quality.ways import ADAPTER, BASE, DISTILLED, DRAWN, TIMED, Settings, judged_iterations, overrides

if TYPE_CHECKING:  # the command and the README need no network
    from seppo_fast.planning.cost import Cost

SECONDS = {"seconds": "seconds", "sampling_s": "seconds_sampling", "training_s": "seconds_training"}  # of metrics.jsonl


def make_base(home: Path, seed: int, settings: Settings) -> Run:
    """The seed's base and data, unless they are linked there, and the base's scores."""
    if not (home / "pairs.parquet").exists():
        ablation.make_data(home, seed, settings)
    return {"points": [{"update": 0, "flops": 0.0} | dict.fromkeys(SECONDS, 0.0) | scores
                       for scores in judged(home / "base", [None], seed, settings)]}


def make_adapter(home: Path, seed: int, settings: Settings) -> Run:
    """The seed's few-step adapter, and what it took."""
    from benchmarks.time_to_quality.distil import distil

    took = distil(home / "base", home / ADAPTER, seed, guidance=settings.guidance_scale)
    return {"points": [{"flops": took["flops"], "seconds": took["seconds"]}]}


def train_and_judge(home: Path, seed: int, name: str, settings: Settings) -> Run:
    """Train, from where an earlier attempt stopped, and judge. The process ends here when the trainer stops early."""
    from seppo_fast.quickstart.models import KINDS
    from seppo_fast.quickstart.report import read_metrics

    run, config, changes = home / name, KINDS[settings.model].config, overrides(home.parent, seed, name, settings)
    train(run, config, changes)
    cost = planned(config, changes)
    iterations = judged_iterations(settings)
    scores = judged(home / "base", [policy_file(run, name, k, settings.updates) for k in iterations], seed, settings)
    spent = spent_by(read_metrics(run / "metrics.jsonl"))
    points = [{"update": k * settings.updates, "flops": k * settings.updates * settings.batch_size * cost.pair}
              | spent[k * settings.updates] | point for k, point in zip(iterations, scores, strict=True)]
    each = {"sampling": cost.sampling, "training": cost.training, "scoring": cost.scoring, "forward": cost.forward}
    return {"points": points, "flops_of_a_pair": each}


def spent_by(rows: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """The trainer's own seconds up to each update."""
    sums = {name: list(accumulate(row[key] for row in rows)) for name, key in SECONDS.items()}
    return {row["update"]: {name: round(values[i], 2) for name, values in sums.items()} for i, row in enumerate(rows)}


def planned(config: str, changes: Sequence[str]) -> "Cost":
    """What the trainer's own plan counts."""
    from seppo_fast.configfile import batch_plan, load_config
    from seppo_fast.models import open_model
    from seppo_fast.planning.cost import estimate
    from seppo_fast.training import adapter

    given = load_config(config, changes)
    model = open_model(given.seppo.model.path)
    return estimate(model, given, batch_plan(given.deepspeed, 1), adapter.read(given.seppo, model))


def judged(base: Path, weights: Sequence[Path | None], seed: int, settings: Settings) -> list[dict[str, float]]:
    """Scores of samples of the base with each of these weights (None: its own), from the same noise for all."""
    from benchmarks.time_to_quality.diversity import Diversity
    from seppo_fast.quickstart.digits import CAPTIONS, split_digits
    from seppo_fast.quickstart.judge import Judge, draw

    digits, held_out = split_digits(seed)
    judge, diversity, points = Judge(held_out, digits, seed), Diversity(held_out), []
    labels = [index % len(CAPTIONS) for index in range(settings.judge_samples)]
    for file in weights:
        samples = draw(base, labels, seed, settings.judge_steps, settings.guidance_scale, weights=file)
        scores = judge.score(samples, labels)
        points.append({"prompt_accuracy": scores.prompt_accuracy, "cleanliness": scores.cleanliness,
                       "vendi": diversity.within_prompts(samples, labels)})
        print(points[-1], flush=True)
    return points


def compare_drawn(home: Path, seed: int, settings: Settings) -> Run:
    """How far what each way draws lies from what the paper's draws, with the base."""
    from benchmarks.time_to_quality.drawn import SAMPLES, distances

    return {"points": [distances(home, seed, settings)], "samples": SAMPLES}


def time_updates(home: Path, seed: int, settings: Settings) -> Run:
    """Seconds of an update of each way, and of the adapter's distillation, which is made once more for that."""
    from benchmarks.time_to_quality.distil import distil
    from benchmarks.time_to_quality.timed import seconds_of_updates

    took = distil(home / "base", home / TIMED / ADAPTER, seed, guidance=settings.guidance_scale)
    found = seconds_of_updates(home, seed, settings)
    return found | {"points": [{"distillation_s": took["seconds"]}]}


def main(work: Path, seed: int, method: str) -> None:
    """Make one run's result file."""
    settings, home = Settings(**json.loads((work / "settings.json").read_text())), work / f"seed_{seed}"
    special = {BASE: make_base, DISTILLED: make_adapter, DRAWN: compare_drawn, TIMED: time_updates}
    report_run(work, seed, method, lambda: special[method](home, seed, settings) if method in special
               else train_and_judge(home, seed, method, settings))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
