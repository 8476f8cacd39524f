"""The memory of DeepSpeed's engine besides the weights, as read in its source (0.19) and checked in the tests."""

from dataclasses import dataclass

import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch import Tensor, nn

from seppo_fast.configfile import Batch, Config
from seppo_fast.training.engine import engine_config, precision

FALLBACK_BUCKET = 500_000_000  # elements that the engine reduces at once where no ZeRO stage has its own buckets


@dataclass(frozen=True)
class EngineBytes:
    """Bytes of one rank. `bucket_elements` 0: gradients are not collected in a bucket while backward makes them."""

    optimizer: int  # the optimizer's moments and the master copy of the weights; always there
    gradients: int  # summed over the accumulation window
    update: int  # in place of `gradients` and the activations during the optimizer's update
    sampling: int  # the part of `gradients` that stays between windows
    bucket_elements: int
    bucket_dtype: torch.dtype
    buckets: int  # how many of them

    @property
    def bucket(self) -> int:
        """Bytes of the buckets through which gradients are reduced."""
        return self.buckets * self.bucket_elements * self.bucket_dtype.itemsize


def engine_bytes(config: Config, batch: Batch, trained: int, largest: int) -> EngineBytes:
    """The bytes for `trained` weights, whose largest tensor has `largest` elements. Moments are Adam's."""
    raw = engine_config(config, batch)
    section = dict(raw.get("zero_optimization", {}))
    zero = DeepSpeedZeroConfig(**section)
    dtype = precision(raw).dtype
    size = dtype.itemsize
    half = size < 4
    sums = half and raw.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    offload = (section.get("offload_optimizer") or {}).get("device", "none") != "none"
    stage = int(zero.stage)
    own = trained // batch.world  # the weights that this rank updates
    step = 0 if offload else adam_temporaries(raw) * own

    if stage == 0:
        return EngineBytes(optimizer=8 * trained, gradients=4 * trained, sampling=0, bucket_elements=0, bucket_dtype=dtype,
                           buckets=0, update=4 * trained + max(4 * min(trained, FALLBACK_BUCKET), step))
    optimizer = size * largest if offload else 12 * own
    if uses_bf16_optimizer(raw):
        kept = 0 if raw["bf16"].get("immediate_grad_update") else 2 * trained
        sent = 0 if raw.get("communication_data_type") == "fp32" else 2 * trained  # a copy, even on one rank
        return EngineBytes(optimizer=optimizer, gradients=4 * trained + kept, sampling=4 * trained, bucket_elements=0,
                           bucket_dtype=dtype, buckets=0, update=4 * trained + kept + max(sent, step))
    summed = 4 * own if sums else 0  # the owned share, where reduced gradients are added
    if stage == 3:
        summed = 4 * own if sums or not half else 2 * own
        update, gradients = summed + max(step, 4 * own), summed
    elif stage == 2:
        gradients = summed if sums or offload else size * own * (2 if batch.accumulation > 1 else 1)
        flat = 0 if offload else size * own + (4 * own if half else 0)  # flattened, and in fp32
        update = gradients + step if sums or offload else max(size * own + flat, 4 * own + step)
    else:
        gradients = (4 if sums else size) * trained
        moved = summed or size * own  # the owned share, copied out of the bucket
        update = gradients + moved + max(step, 4 * own if half and not sums else 0)
    buckets = 2 if zero.overlap_comm else 1
    update = max(update, gradients + 8 * largest)  # norms are computed in fp64, one weight at a time
    return EngineBytes(optimizer=optimizer, gradients=gradients, update=update, sampling=0 if stage < 3 else summed,
                       bucket_elements=int(zero.reduce_bucket_size), buckets=buckets,
                       bucket_dtype=torch.float32 if stage == 1 and sums else dtype)


def uses_bf16_optimizer(raw: dict) -> bool:
    """Whether DeepSpeed takes its BF16_Optimizer, which sums all gradients in fp32, and not a ZeRO stage's optimizer."""
    zero = raw.get("zero_optimization", {})
    offload = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    sums = raw.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    return precision(raw).dtype == torch.bfloat16 and sums and int(zero.get("stage", 0)) == 1 and not offload


def adam_temporaries(raw: dict) -> int:
    """Temporary bytes of Adam's update for each weight: none where one kernel does all of it."""
    params = raw["optimizer"].get("params", {})
    return 4 if params.get("torch_adam") and not params.get("fused") else 0


class TakenGradients:
    """Takes gradients from backward as the engine does: it fills a bucket, empties it, and keeps nothing.

    An instance is the argument `gradient` of `network_memory.micro_batch`, and its `finish` is the argument `finish`.
    """

    def __init__(self, engine: EngineBytes) -> None:
        self.engine, self.filled = engine, 0
        self.buckets: list[Tensor] = []

    def __call__(self, weight: nn.Parameter) -> None:
        weight.grad = None
        size = self.engine.bucket_elements
        if size == 0:
            return
        if not self.buckets:
            self.buckets = [self._empty(size) for _ in range(self.engine.buckets)]
        if self.filled + weight.numel() > size:
            self.finish()
        self.filled += weight.numel()

    def finish(self) -> None:
        """Copy the bucket's content into one tensor, as for reducing it, and empty the bucket."""
        self._empty(self.filled)
        self.filled = 0

    def _empty(self, elements: int) -> Tensor:
        return torch.empty(elements, device="meta", dtype=self.engine.bucket_dtype)
