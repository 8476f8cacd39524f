"""The quickstart for video from its base model to its pictures and figures."""

import json
import time
from dataclasses import replace
from pathlib import Path

from seppo_fast.configfile import load_config
from seppo_fast.quickstart.digits import split_digits
from seppo_fast.quickstart.report import curves, read_metrics
from seppo_fast.quickstart.steps import align, make_base_model, overrides, own_folder, say, timed, where
from seppo_fast.quickstart.video.clips import CAPTIONS, random_clips
from seppo_fast.quickstart.video.demonstrations import write_demonstrations
from seppo_fast.quickstart.video.judge import Judge, draw
from seppo_fast.quickstart.video.models import KINDS
from seppo_fast.quickstart.video.report import loop, stills, table, write_result
from seppo_fast.seeds import generator

DEMONSTRATIONS = 400
SAMPLES = 120
STEPS = 8


def run(out: Path, seed: int, model: str = "unet") -> int:
    """Base, demonstrations, training by the literal command, judgement. Exit status: 0, or the training's own."""
    kind = KINDS[model]
    recipe = replace(kind.recipe, seed=seed)
    own_folder(out)
    settings = [*overrides(out, seed), f"seppo.data.source={out / 'demonstrations' / 'demonstrations.csv'}"]
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    make_base_model(out, f"1/4  the base model: {kind.parts}, trained here on sloppy clips",
                    lambda folder: kind.make_base(folder, recipe), seconds)

    say("2/4  the demonstrations: clean clips with right captions, as VP9 files")
    with timed(seconds, "demonstrations"):
        digits, held_out = split_digits(seed)
        clips = random_clips(digits, DEMONSTRATIONS, generator(seed, "demonstrations"), recipe.frames)
        path = write_demonstrations(out / "demonstrations", clips)
        print(f"{len(clips)} clips, named in {path}")

    if status := align(out, kind.config, settings, seconds):
        return status

    say("4/4  the judgement: plain diffusers pipelines, the same noise for both models")
    guidance_scale = load_config(kind.config, settings).seppo.sampler.guidance_scale
    with timed(seconds, "judgement"):
        judge = Judge(held_out, digits, SAMPLES, seed, recipe.frames)
        labels = [index % len(CAPTIONS) for index in range(SAMPLES)]
        before = draw(out / "base", None, labels, seed, STEPS, guidance_scale, recipe.frames)
        after = draw(out / "base", out / "run" / "final", labels, seed, STEPS, guidance_scale, recipe.frames)
        base, trained = judge.score(before, labels), judge.score(after, labels)
    rows = read_metrics(out / "run" / "metrics.jsonl")
    loop(out / "side_by_side.webp", before, after, labels)
    stills(out / "frames.png", before, after, labels)
    curves(out / "curves.png", rows)
    seconds["total"] = time.perf_counter() - started
    write_result(out / "result.json", base, trained, judge, rows, seconds, {
        "seed": seed, "judge_steps": STEPS, "guidance_scale": guidance_scale, "demonstrations": len(clips),
        "config": json.loads((out / "run" / "config.json").read_text()),
    })
    print(table(base, trained, judge, rows))
    print(where(seconds, out, ("side_by_side.webp", "frames.png", "curves.png")))
    return 0
