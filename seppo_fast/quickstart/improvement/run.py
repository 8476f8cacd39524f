"""The steps of the improvement quickstart: base, pairs, both stages by the literal command, judgement."""

import json
import time
from pathlib import Path

import torch

from seppo_fast.configfile import load_config
from seppo_fast.quickstart.digits import CAPTIONS, split_digits
from seppo_fast.quickstart.improvement.base import COPIES, make_base, recipe_of
from seppo_fast.quickstart.improvement.judge import Judge, improve
from seppo_fast.quickstart.improvement.pairs import make_pairs, write_pairs
from seppo_fast.quickstart.improvement.report import table, write_result
from seppo_fast.quickstart.judge import draw
from seppo_fast.quickstart.report import grids, read_metrics, side_by_side
from seppo_fast.quickstart.steps import make_base_model, overrides, own_folder, say, timed, train_anew, where

STAGES = ("quickstart_improvement.json", "quickstart_iterative_dpo.json")
SAMPLES = 400
STEPS = 8


def run(out: Path, seed: int) -> int:
    """The exit status of all steps: 0, or the training's own."""
    own_folder(out)
    settings = [*overrides(out, seed), f"seppo.data.source={out / 'pairs.parquet'}"]
    stage_two = [*settings, f"seppo.improvement.path={out / 'improvement' / 'final'}"]
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    make_base_model(out, "1/5  the base model: tokenizer, VAE, text encoder and UNet, trained here on degraded digits",
                    lambda folder: make_base(folder, recipe_of(seed)), seconds)

    say("2/5  the pairs: each digit degraded twice, the winner less than the loser")
    digits, held_out = split_digits(seed)
    pairs = make_pairs(digits, seed, COPIES)
    print(f"{write_pairs(out / 'pairs.parquet', pairs)} pairs in {out / 'pairs.parquet'}")

    say("3/5  stage one: the improvement model")
    with timed(seconds, "improvement"):
        if status := train_anew(out / "improvement", STAGES[0], settings):
            return status

    say("4/5  stage two: iterative DPO with it")
    with timed(seconds, "iterative_dpo"):
        if status := train_anew(out / "run", STAGES[1], stage_two):
            return status

    say("5/5  the judgement: plain diffusers pipelines, the same noise for all policies")
    ours = load_config(STAGES[1], stage_two).seppo
    guidance = ours.improvement.guidance_scale, ours.improvement.image_guidance_scale
    with timed(seconds, "judgement"):
        judge = Judge(held_out, seed)
        labels = [index % len(CAPTIONS) for index in range(SAMPLES)]
        samples = {"base": draw(out / "base", labels, seed, STEPS, ours.sampler.guidance_scale)}
        improver = out / "improvement" / "final"
        samples["base's samples, improved"] = improve(improver, samples["base"], labels, seed, STEPS, *guidance)
        for k in range(1, ours.iterations + 1):
            weights = out / "run" / "pool" / f"policy_{k:05d}.safetensors"
            samples[f"iterative DPO, iteration {k}"] = draw(out / "base", labels, seed, STEPS, ours.sampler.guidance_scale,
                                                            weights=weights)
        scores = {name: judge.score(pixels, labels) for name, pixels in samples.items()}
        for name, of in (("the data's losers", pairs.losers), ("the data's winners", pairs.winners)):
            scores[name] = judge.score(of.pixels[:SAMPLES], of.labels[:SAMPLES].tolist())
        shown = torch.cat([torch.nonzero(pairs.losers.labels == digit)[:6, 0] for digit in range(len(CAPTIONS))])
        captions = pairs.losers.labels[shown].tolist()
        made = improve(improver, pairs.losers.pixels[shown], captions, seed, STEPS, *guidance)
    grids(out / "improved.png", {"loser": pairs.losers.pixels[shown], "improved": made, "winner": pairs.winners.pixels[shown]},
          captions, per_prompt=6)
    side_by_side(out / "side_by_side.png", samples["base"], samples[f"iterative DPO, iteration {ours.iterations}"], labels,
                 method="iterative DPO")
    seconds["total"] = time.perf_counter() - started
    write_result(out / "result.json", scores, read_metrics(out / "run" / "metrics.jsonl"), seconds, {
        "seed": seed, "judge_steps": STEPS, "pairs": len(pairs.winners),
        "configs": [json.loads((out / run / "config.json").read_text()) for run in ("improvement", "run")],
    })
    print(table(scores))
    print(where(seconds, out, ("improved.png", "side_by_side.png")))
    return 0
