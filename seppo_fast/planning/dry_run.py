"""--dry-run: everything that can be checked without training, and the plan."""

from collections.abc import Sequence
from pathlib import Path

import torch

from seppo_fast.config import METHODS
from seppo_fast.configfile import Config, batch_plan
from seppo_fast.data.fingerprint import latent_shape
from seppo_fast.data.order import split
from seppo_fast.data.rows import Source
from seppo_fast.data.sources import SOURCE_NOT_SET, is_hub_dataset, open_source
from seppo_fast.models import Model, is_hub_id, open_model
from seppo_fast.models.improvement import improvement_model, reference_model
from seppo_fast.models.labels import OF_IMPROVEMENT, OF_REFERENCE
from seppo_fast.models.published import published_model, supported
from seppo_fast.models.vae_memory import VaeMemory, with_vae_memory
from seppo_fast.planning.cost import estimate
from seppo_fast.planning.gpus import check_numbers, gpus_plan
from seppo_fast.planning.plan import plan
from seppo_fast.planning.this_machine import own_rate
from seppo_fast.planning.time_plan import load_rates, time_plan
from seppo_fast.training import start
from seppo_fast.training.adapter import read as read_adapter
from seppo_fast.training.engine import check_engine_config, precision, unsupported
from seppo_fast.training.folder import results_in
from seppo_fast.training.networks import check_network
from seppo_fast.training.noise import noise_process
from seppo_fast.training.validation import request_of


def dry_run(config: Config, world: int, rates: str | None = None, gpus: Sequence[str] = ()) -> str:
    """The plan, and what is still missing; raises `UserError` for what is wrong.

    `rates` is a file of a device's measured speed, in addition to the shipped rates. `gpus`: other numbers of GPUs to plan for.
    """
    numbers = check_numbers(gpus)
    ours = config.seppo
    batch = batch_plan(config.deepspeed, world)
    check_engine_config(config, batch)
    known_rates = load_rates(rates)
    missing = [lacking] if (lacking := unsupported(config)) else []  # a plan may be for another machine than this one
    model = _model(config, missing)
    if model is not None:
        check_network(model, config)
        model.check_frames(ours.data.video.frames)
        if ours.evaluation.draws:
            request_of(config, model, lambda line: None)
        if ours.model.start_from:
            start.read(ours.model.start_from, model, ours.model, ours.seed)
    _others(config, model, missing)
    source = _source(config, model, missing)
    held = 0 if source is None or source.count is None else len(split(source.count, ours.data.hold_out, ours.seed)[1])
    cost, times = None, []
    if model is not None:
        latents = latent_shape(model, ours.data)
        noise_process(model.scheduler_config, ours.timesteps, model.time_shift(latents))
        adapter = read_adapter(ours, model)
        cost = estimate(model, config, batch, adapter)
        here = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        known_rates += own_rate(known_rates, here, precision(config.deepspeed).dtype)
        times = [time_plan(config, batch, cost, model, known_rates, here, held)]
        times += [gpus_plan(config, model, numbers, known_rates, here, held, adapter)] if numbers else []
    elif numbers:
        missing.append("--gpus: nothing can be planned without the model's shape")
    path = Path(ours.output_dir)
    if (path / "run.json").exists() and results_in(path):
        missing.append(f"{ours.output_dir} already holds a run: go on with it by --resume auto, or choose another seppo.output_dir")
    lines = [plan(config, batch, cost, model, source), *times, *(f"before you train: {line}" for line in missing)]
    return "\n".join([*lines, "dry run: nothing was trained or written"])


def _model(config: Config, missing: list[str]) -> Model | None:
    """The model; for one on the hub its published shape, with a line in `missing`, because a dry run downloads nothing."""
    ours, with_image = config.seppo.model, config.seppo.method == "improvement"
    on_hub = {key: name for key, name in {"path": ours.path, "motion_adapter": ours.motion_adapter}.items()
              if name is not None and is_hub_id(name)}
    memory = VaeMemory(ours.vae_tiling, ours.vae_slicing)
    if not on_hub:
        model = open_model(ours.path, revision=ours.revision, variant=ours.variant, motion_adapter=ours.motion_adapter,
                           image_condition=with_image, quantize_text=ours.quantize_text)
        return with_vae_memory(model, memory)
    model = published_model(ours.path, ours.motion_adapter, with_image)
    missing += [f"seppo.model.{key} {name} is no directory here: it will be looked up on the hub, and "
                + ("compute, memory and time are those of the model published under this name" if model else
                   "compute, memory and time cannot be estimated before") for key, name in on_hub.items()]
    if model is None and "path" in on_hub:
        missing.append(f"seppo.model.path {ours.path}: {supported(ours.path)}")
    return model and with_vae_memory(model, memory)


def _others(config: Config, model: Model | None, missing: list[str]) -> None:
    """The improvement model and the reference model, checked against the policy's model as far as they are here."""
    ours = config.seppo
    there = model if model is not None and model.path.is_dir() else None
    for given, labels, opened in ((ours.improvement, OF_IMPROVEMENT, improvement_model),
                                  (ours.reference_model, OF_REFERENCE, reference_model)):
        if given.path is None:
            continue
        if is_hub_id(given.path):
            missing.append(f"{labels.path} {given.path} is no directory here: it will be looked up on the hub, and whether it"
                           " fits is seen when the run starts")
        elif not Path(given.path).exists():
            missing.append(f"{labels.path} {given.path} is not there yet")
        else:
            opened(given, there)


def _source(config: Config, model: Model | None, missing: list[str]) -> Source | None:
    """The demonstrations, or None with a line in `missing`."""
    ours = config.seppo
    if ours.data.source is None:
        missing.append(SOURCE_NOT_SET)
    elif is_hub_dataset(ours.data):
        missing.append(f"seppo.data.source {ours.data.source} is no file or folder here: it will be downloaded from the hub")
    else:
        return open_source(ours.data, needs_loser=METHODS[ours.method].needs_losers, seed=ours.seed,
                           video=None if model is None else model.video, method=ours.method)
    return None
