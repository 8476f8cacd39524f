"""The fused loss in Triton, for GPUs where csrc/ was not built. Same maths as csrc/pair_loss.h, same outputs.

The gradient needs a pair's errors p - t. They stay in registers while the sums are made, so that one launch reads each input
once. A pair of up to 16384 elements a half (SD-1.5) is one program of `pair_kernel`. A larger pair is shared by programs of
`parts_kernel`, which are all on the chip at once and wait for each other's sums. Where that is impossible (the interpreter runs
programs one after another, and a pair may be too large for the chip) the same code runs in three launches, and the last one
reads policy and target again.

The order of a pair's sums depends on its size and dtype alone: launch, grid and batch change no bit. Nothing is tuned by
timing, because ranks that chose differently would add in different orders.
"""

from functools import lru_cache

import torch
import triton
from torch import Tensor

from seppo_fast.ops.native import gpu_lacks
from seppo_fast.ops.triton_device import GRADIENT, SUMS, TOGETHER, pair_kernel, parts_kernel, results_kernel

ONE_PROGRAM = 16384  # the largest sample whose pair one program holds
PART = 4096  # elements of each half of a larger pair that a program holds
# Warps by bytes of a policy element: for fp32 256 threads with up to 255 registers each (more threads spill), for the rest 1024
# threads with 64. A multiprocessor holds two parts, with 128 registers a thread. Checked for sm_80 and sm_90.
WARPS = {4: 8, 2: 32}
PART_WARPS, RESIDENT = 8, 2
EXACT = {"enable_fp_fusion": False}  # or the compiler chooses in each kernel what it fuses, and so the last bit
COUNTERS = 1024  # for each stream: one for the ticket, and one for each large pair, where its programs meet


@lru_cache
def plan(elements: int, element_size: int) -> tuple[int, dict[str, int]]:
    """How many programs share a pair of samples of so many elements, and the constants of their launch; a fixed table."""
    width = 16 // element_size  # elements of a 16-byte access
    if elements <= ONE_PROGRAM:
        block = min(WARPS[element_size] * 32 * width, max(128, triton.next_power_of_2(elements)))
        parts, chunks = 1, -(-elements // block)
    else:
        block = PART_WARPS * 32 * width
        parts, chunks = -(-elements // PART), PART // block
    whole = elements % (chunks * block) == 0
    return parts, dict(WHOLE=whole, BLOCK=block, WIDTH=width, CHUNKS=chunks,
                       num_warps=max(1, block // (32 * width)), **EXACT)


@lru_cache
def _kept_counters(device: torch.device, stream: int) -> Tensor:
    """Counters of 0, which every launch leaves ready for the next. Launches on one stream do not overlap, so they share them."""
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)


def _counters(like: Tensor, count: int) -> Tensor:
    if not like.is_cuda:
        return _kept_counters(like.device, 0)
    # A graph may be replayed on any stream, at the same time as another launch on this one: it gets counters of its own.
    if count > COUNTERS or torch.cuda.is_current_stream_capturing():
        return like.new_zeros(count, dtype=torch.int32)
    return _kept_counters(like.device, triton.runtime.driver.active.get_current_stream(like.device.index))


@lru_cache
def _room(device: torch.device) -> int:
    """How many programs of parts_kernel can wait for each other on this device."""
    return RESIDENT * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


def pair_loss(model_pred: Tensor, reference: Tensor, target: Tensor, beta: float, flipper: int, sft_weight: float, scale: float,
              weight: float, wants_grad: bool, sign: Tensor | None = None, together: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """loss (), stats (7B + 2,) and the gradient. `reference`: predictions, shaped like model_pred, or their mean squared errors
    (2B,). `sign`: (B,) fp32, in place of the flipper's. `together=False` is for tests: it takes the three launches of pairs that
    are too large for the chip."""
    if model_pred.is_cuda and model_pred.device.index != torch.cuda.current_device():
        with torch.cuda.device(model_pred.device):
            return pair_loss(model_pred, reference, target, beta, flipper, sft_weight, scale, weight, wants_grad, sign, together)
    samples = model_pred.shape[0]
    pairs, elements = samples // 2, model_pred.numel() // samples
    loss = model_pred.new_empty((), dtype=torch.float32)
    stats = model_pred.new_empty(7 * pairs + 2, dtype=torch.float32)
    grad = torch.empty_like(model_pred) if wants_grad else model_pred.new_empty(0)
    parts, how = plan(elements, model_pred.element_size())
    scored = reference.dim() == 1
    tensors = (model_pred, reference, target, sign, grad, loss, stats)
    numbers = (-0.5 * beta / (1 if scored else elements), scale * beta / elements, sft_weight,
               2 * scale * sft_weight / elements, 1 / elements, weight)
    variant = dict(FLIPPER=flipper, SFT=sft_weight > 0, SCORED=scored)
    options = dict(how, **variant, SHARED=target.shape[0] != samples, WANTS_GRAD=wants_grad)
    if parts == 1:
        pair_kernel[(pairs,)](*tensors, _counters(model_pred, 1), pairs, elements, *numbers, **options)
        return loss, stats, grad
    partial = model_pred.new_empty(8 * pairs * parts, dtype=torch.float32)
    counters = _counters(model_pred, 1 + pairs)
    arguments = (*tensors, partial, counters, pairs, elements, parts, *numbers)
    work, room = pairs * parts, _room(model_pred.device)
    if together and parts <= room:
        parts_kernel[(min(work, room),)](*arguments, PHASE=TOGETHER.value, launch_cooperative_grid=True,
                                         maxnreg=65536 // (RESIDENT * PART_WARPS * 32), **options)
        return loss, stats, grad
    parts_kernel[(work,)](*arguments, PHASE=SUMS.value, **options)
    results_kernel[(pairs,)](reference, sign, loss, stats, partial, counters, pairs, parts, *numbers, **variant,
                             num_warps=PART_WARPS, **EXACT)
    if wants_grad:
        parts_kernel[(work,)](*arguments, PHASE=GRADIENT.value, **options)
    return loss, stats, grad


def why_not(device: torch.device) -> str | None:
    """None when this backend works for tensors on this device, else the reason."""
    if triton.knobs.runtime.interpret:
        return None  # on any device, slowly: for tests
    if device.type != "cuda":
        return f"triton has no kernels for {device.type} tensors"
    return gpu_lacks(device.index)
