"""The device side of the fused loss in Triton; triton_kernel.py launches the kernels and explains when each runs."""

import triton
import triton.language as tl

TOGETHER, SUMS, GRADIENT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # what a launch of parts_kernel does
LANES = tl.constexpr(256)  # how many of the programs' results are read at a time


@triton.jit
def _load(pointer, lanes, left, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(pointer + lanes).to(tl.float32)
    return tl.load(pointer + lanes, mask=lanes < left, other=0.0).to(tl.float32)


@triton.jit
def _by_thread(x, WIDTH: tl.constexpr):
    """Sums of WIDTH neighbours, which one thread holds: threads exchange nothing until the end."""
    return tl.sum(tl.reshape(x, (x.shape[0] // WIDTH, WIDTH)), axis=1)


@triton.jit
def _half(policy, reference, target, left, SCORED: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
          WIDTH: tl.constexpr, CHUNKS: tl.constexpr):
    """By thread: the difference of the squared errors without cancellation (exactly 0 when p == r), the policy's squared error
    and the reference's; and the policy's errors, a tensor a chunk. Of the CHUNKS * BLOCK elements, the first `left` are real.
    A SCORED reference is not read: the difference and the reference's error are 0."""
    difference = tl.zeros((BLOCK // WIDTH,), tl.float32)
    model, ref = difference, difference
    errors = ()
    lanes = tl.arange(0, BLOCK)
    for chunk in tl.static_range(CHUNKS):
        t = _load(target + chunk * BLOCK, lanes, left - chunk * BLOCK, WHOLE)
        p = _load(policy + chunk * BLOCK, lanes, left - chunk * BLOCK, WHOLE)
        e = p - t
        model += _by_thread(e * e, WIDTH)
        if not SCORED:
            r = _load(reference + chunk * BLOCK, lanes, left - chunk * BLOCK, WHOLE)
            f = r - t
            difference += _by_thread((p - r) * (e + f), WIDTH)
            ref += _by_thread(f * f, WIDTH)
        errors = errors + (e,)  # type: ignore[assignment]  # Triton unrolls this loop
        tl.debug_barrier()  # or all loads are issued first, and their results do not fit into the registers
    return difference, model, ref, errors


@triton.jit
def _errors(policy, target, left, WHOLE: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    errors = ()
    lanes = tl.arange(0, BLOCK)
    for chunk in tl.static_range(CHUNKS):
        p = _load(policy + chunk * BLOCK, lanes, left - chunk * BLOCK, WHOLE)
        t = _load(target + chunk * BLOCK, lanes, left - chunk * BLOCK, WHOLE)
        errors = errors + (p - t,)  # type: ignore[assignment]
    return errors


@triton.jit
def _put_gradient(grad, errors, coefficient, left, WHOLE: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    for chunk in tl.static_range(CHUNKS):
        values = (coefficient * errors[chunk]).to(grad.dtype.element_ty)
        if WHOLE:
            tl.store(grad + chunk * BLOCK + lanes, values)
        else:
            tl.store(grad + chunk * BLOCK + lanes, values, mask=lanes < left - chunk * BLOCK)


@triton.jit
def _add(a, b, c, d, e, f, g, h, i, j, k, m):
    """Six sums in one reduction. One by one, the compiler would delay some of them and keep their inputs in registers."""
    return a + g, b + h, c + i, d + j, e + k, f + m


@triton.jit
def _add2(a, b, c, d):
    return a + c, b + d


@triton.jit
def _add3(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _excess(model_mse, ref_mse):
    """`excess` of pair_loss.h: the difference, NaN where the reference's error is infinite."""
    return model_mse - (ref_mse + (ref_mse - ref_mse))


@triton.jit
def _pair_loss(signs, pair, winner, loser, model_mse, steepness, strength, sft_weight, sft_strength, FLIPPER: tl.constexpr,
               SFT: tl.constexpr):
    """Loss, sign, logit and the gradient's two coefficients from the differences and, for SFT, the winner's error; `pair_loss` of
    pair_loss.h. `signs` is None where the flipper decides."""
    if signs is None:
        sign = tl.where(winner > 0, 1.0 if FLIPPER == 0 else 0.0 if FLIPPER == 1 else -1.0, -1.0)
    else:
        sign = tl.load(signs + pair)
    logit = steepness * (winner + sign * loser)
    e = tl.exp(-tl.abs(logit))
    u = 1.0 + e
    # log1p(e): dividing by the rounded difference corrects the rounding of 1 + e.
    tail = tl.where(u == 1.0, e, tl.log(u) * tl.math.div_rn(e, tl.where(u == 1.0, 1.0, u - 1.0)))
    loss = tl.where(logit < 0, -logit, 0.0) + tail
    slope = tl.math.div_rn(tl.where(logit < 0, 1.0, e), u)
    # An infinite reference error gives a loss of 0, as of a pair learnt perfectly: NaN - NaN and Inf - Inf make it NaN.
    coefficient = strength * slope + (logit - logit)
    c_w = coefficient
    if SFT:
        loss += sft_weight * model_mse
        # The MSE may overflow where the errors do not: an infinite loss has no finite gradient.
        c_w += sft_strength + (model_mse - model_mse)
    return loss, sign, logit, c_w, sign * coefficient


@triton.jit
def _put_results(pair, pairs, own, sign, logit, m_w, m_l, q_w, q_l, weight, loss, stats):
    """Store a pair's results, and the totals, too, if it is the only pair."""
    tl.store(stats + pair, m_w)
    tl.store(stats + pairs + pair, m_l)
    at = stats + 2 * pairs
    tl.store(at + pair, q_w)
    tl.store(at + pairs + pair, q_l)
    at += 2 * pairs
    tl.store(at + pair, sign)
    tl.store(at + pairs + pair, logit)
    at += 2 * pairs
    tl.store(at + pair, own)
    if pairs == 1:
        tl.store(loss, weight * own)
        tl.store(at + 1, (logit > 0).to(tl.float32))
        tl.store(at + 2, (sign == -1).to(tl.float32))


@triton.jit
def _total(counter, pairs, weight, loss, stats):
    """The last program that arrives adds up the results of all pairs and sets the counter back to 0.

    The thread that takes a program's ticket also stored its results (and before a barrier of all its threads), so the ticket's
    release covers them. Its acquire, and the barrier with which Triton gives the ticket to the other threads, cover their loads.
    """
    if pairs > 1:
        tl.debug_barrier()
        if tl.atomic_add(counter, 1, sem="acq_rel") == tl.num_programs(0) - 1:
            tl.store(counter, 0)
            sign = stats + 4 * pairs.to(tl.int64)
            total = tl.zeros((LANES,), tl.float64)
            right = tl.zeros((LANES,), tl.float64)
            kept = tl.zeros((LANES,), tl.float64)
            for first in range(0, pairs, LANES):
                at = first + tl.arange(0, LANES)
                mask = at < pairs
                kept += (tl.load(sign + at, mask=mask, other=0.0, cache_modifier=".cg") == -1).to(tl.float64)
                right += (tl.load(sign + pairs + at, mask=mask, other=0.0, cache_modifier=".cg") > 0).to(tl.float64)
                total += tl.load(sign + 2 * pairs + at, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float64)
            total, right, kept = tl.reduce((total, right, kept), 0, _add3)
            count = pairs.to(tl.float32)
            tl.store(loss, (weight * total).to(tl.float32))
            tl.store(sign + 3 * pairs, tl.math.div_rn(right.to(tl.float32), count))
            tl.store(sign + 3 * pairs + 1, tl.math.div_rn(kept.to(tl.float32), count))


@triton.jit(do_not_specialize=["pairs"])
def pair_kernel(policy, reference, target, signs, grad, loss, stats, counters, pairs, elements, steepness, strength, sft_weight,
                sft_strength, inverse, weight, FLIPPER: tl.constexpr, SFT: tl.constexpr, SCORED: tl.constexpr, SHARED: tl.constexpr,
                WANTS_GRAD: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr):
    """One program for each pair."""
    pair = tl.program_id(0).to(tl.int64)
    winner = pair * elements
    loser = (pair + pairs) * elements
    shared = winner if SHARED else loser
    d_w, m_w, q_w, e_w = _half(policy + winner, reference + winner, target + winner, elements, SCORED, WHOLE, BLOCK, WIDTH, CHUNKS)
    d_l, m_l, q_l, e_l = _half(policy + loser, reference + loser, target + shared, elements, SCORED, WHOLE, BLOCK, WIDTH, CHUNKS)
    if SCORED:
        m_w, m_l = tl.reduce((m_w, m_l), 0, _add2)
        q_w, q_l = tl.load(reference + pair), tl.load(reference + pairs + pair)
        m_w, m_l = m_w * inverse, m_l * inverse
        d_w, d_l = _excess(m_w, q_w), _excess(m_l, q_l)
    else:
        d_w, d_l, m_w, m_l, q_w, q_l = tl.reduce((d_w, d_l, m_w, m_l, q_w, q_l), 0, _add)
        m_w, m_l, q_w, q_l = m_w * inverse, m_l * inverse, q_w * inverse, q_l * inverse
    own, sign, logit, c_w, c_l = _pair_loss(signs, pair, d_w, d_l, m_w, steepness, strength, sft_weight, sft_strength, FLIPPER,
                                            SFT)
    if WANTS_GRAD:
        _put_gradient(grad + winner, e_w, c_w, elements, WHOLE, BLOCK, CHUNKS)
        _put_gradient(grad + loser, e_l, c_l, elements, WHOLE, BLOCK, CHUNKS)
    _put_results(pair, pairs, own, sign, logit, m_w, m_l, q_w, q_l, weight, loss, stats)
    _total(counters, pairs, weight, loss, stats)


@triton.jit
def _meet(counter, first, parts):
    """Wait until `parts` programs are here, one of them with `first`. What each stored before, all may load afterwards.

    The arrivals add up to 2**31, which changes only the counter's sign bit. As in the grid barrier of cooperative groups,
    nothing has to be reset, and the next launch may have another number of parts.
    """
    tl.debug_barrier()
    before = tl.atomic_add(counter, tl.where(first, 2147483647 - (parts - 2), 1), sem="acq_rel")
    while (before ^ tl.atomic_add(counter, 0, sem="acquire")) >= 0:
        pass
    tl.debug_barrier()


@triton.jit
def _two_totals(partial, parts):
    """Two of a pair's sums over its parts, in fp64 because the largest pairs have many; most pairs give a lane one part or none."""
    one = tl.zeros((LANES,), tl.float64)
    two = tl.zeros((LANES,), tl.float64)
    for first in range(0, parts, LANES):
        part = first + tl.arange(0, LANES)
        at = partial + part.to(tl.int64) * 8
        one += tl.load(at, mask=part < parts, other=0.0, cache_modifier=".cg").to(tl.float64)
        two += tl.load(at + 1, mask=part < parts, other=0.0, cache_modifier=".cg").to(tl.float64)
    return tl.reduce((one.to(tl.float32), two.to(tl.float32)), 0, _add2)


@triton.jit
def _differences(reference, sums, pair, pairs, parts, inverse, SFT: tl.constexpr, SCORED: tl.constexpr):
    """What `_pair_loss` wants of a pair in parts: the differences, of sums, or of means where the reference is SCORED, and the
    winner's error, which is 0 where nobody needs it."""
    if SCORED:
        m_w, m_l, q_w, q_l = _means(reference, sums, pair, pairs, parts, inverse, SCORED)
        d_w, d_l = _excess(m_w, q_w), _excess(m_l, q_l)
    else:
        d_w, d_l = _two_totals(sums, parts)
        m_w = 0.0
        if SFT:
            m_w, m_l = _two_totals(sums + 2, parts)
            m_w = m_w * inverse
    return d_w, d_l, m_w


@triton.jit
def _means(reference, sums, pair, pairs, parts, inverse, SCORED: tl.constexpr):
    m_w, m_l = _two_totals(sums + 2, parts)
    if SCORED:
        q_w, q_l = tl.load(reference + pair), tl.load(reference + pairs + pair)
    else:
        q_w, q_l = _two_totals(sums + 4, parts)
        q_w, q_l = q_w * inverse, q_l * inverse
    return m_w * inverse, m_l * inverse, q_w, q_l


@triton.jit(do_not_specialize=["pairs", "parts"])
def parts_kernel(policy, reference, target, signs, grad, loss, stats, partial, counters, pairs, elements, parts, steepness,
                 strength, sft_weight, sft_strength, inverse, weight, PHASE: tl.constexpr, FLIPPER: tl.constexpr, SFT: tl.constexpr,
                 SCORED: tl.constexpr, SHARED: tl.constexpr, WANTS_GRAD: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
                 WIDTH: tl.constexpr, CHUNKS: tl.constexpr):
    """Programs share the parts of all pairs. `partial` is (pairs, parts, 8): six sums (the policy's two, if the reference is
    SCORED), and in a pair's first part its two coefficients.

    With TOGETHER, all programs are on the chip, there are at least as many as a pair has parts, and each goes through its parts
    in order. So no program waits for one that waits for a later pair, and the first unfinished pair always finishes.
    """
    # No hoisting of invariants: they would occupy registers, and none are free.
    for work in tl.range(tl.program_id(0), pairs * parts, tl.num_programs(0), disable_licm=True):
        pair = (work // parts).to(tl.int64)
        part = (work % parts).to(tl.int64)
        start = part * (BLOCK * CHUNKS)
        left = tl.minimum(elements - start, BLOCK * CHUNKS).to(tl.int32)
        winner = pair * elements + start
        loser = (pair + pairs) * elements + start
        shared = winner if SHARED else loser
        sums = partial + pair * parts * 8
        if PHASE == TOGETHER or PHASE == SUMS:
            d_w, m_w, q_w, e_w = _half(policy + winner, reference + winner, target + winner, left, SCORED, WHOLE, BLOCK, WIDTH,
                                       CHUNKS)
            d_l, m_l, q_l, e_l = _half(policy + loser, reference + loser, target + shared, left, SCORED, WHOLE, BLOCK, WIDTH,
                                       CHUNKS)
            at = sums + part * 8
            if SCORED:
                m_w, m_l = tl.reduce((m_w, m_l), 0, _add2)
            else:
                d_w, d_l, m_w, m_l, q_w, q_l = tl.reduce((d_w, d_l, m_w, m_l, q_w, q_l), 0, _add)
                tl.store(at, d_w)
                tl.store(at + 1, d_l)
                tl.store(at + 4, q_w)
                tl.store(at + 5, q_l)
            tl.store(at + 2, m_w)
            tl.store(at + 3, m_l)
        if PHASE == TOGETHER:
            _meet(counters + 1 + pair, part == 0, parts)
            d_w, d_l, mse = _differences(reference, sums, pair, pairs, parts, inverse, SFT, SCORED)
            own, sign, logit, c_w, c_l = _pair_loss(signs, pair, d_w, d_l, mse, steepness, strength, sft_weight, sft_strength,
                                                    FLIPPER, SFT)
        if PHASE == GRADIENT:
            c_w = tl.load(sums + 6)
            c_l = tl.load(sums + 7)
            e_w = _errors(policy + winner, target + winner, left, WHOLE, BLOCK, CHUNKS)
            e_l = _errors(policy + loser, target + shared, left, WHOLE, BLOCK, CHUNKS)
        if (PHASE == TOGETHER or PHASE == GRADIENT) and WANTS_GRAD:
            _put_gradient(grad + winner, e_w, c_w, left, WHOLE, BLOCK, CHUNKS)
            _put_gradient(grad + loser, e_l, c_l, left, WHOLE, BLOCK, CHUNKS)
        if PHASE == TOGETHER:
            if part == 0:
                policy_w, policy_l, ref_w, ref_l = _means(reference, sums, pair, pairs, parts, inverse, SCORED)
                _put_results(pair, pairs, own, sign, logit, policy_w, policy_l, ref_w, ref_l, weight, loss, stats)
    if PHASE == TOGETHER:
        _total(counters, pairs, weight, loss, stats)


@triton.jit(do_not_specialize=["pairs", "parts"])
def results_kernel(reference, signs, loss, stats, partial, counters, pairs, parts, steepness, strength, sft_weight, sft_strength,
                   inverse, weight, FLIPPER: tl.constexpr, SFT: tl.constexpr, SCORED: tl.constexpr):
    """One program for each pair, between parts_kernel's sums and its gradient."""
    pair = tl.program_id(0).to(tl.int64)
    sums = partial + pair * parts * 8
    d_w, d_l, mse = _differences(reference, sums, pair, pairs, parts, inverse, SFT, SCORED)
    own, sign, logit, c_w, c_l = _pair_loss(signs, pair, d_w, d_l, mse, steepness, strength, sft_weight, sft_strength, FLIPPER,
                                            SFT)
    tl.store(sums + 6, c_w)
    tl.store(sums + 7, c_l)
    m_w, m_l, q_w, q_l = _means(reference, sums, pair, pairs, parts, inverse, SCORED)
    _put_results(pair, pairs, own, sign, logit, m_w, m_l, q_w, q_l, weight, loss, stats)
    _total(counters, pairs, weight, loss, stats)
