"""The room that a run needs on the disk: what it writes, how much of it is there already, and whether the rest fits."""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from seppo_fast.config import METHODS, Seppo
from seppo_fast.configfile import Batch, Config
from seppo_fast.data.fingerprint import latent_shape
from seppo_fast.errors import UserError
from seppo_fast.models import Model
from seppo_fast.models.export import copied_bytes
from seppo_fast.planning.cost import Cost
from seppo_fast.training.engine import pool_dtype, precision
from seppo_fast.training.samples import PROMPTS as GRID_PROMPTS
from seppo_fast.training.validation import prompts_of

MARGIN, LEAST_MARGIN = 0.05, 100_000_000  # a share, and at least so many bytes: logs, monitors, what others write
OF_A_PIXEL = 2.0  # bytes in a PNG of a photograph
OF_A_FRAMES_PIXEL = 0.3  # bytes in an animated WebP
QUOTAS = "Quotas are not seen here."


@dataclass(frozen=True)
class Part:
    """Files of one kind: the bytes of one, how many are there at once at most, and the pattern of those in the run folder.

    `every`: the updates from one to the next, where not all of them stay.
    """

    size: int
    count: int
    pattern: str
    every: int | None = None

    def left(self, run: Path, updates: int) -> int:
        """The bytes by which they will grow in so many updates."""
        missing = self.count - sum(1 for _ in run.glob(self.pattern))
        return self.size * max(0, missing if self.every is None else min(missing, -(-updates // self.every)))


Parts = Mapping[str, Part]


def parts_of(config: Config, batch: Batch, cost: Cost, model: Model) -> dict[str, Part]:
    """What a run writes into its folder. Pictures are estimated by their pixels, and tables and logs are left to the margin."""
    ours = config.seppo
    size, method = precision(config.deepspeed).dtype.itemsize, METHODS[ours.method]
    kept = kept_checkpoints(ours)
    every = ours.checkpoint.every or ours.updates_per_iteration
    if ours.evaluation.keep_best:
        every = min(every, ours.evaluation.every)
    found = {"checkpoints": Part(checkpoint_bytes(config, batch, cost, model), kept, "checkpoints/update_*", every)}
    if method.references:
        found["past policies"] = Part(cost.trained * pool_dtype(config).itemsize, ours.iterations + 1, "pool/policy_*.safetensors")
    if ours.sampler.samples_per_iteration and method.draws:
        found["sample sets"] = Part(ours.sampler.samples_per_iteration * rollout_bytes(ours, model),
                                    min(ours.iterations, kept), "rollouts/iteration_*")
    final = final_bytes(config, cost, model, size)
    found["final/"] = Part(final, 1, "final")
    if ours.evaluation.keep_best:
        found["best/"] = Part(final, 1, "best")
    if ours.samples.every:
        count = (len(ours.samples.prompts) or GRID_PROMPTS) * ours.samples.per_prompt
        found["grids"] = Part(count * picture_bytes(ours, model), ours.updates // ours.samples.every + 1, "samples/update_*")
    if ours.evaluation.draws:
        count = len(prompts_of(config, lambda line: None)) * ours.evaluation.per_prompt
        found["evaluations"] = Part(count * picture_bytes(ours, model), ours.updates // ours.evaluation.every + 1,
                                    "evaluation/samples/update_*")
    return found


def kept_checkpoints(ours: Seppo) -> int:
    """The most that are there at once: the last ones, the best, the last sound one, and one that is being written."""
    written = -(-ours.updates // (ours.checkpoint.every or ours.updates_per_iteration))
    if ours.evaluation.keep_best:
        written += ours.updates // ours.evaluation.every
    return min(written, ours.checkpoint.keep_last + ours.evaluation.keep_best + 2)


def checkpoint_bytes(config: Config, batch: Batch, cost: Cost, model: Model) -> int:
    """A checkpoint: weights and Adam's moments in fp32, the weights as the policy has them, unused rollouts."""
    ours, size = config.seppo, precision(config.deepspeed).dtype.itemsize
    ahead = 0
    if ours.sampler.window == "iteration" and METHODS[ours.method].draws and not ours.sampler.samples_per_iteration:
        every = ours.checkpoint.every or ours.updates_per_iteration
        ahead = max(0, ours.updates_per_iteration - every) * batch.size * rollout_bytes(ours, model)
    return cost.trained * (8 + 4 + size) + ahead


def rollout_bytes(ours: Seppo, model: Model) -> int:
    """The latents of a rollout, in fp32, and of its improved winner."""
    return 4 * prod(latent_shape(model, ours.data)) * (2 if METHODS[ours.method].winners == "improvement" else 1)


def picture_bytes(ours: Seppo, model: Model) -> int:
    """A sample, about."""
    pixels = ours.data.resolution**2
    return int(pixels * ours.data.video.frames * OF_A_FRAMES_PIXEL if model.video else pixels * OF_A_PIXEL)


def final_bytes(config: Config, cost: Cost, model: Model, size: int) -> int:
    """The trained model: a LoRA's weights, or a pipeline with all that was not trained."""
    lora = config.seppo.model.lora is not None
    if lora and not model.image_condition:
        return cost.trained * size
    rest = copied_bytes(model) if model.path.is_dir() else cost.encoders.vae + cost.encoders.text
    twice = cost.trained if cost.trained < cost.parameters and not lora else 0  # AnimateDiff: in the UNet, and as an adapter
    return rest + (cost.parameters + twice) * (4 if lora else size)


def left_of(parts: Parts, run: Path, updates: int) -> dict[str, int]:
    """The bytes by which the run folder will grow, by kind, in so many updates that are left."""
    return {name: left for name, part in parts.items() if (left := part.left(run, updates))}


def with_margin(size: int) -> int:
    """Bytes that should be free where so many will be written."""
    return size + max(int(size * MARGIN), LEAST_MARGIN) if size else 0


def free(folder: Path) -> int:
    """The free bytes where a folder is, or will be."""
    return shutil.disk_usage(_existing(folder)).free


def in_words(parts: Parts) -> str:
    """What is written, for the plan."""
    kinds = [f"{name} {part.count} x {gb(part.size)}" if part.count > 1 else f"{name} {gb(part.size)}"
             for name, part in parts.items()]
    return f"at most {gb(sum(part.size * part.count for part in parts.values()))} at once: {', '.join(kinds)}"


def check(run: Path, left: Mapping[str, int], cache: Path, encoded: int) -> None:
    """`UserError` where run folder and cache, to which `encoded` bytes are added, have no room for what is still to be written."""
    written = sum(left.values())
    together = os.stat(_existing(run)).st_dev == os.stat(_existing(cache)).st_dev
    for folder, needed, about in ((run, written + encoded * together, "seppo.output_dir"),
                                  (cache, 0 if together else encoded, "seppo.data.cache_dir")):
        if with_margin(needed) > (room := free(folder)):
            kinds = [f"{name} {gb(size)}" for name, size in (left.items() if folder == run else ())]
            if encoded and (together or folder == cache):
                kinds.append(f"the cache in {cache} {gb(encoded)}")
            raise UserError(f"{folder} ({about}): {gb(room)} are free on its disk, and what this run still has to write there needs"
                            f" about {gb(with_margin(needed))} ({', '.join(kinds)}, and a margin). Free some, lower"
                            " seppo.checkpoint.keep_last, write fewer (seppo.iterations, seppo.samples.every, seppo.evaluation), or"
                            f" choose another seppo.output_dir or seppo.data.cache_dir. {QUOTAS}")


def watched(run: Path, parts: Parts) -> Callable[[int], str | None]:
    """A function of the updates that are left: a warning when there is less room than they need, once until there is enough."""
    low = False

    def look(updates: int) -> str | None:
        nonlocal low
        left = left_of(parts, run, updates)
        needed, room = with_margin(sum(left.values())), free(run)
        low, before = needed > room, low
        if not low or before:
            return None
        kinds = ", ".join(f"{name} {gb(size)}" for name, size in left.items())
        return (f"the disk fills up: {gb(room)} are free for {run}, and the rest of this run needs about {gb(needed)} ({kinds},"
                " and a margin). Free some now: nothing is lost so far, and a checkpoint that cannot be written ends the run with"
                f" the one before. {QUOTAS}")

    return look


def gb(size: float) -> str:
    """A number of bytes."""
    return f"{size / 1e9:,.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
