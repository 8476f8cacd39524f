"""The steps of the GPU suite that measure sampling and training. Each stores its results so far."""

import importlib.util
import time
from pathlib import Path

from benchmarks.result_files import Keep

# What a step needs beyond the steps of the loss. Where it is missing, the step is skipped and says so.
TRAINING = ("diffusers", "pydantic", "deepspeed", "transformers", "datasets", "peft")
SAMPLING = ("diffusers", "pydantic", "peft", "transformers")
NEEDED = {"video": (*TRAINING, "av"), **dict.fromkeys(("sampler", "swap", "flows", "rollouts"), SAMPLING)}


def step(name: str, out: Path, keep: Keep, limit: float) -> None:
    """Run one step. Models and runs are made in `out`/work and stay there for the next step that needs them."""
    missing = [module for module in NEEDED.get(name, TRAINING) if importlib.util.find_spec(module) is None]
    if missing:
        return keep({"skipped": f"not installed here: {', '.join(missing)}"})
    from diffusers.utils import logging

    logging.set_verbosity_error()
    work = out / "work"
    work.mkdir(exist_ok=True)
    if name == "sampler":
        from benchmarks.throughput import samplers

        begun = time.monotonic()
        samplers.measure("cuda", keep, limit - 100)  # the last point may compile
        if time.monotonic() - begun < limit - 40:
            (out / "sampler_profile.txt").write_text(samplers.profile("cuda") + "\n")
    elif name == "micro_batch":
        from benchmarks.throughput import micro_batch

        micro_batch.measure("cuda", keep, limit - 120)  # the last one may compile
    elif name == "swap":
        from benchmarks.throughput import swap

        swap.measure("sd15", "cuda", work / "swap", keep)
    elif name == "flows":
        from benchmarks.throughput import flows

        flows.measure("cuda", keep, limit - 60)  # the last point may be FLUX.1, whose weights are made first
    elif name == "rollouts":
        from benchmarks.throughput import rollouts

        rollouts.measure("cuda", keep, limit - 60)
    elif name == "video":
        from benchmarks.video import training

        training.measure("cuda", work, keep)
    else:
        from benchmarks.throughput import loop, profiles, training_memory

        case = loop.sd15_case(work)
        if name == "training_memory":
            training_memory.measure(case, keep)
        else:
            loop.measure(case, keep)
            (out / "loop_profile.txt").write_text(profiles.of_training(case, "cuda")["loop"] + "\n")
