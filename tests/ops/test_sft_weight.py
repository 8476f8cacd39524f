"""`sft_weight`: that much of the winner's own mean squared error in each pair's loss, in every backend that runs here."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from fused_parity import (
    DTYPES,
    FLIPPERS,
    SHAPES,
    assert_only_the_winner_pays,
    assert_same_bits,
    assert_within_twice,
    make,
    run,
    scored,
)

from seppo_fast.ops import available_backends, native, per_sample_mse, seppo_loss

BACKENDS = [name for name, why in available_backends("cpu").items() if why == "available"]
builds = pytest.mark.skipif(native.why_not(torch.device("cpu")) is not None, reason=str(native.why_not(torch.device("cpu"))))


def written_out(model, ref, target, sft_weight, reduction):
    """Eq. 8 in the convention of App. B.2, and the winners' errors."""
    mse, ref_mse = ((x - target).square().flatten(1).mean(1) for x in (model, ref))
    (m_w, m_l), (q_w, q_l) = mse.chunk(2), ref_mse.chunk(2)
    sign = torch.where(m_w > q_w, 1.0, -1.0)
    losses = -F.logsigmoid(-0.5 * 2000.0 * (m_w - q_w + sign * (m_l - q_l))) + sft_weight * m_w
    return {"mean": losses.mean, "sum": losses.sum, "none": losses.clone}[reduction]()


@pytest.mark.parametrize("grad_scale", [None, 1 / 256])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_written_out(backend, reduction, grad_scale):
    for shape, shared, known in itertools.product(((6, 3, 5, 7), (4, 9), (2, 4, 3, 6, 5)), (False, True), (False, True)):
        model, ref, target = make(shape, shared=shared)
        whole = torch.cat([target, target]) if shared else target
        exact = model.double().requires_grad_()
        want = written_out(exact, ref.double(), whole.double(), 40.0, reduction)
        upstream = torch.full_like(want, grad_scale or 0.37)
        model.requires_grad_()
        reference = {"ref_mse": per_sample_mse(ref, target)} if known else {"ref_pred": ref}
        got = seppo_loss(model, target=target, sft_weight=40.0, reduction=reduction, grad_scale=grad_scale, backend=backend,
                         **reference)
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
        grads = [torch.autograd.grad(loss, x, upstream.to(loss.dtype))[0].double() for loss, x in ((got, model), (want, exact))]
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5 * grads[1].abs().max().item())


@builds
@pytest.mark.parametrize("flipper", FLIPPERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_against_fp64(dtype, flipper):
    for shape, form in itertools.product(("sd15", "odd", "one", "two_groups", "odd_large"), (list, scored)):
        inputs = form(make(SHAPES[shape], dtype, shared=shape == "odd" and form is list))
        for beta, sft_weight in ((1.0, 0.1), (2000.0, 300.0)):
            assert_within_twice(inputs, "native", beta=beta, sft_weight=sft_weight, flipper=flipper, upstream=0.37)


@pytest.mark.parametrize("form", [list, scored])
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_winner_pays(backend, form):
    for shape, dtype in itertools.product(("odd", "seven", "odd_large"), DTYPES):
        assert_only_the_winner_pays(form(make(SHAPES[shape], dtype)), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_of_0_changes_no_infinite_loss(backend):
    """0 times an infinite error would be NaN; and a negative scale leaves -0 where the slope is 0."""
    inputs = make((4, 50))
    inputs[0][0] *= 1e30
    plain, zero = (run(inputs, backend, reduction="none", **options) for options in ({}, {"sft_weight": 0.0}))
    assert plain["loss"][0] == torch.inf == zero["loss"][0]
    assert_same_bits({name: value.nan_to_num(7.0) for name, value in plain.items()},
                     {name: value.nan_to_num(7.0) for name, value in zero.items()})


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_error_that_overflows_is_not_hidden(backend):
    """Policy and reference are equal, so the logit is 0, but the squared error does not fit into fp32."""
    model = torch.tensor([[1e25, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]], requires_grad=True)
    losses = seppo_loss(model, model.detach(), torch.zeros(4, 2), sft_weight=0.5, reduction="none", grad_scale=0.25,
                        backend=backend)
    grad, = torch.autograd.grad(losses.sum(), model)
    assert losses[0] == torch.inf and losses[1].isfinite()
    assert not grad[0].isfinite().any() and grad[[1, 3]].isfinite().all()


def test_gradcheck():
    model, ref, target = (x.double() for x in make((6, 3, 2), near=0.3))
    model.requires_grad_()
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(lambda m, r=reduction: seppo_loss(m, ref, target, 3.0, sft_weight=2.0, reduction=r), model)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_in_one_graph(backend):
    torch._dynamo.reset()
    compiled = torch.compile(seppo_loss, fullgraph=True, backend="aot_eager")
    for pairs, sft_weight in ((2, 0.5), (3, 0.5), (3, 0.0)):
        model, ref, target = make((2 * pairs, 4, 8, 8))
        model.requires_grad_()
        got, want = (call(model, ref, target, sft_weight=sft_weight, backend=backend) for call in (compiled, seppo_loss))
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(loss, model)[0] for loss in (got, want)))
