"""`sign`: the caller's decision in place of the flipper's, in every backend that runs here."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from fused_parity import DTYPES, FLIPPERS, SHAPES, assert_callers_sign, assert_within_twice, make, scored

from seppo_fast.ops import available_backends, native, per_sample_mse, seppo_loss

BACKENDS = [name for name, why in available_backends("cpu").items() if why == "available"]
builds = pytest.mark.skipif(native.why_not(torch.device("cpu")) is not None, reason=str(native.why_not(torch.device("cpu"))))
SIGNS = torch.tensor([1.0, 0.0, -1.0])


def written_out(model, ref, target, sign):
    """Eq. 8 in the convention of App. B.2, with any signs."""
    mse, ref_mse = ((x - target).square().flatten(1).mean(1) for x in (model, ref))
    (m_w, m_l), (q_w, q_l) = mse.chunk(2), ref_mse.chunk(2)
    return -F.logsigmoid(-0.5 * 2000.0 * (m_w - q_w + sign * (m_l - q_l)))


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_written_out(backend, known):
    """Also where no sign is what the flipper would have it."""
    for shape, shared in itertools.product(((6, 3, 5, 7), (6, 9)), (False, True)):
        model, ref, target = make(shape, shared=shared)
        whole = torch.cat([target, target]) if shared else target
        exact = model.double().requires_grad_()
        model.requires_grad_()
        reference = {"ref_mse": per_sample_mse(ref, target)} if known else {"ref_pred": ref}
        for sign in (SIGNS, SIGNS.flip(0), torch.ones(6)[::2]):  # the last one is not dense
            want = written_out(exact, ref.double(), whole.double(), sign)
            got, stats = seppo_loss(model, target=target, sign=sign, reduction="none", backend=backend, return_stats=True,
                                    **reference)
            assert torch.equal(stats.sign, sign) and stats.aaf_rate == (sign == -1).float().mean()
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
            grads = [torch.autograd.grad(loss.sum(), x)[0].double() for loss, x in ((got, model), (want, exact))]
            torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5 * grads[1].abs().max().item())


@builds
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_against_fp64(dtype):
    for shape, form in itertools.product(("sd15", "odd", "one", "two_groups", "odd_large"), (list, scored)):
        inputs = form(make(SHAPES[shape], dtype))
        sign = SIGNS.repeat(2)[:len(inputs[0]) // 2]
        assert_within_twice(inputs, "native", sign=sign, flipper="none", upstream=0.37)


@pytest.mark.parametrize("form", [list, scored])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_flippers_own_signs_change_no_bit(backend, form):
    for shape, dtype, flipper in itertools.product(("odd", "seven", "odd_large"), DTYPES, FLIPPERS):
        assert_callers_sign(form(make(SHAPES[shape], dtype)), backend, flipper)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sign_that_is_not_finite_is_not_hidden(backend):
    model, ref, target = make((6, 50))
    model.requires_grad_()
    losses = seppo_loss(model, ref, target, sign=torch.tensor([1.0, torch.nan, -1.0]), reduction="none", backend=backend)
    grad, = torch.autograd.grad(losses.sum(), model)
    assert losses.isfinite().tolist() == [True, False, True]
    assert grad.isfinite().all(dim=1).tolist() == [True, False, True] * 2


def test_gradcheck():
    model, ref, target = (x.double() for x in make((6, 3, 2), near=0.3))
    model.requires_grad_()
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(lambda m, r=reduction: seppo_loss(m, ref, target, 3.0, sign=SIGNS, reduction=r), model)


@builds
@pytest.mark.slow
def test_opcheck():
    model, ref, target = make((6, 4, 5))
    torch.library.opcheck(torch.ops.seppo_fast.pair_loss.default, (model, ref, target, 2000.0, 0, 0.3, 0.5, 1.0, True, SIGNS))


@builds
@pytest.mark.parametrize("sign", [SIGNS[:2], SIGNS.double(), SIGNS[:, None], torch.ones(6)[::2]])
def test_the_operator_refuses_what_it_would_misread(sign):
    model, ref, target = make((6, 4, 5))
    with pytest.raises(RuntimeError, match=r"sign must be float32|expected float32"):
        torch.ops.seppo_fast.pair_loss(model, ref, target, 2000.0, 0, 0.3, 0.5, 1.0, True, sign)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_in_one_graph(backend):
    torch._dynamo.reset()
    compiled = torch.compile(seppo_loss, fullgraph=True, backend="aot_eager")
    for pairs in (3, 2):
        model, ref, target = make((2 * pairs, 4, 8, 8))
        model.requires_grad_()
        got, want = (call(model, ref, target, sign=SIGNS[:pairs], backend=backend) for call in (compiled, seppo_loss))
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(loss, model)[0] for loss in (got, want)))
