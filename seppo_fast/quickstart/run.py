"""The quickstart from its base model to its pictures and figures."""

import json
import time
from dataclasses import replace
from pathlib import Path

from seppo_fast.configfile import load_config
from seppo_fast.quickstart.demonstrations import write_demonstrations
from seppo_fast.quickstart.digits import CAPTIONS, split_digits
from seppo_fast.quickstart.judge import Judge, draw
from seppo_fast.quickstart.models import KINDS
from seppo_fast.quickstart.report import curves, read_metrics, side_by_side, table, write_result
from seppo_fast.quickstart.steps import align, make_base_model, overrides, own_folder, say, timed, where

SAMPLES = 500
STEPS = 20


def run(out: Path, seed: int, model: str = "unet") -> int:
    """Base, demonstrations, training by the literal command, judgement. Exit status: 0, or the training's own."""
    kind = KINDS[model]
    own_folder(out)
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    make_base_model(out, f"1/4  the base model: {kind.parts}, trained here on sloppy data",
                    lambda folder: kind.make_base(folder, replace(kind.recipe, seed=seed)), seconds)

    say("2/4  the demonstrations: clean digits with right captions")
    with timed(seconds, "demonstrations"):
        digits, held_out = split_digits(seed)
        count = write_demonstrations(out / "demonstrations", digits)
        print(f"{count} pictures in {out / 'demonstrations'}")

    if status := align(out, kind.config, overrides(out, seed), seconds):
        return status

    say("4/4  the judgement: plain diffusers pipelines, the same noise for both models")
    guidance_scale = load_config(kind.config, overrides(out, seed)).seppo.sampler.guidance_scale
    with timed(seconds, "judgement"):
        judge = Judge(held_out, digits, seed)
        labels = [index % len(CAPTIONS) for index in range(SAMPLES)]
        before = draw(out / "base", labels, seed, STEPS, guidance_scale)
        after = draw(out / "run" / "final", labels, seed, STEPS, guidance_scale)
        base, trained = judge.score(before, labels), judge.score(after, labels)
    rows = read_metrics(out / "run" / "metrics.jsonl")
    side_by_side(out / "side_by_side.png", before, after, labels)
    curves(out / "curves.png", rows)
    seconds["total"] = time.perf_counter() - started
    settings = {
        "seed": seed, "judge_steps": STEPS, "guidance_scale": guidance_scale,
        "config": json.loads((out / "run" / "config.json").read_text()),
    }
    write_result(out / "result.json", base, trained, judge, rows, seconds, settings)
    print(table(base, trained, judge, rows))
    print(where(seconds, out, ("side_by_side.png", "curves.png")))
    return 0
