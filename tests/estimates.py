"""The plan's estimate, made once for equal questions: it is a third of a tiny run, and many runs differ in their folders alone.

It is the real estimate, kept in files so that forked processes share it. `seppo_fast.train` started as a command and the dry run
make their own each time; test_cost.py holds the estimate to what is allocated.
"""

import functools
import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

from seppo_fast import run
from seppo_fast.configfile import Batch, Config
from seppo_fast.planning.cost import Cost


def remember(folder: Path) -> None:
    """From now on, what this process trains takes its estimates from `folder` where they are there."""
    estimate = run.estimate

    @functools.wraps(estimate)
    def remembered(model: Any, config: Config, batch: Batch, adapter: Any = None) -> Cost:
        file = folder / question(model, config, batch, adapter)
        if not file.exists():
            part = file.with_suffix(f".{os.getpid()}")
            part.write_bytes(pickle.dumps(estimate(model, config, batch, adapter)))
            part.rename(file)
        return pickle.loads(file.read_bytes())

    run.estimate = remembered


def question(model: Any, config: Config, batch: Batch, adapter: Any = None) -> str:
    """All that an estimate depends on, as one word: neither folders nor seeds, rates or what decides a sample's content."""
    ours, engine = config.seppo, dict(config.deepspeed)
    for key in ("scheduler", "gradient_clipping", "csv_monitor", "steps_per_print"):
        engine.pop(key, None)
    params = engine.pop("optimizer", {}).get("params", {})
    network = ours.model.model_copy(update={"path": "", "motion_adapter": None})
    sampler = ours.sampler.model_copy(update={"guidance_scale": min(ours.sampler.guidance_scale, 2.0)})
    shown = ours.shown is not ours.sampler and ours.shown
    looks = (shown, ours.samples.every > 0, ours.evaluation.every > 0, ours.evaluation.draws, len(ours.samples.prompts),
             ours.samples.per_prompt, ours.evaluation.batch_size)
    data = (ours.data.resolution, ours.data.video.frames, ours.data.encode_batch_size)
    asked = (network, data, ours.method, bool(ours.flipper), ours.reference_score, ours.reference_offload, sampler, looks, engine,
             params.get("torch_adam"), params.get("fused"))
    return hashlib.sha256(repr((type(model), model.directory.configs, asked, batch, adapter and adapter.file)).encode()).hexdigest()
