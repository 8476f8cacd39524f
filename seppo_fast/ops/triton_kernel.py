"""The fused loss in Triton, for GPUs where nobody built csrc/. Same maths as csrc/pair_loss.h, same outputs.

A pair of up to 16384 elements a half (SD-1.5) is one program of one kernel: what the gradient needs stays in registers
while the sums are made, so each input is read once. A larger pair is two kernels, partial sums and then gradient, and the
second reads policy and target again. Nothing is tuned by timing: ranks that chose differently would add up differently.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ONE_PROGRAM = 16384  # the largest sample whose pair one program holds
# Elements of a half at a time, by bytes of a policy element, for 16 bytes a thread: 512 threads with 128 registers each for
# fp32, 1024 with 64 for the rest. Compiled for sm_80 and sm_90 neither spills; the other way round both do.
CHUNK = {4: 2048, 2: 8192}
SLICE = 4096  # the same, for the 256 threads of the two kernels
MOST_PARTS = 1024  # of a large sample: every program of the second kernel adds all of them up


@triton.jit
def _load(pointer, offsets, mask):
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _by_thread(x, WIDTH: tl.constexpr):
    """Sums of WIDTH neighbours, which one thread holds: nothing is exchanged until the end."""
    return tl.sum(tl.reshape(x, (x.shape[0] // WIDTH, WIDTH)), axis=1)


@triton.jit
def _sums(p, r, t, WIDTH: tl.constexpr):
    """Difference of the squared errors without cancellation (exactly 0 when p == r), policy's error, reference's."""
    e = p - t
    f = r - t
    return _by_thread((p - r) * (e + f), WIDTH), _by_thread(e * e, WIDTH), _by_thread(f * f, WIDTH)


@triton.jit
def _add(a, b, c, d, e, f, g, h, i, j, k, m):
    """Six sums in one reduction: made one by one, the compiler would put off some, and keep all that they need."""
    return a + g, b + h, c + i, d + j, e + k, f + m


@triton.jit
def _pair_loss(winner, loser, elements, beta, scale, FLIPPER: tl.constexpr):
    """Loss, sign, logit and the gradient's two coefficients from the sums of differences; `pair_loss` of pair_loss.h."""
    winner = tl.math.div_rn(winner, elements)
    loser = tl.math.div_rn(loser, elements)
    sign = tl.where(winner > 0, 1.0 if FLIPPER == 0 else 0.0 if FLIPPER == 1 else -1.0, -1.0)
    logit = -0.5 * beta * (winner + sign * loser)
    e = tl.exp(-tl.abs(logit))
    u = 1.0 + e
    # log1p(e): what 1 + e rounds off is made good by dividing by the rounded difference.
    tail = tl.where(u == 1.0, e, tl.log(u) * tl.math.div_rn(e, tl.where(u == 1.0, 1.0, u - 1.0)))
    loss = tl.where(logit < 0, -logit, 0.0) + tail
    slope = tl.math.div_rn(tl.where(logit < 0, 1.0, e), u)
    coefficient = scale * tl.math.div_rn(beta, elements) * slope
    return loss, sign, logit, coefficient, sign * coefficient


@triton.jit
def _store(pair, pairs, loss, sign, logit, model_w, model_l, ref_w, ref_l, elements, losses, model_mse, ref_mse, signs,
           logits):
    tl.store(losses + pair, loss)
    tl.store(signs + pair, sign)
    tl.store(logits + pair, logit)
    tl.store(model_mse + pair, tl.math.div_rn(model_w, elements))
    tl.store(model_mse + pair + pairs, tl.math.div_rn(model_l, elements))
    tl.store(ref_mse + pair, tl.math.div_rn(ref_w, elements))
    tl.store(ref_mse + pair + pairs, tl.math.div_rn(ref_l, elements))


