"""The quickstart for video from its base model to its pictures and figures."""

import json
import time
from pathlib import Path

from seppo_fast.configfile import load_config
from seppo_fast.quickstart.digits import split_digits
from seppo_fast.quickstart.report import curves, read_metrics
from seppo_fast.quickstart.steps import align, make_base_model, overrides, own_folder, say, timed, where
from seppo_fast.quickstart.video.base import Recipe, make_base
from seppo_fast.quickstart.video.clips import CAPTIONS, random_clips
from seppo_fast.quickstart.video.demonstrations import write_demonstrations
from seppo_fast.quickstart.video.judge import Judge, draw
from seppo_fast.quickstart.video.report import loop, stills, table, write_result
from seppo_fast.seeds import generator

CONFIG = "quickstart_video.json"
DEMONSTRATIONS = 400
SAMPLES = 120
STEPS = 8


def run(out: Path, seed: int) -> int:
    """Base, demonstrations, training by the literal command, judgement. Exit status: 0, or the training's own."""
    own_folder(out)
    settings = [*overrides(out, seed), f"seppo.data.source={out / 'demonstrations' / 'demonstrations.csv'}"]
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    make_base_model(out, "1/4  the base model: tokenizer, VAE, text encoder and UNet with motion modules, trained here on sloppy"
                    " clips", lambda folder: make_base(folder, Recipe(seed=seed)), seconds)

    say("2/4  the demonstrations: clean clips with right captions, as VP9 files")
    with timed(seconds, "demonstrations"):
        digits, held_out = split_digits(seed)
        clips = random_clips(digits, DEMONSTRATIONS, generator(seed, "demonstrations"))
        path = write_demonstrations(out / "demonstrations", clips)
        print(f"{len(clips)} clips, named in {path}")

    if status := align(out, CONFIG, settings, seconds):
        return status

    say("4/4  the judgement: plain diffusers pipelines, the same noise for both models")
    guidance_scale = load_config(CONFIG, settings).seppo.sampler.guidance_scale
    with timed(seconds, "judgement"):
        judge = Judge(held_out, digits, SAMPLES, seed)
        labels = [index % len(CAPTIONS) for index in range(SAMPLES)]
        before = draw(out / "base", None, labels, seed, STEPS, guidance_scale)
        after = draw(out / "base", out / "run" / "final", labels, seed, STEPS, guidance_scale)
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
