"""The plan: what will be done and what it costs, in words, before anything is done."""

from math import prod
from shutil import disk_usage

import torch

from seppo_fast import __version__
from seppo_fast.config import METHODS
from seppo_fast.configfile import Batch, Config
from seppo_fast.data.fingerprint import cache_root, latent_shape
from seppo_fast.models import StableDiffusion, StableDiffusionXL
from seppo_fast.training.cost import Cost
from seppo_fast.training.engine import pool_dtype


def cache_bytes(model: StableDiffusion | StableDiffusionXL, config: Config) -> int:
    """Bytes that a demonstration's latents take in the cache; prompt embeddings come on top, once for each prompt."""
    data = config.seppo.data
    tensors = 4 if METHODS[config.seppo.method].losers == "data" else 2  # mean and standard deviation, of each image
    return tensors * prod(latent_shape(model, data.resolution)) * getattr(torch, data.cache_dtype).itemsize


def plan(config: Config, batch: Batch, cost: Cost | None, row_bytes: int | None, rows: int | None) -> str:
    """The plan of a run. `cost`, `row_bytes` and `rows` are None where the model or the data are not here yet."""
    ours = config.seppo
    method = METHODS[ours.method]
    updates = ours.iterations * ours.updates_per_iteration
    samples = updates * batch.size if method.losers == "reference" else 0
    lines = {
        "method": ours.method + (f", reference {ours.reference}, flipper {ours.flipper}, beta {ours.beta:g}, noise"
                                 f" {ours.noise}" if ours.flipper else ""),
        "model": ours.model.path + _size(cost) + (f", LoRA rank {ours.model.lora.rank}" if ours.model.lora else ", all weights"),
        "data": f"{ours.data.source or 'not set'} at {ours.data.resolution} pixels"
                + (f", {rows} demonstrations" if rows is not None else ""),
        "latent cache": _cache(config, row_bytes, rows),
        "effective batch": f"{batch.size} pairs = {batch.micro} a rank x {batch.accumulation} accumulated x {batch.world}"
                           f" rank{'s' * (batch.world > 1)}",
        "updates": f"{updates} = {ours.iterations} iterations x {ours.updates_per_iteration}",
        "learning rate": _learning_rate(config),
        "checkpoints": f"every {ours.checkpoint.every or ours.updates_per_iteration} updates, the last"
                       f" {ours.checkpoint.keep_last} kept",
    }
    if samples:
        lines["reference samples"] = (f"{samples} in all, {batch.size} an update; {ours.sampler.solver},"
                                      f" {ours.sampler.steps} steps, guidance {ours.sampler.guidance_scale:g}, in batches of"
                                      f" {ours.sampler.batch_size}")
    if method.references:
        size = "" if cost is None else f", {_gb(cost.trained * pool_dtype(config).itemsize)} each"
        kept = f"{ours.pool.host_memory_gb:g} GB of host memory, the rest on disk"
        lines["pool"] = f"{ours.iterations + 1} past policies at the end{size}; {kept}"
    if cost:
        lines["compute"] = (f"{cost.forward / 1e12:.3g} TFLOP a forward, {(cost.sampling + cost.training) / 1e12:.3g} a pair,"
                            f" {cost.sampling_share:.0%} of it for reference samples")
        lines["memory a rank"] = (f"about {_gb(cost.memory)}: weights {_gb(cost.weights)}, gradients {_gb(cost.gradients)},"
                                  f" optimizer {_gb(cost.optimizer)}, reference {_gb(cost.reference)}, activations"
                                  f" {_gb(cost.activations)} (an estimate, without the allocator's slack)")
    width = max(map(len, lines))
    return "\n".join([f"seppo_fast {__version__}: the plan", *(f"  {k:<{width}}  {v}" for k, v in lines.items())])


def _cache(config: Config, row_bytes: int | None, rows: int | None) -> str:
    root = cache_root(config.seppo.data)
    existing = next(path for path in [root, *root.absolute().parents] if path.exists())
    size = "" if row_bytes is None or rows is None else f"about {_gb(row_bytes * rows)} and the prompt embeddings, "
    return f"{size}in {root} ({_gb(disk_usage(existing).free)} free)"


def _learning_rate(config: Config) -> str:
    optimizer, scheduler = config.deepspeed["optimizer"], config.deepspeed.get("scheduler", {})
    params = scheduler.get("params", {})
    rate = params.get("warmup_max_lr", optimizer["params"]["lr"])
    warm_up = params.get("warmup_num_steps", 0)
    schedule = f"schedule {scheduler.get('type', 'constant')}, warm-up {warm_up} updates"
    return f"{rate:g} as it is, not scaled by the batch ({optimizer['type']}, {schedule})"


def _size(cost: Cost | None) -> str:
    return "" if cost is None else f", {cost.parameters / 1e6:.4g} M parameters ({cost.trained / 1e6:.4g} M trained)"


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"