@triton.jit
def pair_kernel(policy, reference, target, grad, losses, model_mse, ref_mse, signs, logits, pairs, elements, beta, scale,
                FLIPPER: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
                CHUNKS: tl.constexpr):
    """One program a pair, whose errors p - t stay in registers: CHUNKS * BLOCK elements of winner and loser, or fewer."""
    pair = tl.program_id(0).to(tl.int64)
    winner = pair * elements
    loser = (pair + pairs) * elements
    shared = winner if SHARED else loser
    d_w = tl.zeros((BLOCK // WIDTH,), tl.float32)
    d_l, m_w, m_l, q_w, q_l = d_w, d_w, d_w, d_w, d_w
    errors = ()
    for chunk in tl.static_range(CHUNKS):
        offsets = chunk * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < elements
        t = _load(target, winner + offsets, mask)
        p = _load(policy, winner + offsets, mask)
        d, m, q = _sums(p, _load(reference, winner + offsets, mask), t, WIDTH)
        d_w, m_w, q_w = d_w + d, m_w + m, q_w + q
        errors = errors + (p - t,)
        tl.debug_barrier()  # or all loads are issued first, and what they return does not fit the registers
    for chunk in tl.static_range(CHUNKS):
        offsets = chunk * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < elements
        t = _load(target, shared + offsets, mask)
        p = _load(policy, loser + offsets, mask)
        d, m, q = _sums(p, _load(reference, loser + offsets, mask), t, WIDTH)
        d_l, m_l, q_l = d_l + d, m_l + m, q_l + q
        errors = errors + (p - t,)
        tl.debug_barrier()
    count = elements.to(tl.float32)
    d_w, d_l, m_w, m_l, q_w, q_l = tl.reduce((d_w, d_l, m_w, m_l, q_w, q_l), 0, _add)
    loss, sign, logit, c_w, c_l = _pair_loss(d_w, d_l, count, beta, scale, FLIPPER)
    _store(pair, pairs, loss, sign, logit, m_w, m_l, q_w, q_l, count, losses, model_mse, ref_mse, signs, logits)
    for chunk in tl.static_range(CHUNKS):
        offsets = chunk * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < elements
        tl.store(grad + winner + offsets, (c_w * errors[chunk]).to(grad.dtype.element_ty), mask=mask)
        tl.store(grad + loser + offsets, (c_l * errors[CHUNKS + chunk]).to(grad.dtype.element_ty), mask=mask)


@triton.jit
def parts_kernel(policy, reference, target, partial, pairs, elements, parts, slices, SHARED: tl.constexpr,
                 BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """One program a part, `slices` blocks of a pair: its six sums into `partial` (6, pairs, parts)."""
    work = tl.program_id(0).to(tl.int64)
    pair = work // parts
    first = (work % parts) * slices * BLOCK
    winner = pair * elements
    loser = (pair + pairs) * elements
    shared = winner if SHARED else loser
    d_w = tl.zeros((BLOCK // WIDTH,), tl.float32)
    d_l, m_w, m_l, q_w, q_l = d_w, d_w, d_w, d_w, d_w
    for index in range(slices):
        offsets = first + index * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < elements
        p = _load(policy, winner + offsets, mask)
        d, m, q = _sums(p, _load(reference, winner + offsets, mask), _load(target, winner + offsets, mask), WIDTH)
        d_w, m_w, q_w = d_w + d, m_w + m, q_w + q
        p = _load(policy, loser + offsets, mask)
        d, m, q = _sums(p, _load(reference, loser + offsets, mask), _load(target, shared + offsets, mask), WIDTH)
        d_l, m_l, q_l = d_l + d, m_l + m, q_l + q
    step = pairs * parts
    tl.store(partial + work, tl.sum(d_w))
    tl.store(partial + work + step, tl.sum(d_l))
    tl.store(partial + work + 2 * step, tl.sum(m_w))
    tl.store(partial + work + 3 * step, tl.sum(m_l))
    tl.store(partial + work + 4 * step, tl.sum(q_w))
    tl.store(partial + work + 5 * step, tl.sum(q_l))


@triton.jit
def gradient_kernel(policy, target, grad, partial, losses, model_mse, ref_mse, signs, logits, pairs, elements, parts,
                    blocks, beta, scale, FLIPPER: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr,
                    PARTS: tl.constexpr):
    """One program for BLOCK elements of winner and loser; the first of a pair also writes the pair's results."""
    work = tl.program_id(0).to(tl.int64)
    pair = work // blocks
    block = work % blocks
    winner = pair * elements
    loser = (pair + pairs) * elements
    shared = winner if SHARED else loser
    step = pairs * parts
    part = tl.arange(0, PARTS)
    given = part < parts
    at = partial + pair * parts + part
    d_w = tl.sum(tl.load(at, mask=given, other=0.0))
    d_l = tl.sum(tl.load(at + step, mask=given, other=0.0))
    count = elements.to(tl.float32)
    loss, sign, logit, c_w, c_l = _pair_loss(d_w, d_l, count, beta, scale, FLIPPER)
    if block == 0:
        m_w = tl.sum(tl.load(at + 2 * step, mask=given, other=0.0))
        m_l = tl.sum(tl.load(at + 3 * step, mask=given, other=0.0))
        q_w = tl.sum(tl.load(at + 4 * step, mask=given, other=0.0))
        q_l = tl.sum(tl.load(at + 5 * step, mask=given, other=0.0))
        _store(pair, pairs, loss, sign, logit, m_w, m_l, q_w, q_l, count, losses, model_mse, ref_mse, signs, logits)
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < elements
    e = _load(policy, winner + offsets, mask) - _load(target, winner + offsets, mask)
    tl.store(grad + winner + offsets, (c_w * e).to(grad.dtype.element_ty), mask=mask)
    e = _load(policy, loser + offsets, mask) - _load(target, shared + offsets, mask)
    tl.store(grad + loser + offsets, (c_l * e).to(grad.dtype.element_ty), mask=mask)


def plan(elements: int, element_size: int) -> dict[str, int]:
    """The constants of the launch for samples of that many elements; a fixed table."""
    if elements <= ONE_PROGRAM:
        block = min(CHUNK[element_size], max(128, triton.next_power_of_2(elements)))
        width = 16 // element_size
        return dict(BLOCK=block, WIDTH=width, CHUNKS=-(-elements // block), num_warps=max(1, min(32, block // (32 * width))))
    slices = -(-elements // (SLICE * MOST_PARTS))
    parts = -(-elements // (SLICE * slices))
    return dict(BLOCK=SLICE, WIDTH=16 // element_size, slices=slices, parts=parts, PARTS=triton.next_power_of_2(parts),
                blocks=-(-elements // SLICE), num_warps=8)


def pair_loss(model_pred: Tensor, ref_pred: Tensor, target: Tensor, beta: float, flipper: int,
              scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """losses (B,), model_mse (2B,), ref_mse (2B,), sign (B,), logits (B,) and the gradient, all fp32 but the last."""
    if model_pred.is_cuda and model_pred.device.index != torch.cuda.current_device():
        with torch.cuda.device(model_pred.device):
            return pair_loss(model_pred, ref_pred, target, beta, flipper, scale)
    samples = model_pred.shape[0]
    pairs, elements = samples // 2, model_pred.numel() // samples
    shared = target.shape[0] != samples
    losses, sign, logits = (model_pred.new_empty(pairs, dtype=torch.float32) for _ in range(3))
    model_mse, ref_mse = (model_pred.new_empty(samples, dtype=torch.float32) for _ in range(2))
    grad = torch.empty_like(model_pred)
    how = plan(elements, model_pred.element_size())
    outputs = (losses, model_mse, ref_mse, sign, logits)
    if "CHUNKS" in how:
        pair_kernel[(pairs,)](model_pred, ref_pred, target, grad, *outputs, pairs, elements, beta, scale,
                              FLIPPER=flipper, SHARED=shared, **how)
        return *outputs, grad
    block, width, warps, parts, blocks = (how[key] for key in ("BLOCK", "WIDTH", "num_warps", "parts", "blocks"))
    partial = model_pred.new_empty(6 * pairs * parts, dtype=torch.float32)
    parts_kernel[(pairs * parts,)](model_pred, ref_pred, target, partial, pairs, elements, parts, how["slices"],
                                   SHARED=shared, BLOCK=block, WIDTH=width, num_warps=warps)
    gradient_kernel[(pairs * blocks,)](model_pred, target, grad, partial, *outputs, pairs, elements, parts, blocks, beta,
                                       scale, FLIPPER=flipper, SHARED=shared, BLOCK=block, PARTS=how["PARTS"],
                                       num_warps=warps)
    return *outputs, grad


def why_not(device_type: str) -> str | None:
    """None when this backend works for tensors of this device type, else the reason."""
    if triton.knobs.runtime.interpret:
        return None  # on any device, slowly: for tests
    if device_type != "cuda":
        return f"triton has no kernels for {device_type} tensors"
    if not torch.cuda.is_available():
        return "there is no GPU"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"it wants compute capability 8.0 or newer, this GPU has {'.'.join(map(str, torch.cuda.get_device_capability()))}"
    return None
