"""seppo_loss against App. B.2 written down independently, in fp64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from fused_parity import assert_alone, assert_tie_of_errors, scored
from fused_parity import make as make_low

from seppo_fast.ops import SeppoStats, available_backends, per_sample_mse, seppo_loss

SHAPES = [(2, 1), (6, 7), (4, 4, 8, 8), (8, 3, 5, 7), (4, 4, 3, 6, 5)]
LOW = [torch.float16, torch.bfloat16, torch.float32]


def app_b2(model_pred, ref_pred, target, beta):
    """The pseudocode of App. B.2, line by line, in fp64; returns the mean loss and its quantities."""
    model_pred, ref_pred, target = model_pred.double(), ref_pred.double(), target.double()
    dims = list(range(1, model_pred.dim()))  # the paper's [1, 2, 3]
    model_losses = (model_pred - target).pow(2).mean(dim=dims)
    model_losses_w, model_losses_l = model_losses.chunk(2)
    with torch.no_grad():
        ref_losses = (ref_pred - target).pow(2).mean(dim=dims)
        ref_losses_w, ref_losses_l = ref_losses.chunk(2)
        pos_losses_w = model_losses_w - ref_losses_w
        sign = torch.where(pos_losses_w > 0, torch.tensor(1.0).double(), torch.tensor(-1.0).double())
    model_diff = model_losses_w + sign * model_losses_l
    ref_diff = ref_losses_w + sign * ref_losses_l
    scale_term = -0.5 * beta
    inside_term = scale_term * (model_diff - ref_diff)
    implicit_acc = (inside_term > 0).sum().double() / inside_term.size(0)
    loss = -1 * F.logsigmoid(inside_term).mean()
    return loss, model_losses, ref_losses, sign, inside_term, implicit_acc


def make(shape, seed=0, near=0.02, dtype=torch.float64, shared=False):
    """Policy, reference and target where the policy has moved a little from the reference, as in training."""
    g = torch.Generator().manual_seed(seed)
    target = torch.randn((shape[0] // 2, *shape[1:]) if shared else shape, generator=g, dtype=torch.float64)
    whole = torch.cat([target, target]) if shared else target
    ref = whole + 0.3 * torch.randn(shape, generator=g, dtype=torch.float64)
    model = ref + near * torch.randn(shape, generator=g, dtype=torch.float64)
    return model.to(dtype).requires_grad_(), ref.to(dtype), target.to(dtype)


@pytest.mark.parametrize("backend", [name for name, why in available_backends("cpu").items() if why == "available"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("grad_scale", [None, 0.5])
def test_a_bad_pair_stays_alone_in_every_backend(backend, reduction, grad_scale):
    for value, tensor, where in itertools.product((torch.nan, torch.inf), (0, 2), (1, 5)):
        if reduction == "none" or grad_scale is not None:
            assert_alone(backend, "cpu", value, tensor, where, reduction=reduction, grad_scale=grad_scale)
            assert_alone(backend, "cpu", value, tensor // 2, where, form=scored, reduction=reduction, grad_scale=grad_scale)


@pytest.mark.parametrize("backend", [name for name, why in available_backends("cpu").items() if why == "available"])
def test_of_a_video_no_axis_is_left_unreduced(backend):
    """Latents (2B, C, F, h, w): an error anywhere in a sample is in its one number, whatever its channel, frame, row or column."""
    pairs, sample = 2, (2, 3, 4, 5)
    target = torch.zeros(2 * pairs, *sample)
    reference = torch.zeros_like(target)
    for place in itertools.product(*(range(0, length, length - 1) for length in sample)):
        model = torch.zeros_like(target)
        model[(1, *place)] = 6.0  # pair 1's winner
        losses, stats = seppo_loss(model.requires_grad_(), reference, target, beta=1.0, reduction="none", return_stats=True,
                                   backend=backend)
        assert losses.shape == stats.sign.shape == stats.logits.shape == (pairs,) and stats.model_mse.shape == (2 * pairs,)
        torch.testing.assert_close(stats.model_mse, torch.tensor([0.0, 36 / 120, 0.0, 0.0]))
        losses.sum().backward()
        assert model.grad.nonzero().tolist() == [[1, *place]]
    assert per_sample_mse(model.detach(), target, backend=backend).shape == (2 * pairs,)


@pytest.mark.parametrize("beta", [1.0, 2000.0, 5000.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_app_b2_in_fp64(shape, beta):
    signs = set()
    for seed in range(6):
        model, ref, target = make(shape, seed)
        loss, stats = seppo_loss(model, ref, target, beta, return_stats=True)
        want, model_mse, ref_mse, sign, inside, accuracy = app_b2(model, ref, target, beta)
        close = dict(rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(loss, want, **close)
        torch.testing.assert_close(stats.model_mse, model_mse.detach(), **close)
        torch.testing.assert_close(stats.ref_mse, ref_mse, **close)
        torch.testing.assert_close(stats.logits, inside.detach(), **close)
        assert torch.equal(stats.sign, sign)
        assert stats.implicit_acc == accuracy
        assert stats.aaf_rate == (sign == -1).double().mean()
        got, = torch.autograd.grad(loss, model)
        expected, = torch.autograd.grad(want, model)
        torch.testing.assert_close(got, expected, **close)
        signs |= set(sign.tolist())
    assert signs == {1.0, -1.0}, "the seeds must cover both cases of the flipper"


@pytest.mark.parametrize("shape", SHAPES)
def test_app_b2_from_the_references_errors(shape):
    for seed in range(4):
        model, ref, target = make(shape, seed)
        want, model_mse, ref_mse, sign, inside, accuracy = app_b2(model, ref, target, 2000.0)
        loss, stats = seppo_loss(model, ref_mse=ref_mse, target=target, return_stats=True)
        close = dict(rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(loss, want, **close)
        torch.testing.assert_close(stats.model_mse, model_mse.detach(), **close)
        torch.testing.assert_close(stats.logits, inside.detach(), **close)
        assert torch.equal(stats.sign, sign) and torch.equal(stats.ref_mse, ref_mse) and stats.implicit_acc == accuracy
        torch.testing.assert_close(*(torch.autograd.grad(x, model)[0] for x in (loss, want)), **close)
        torch.testing.assert_close(per_sample_mse(ref, target), ref_mse, **close)


@pytest.mark.parametrize("dtype", LOW)
def test_equal_errors_are_a_tie(dtype):
    for shape in ((4, 4, 8, 8), (6, 7), (10, 3, 17, 29), (4, 4, 3, 6, 5)):
        inputs = make_low(shape, dtype)
        assert_tie_of_errors(inputs, "reference")
        half = inputs[2][:shape[0] // 2]
        assert torch.equal(per_sample_mse(inputs[0], half, backend="reference"),
                           per_sample_mse(inputs[0], torch.cat([half, half]), backend="reference"))
        if len(shape) == 4:
            last = [x.to(memory_format=torch.channels_last) for x in inputs]
            assert_tie_of_errors(last, "reference")
            assert torch.equal(per_sample_mse(last[0], last[2], backend="reference"),
                               per_sample_mse(inputs[0], inputs[2], backend="reference"))


@pytest.mark.parametrize("model_dtype,ref_dtype", list(itertools.product(LOW, LOW)))
def test_any_mixture_of_dtypes_is_computed_in_fp32(model_dtype, ref_dtype):
    model, ref, target = make((16, 4, 16, 16), near=0.05)
    model, ref, target = model.detach().to(model_dtype).requires_grad_(), ref.to(ref_dtype), target.to(ref_dtype)
    loss, stats = seppo_loss(model, ref, target, 5000.0, return_stats=True)
    want, model_mse, ref_mse, sign, inside, _ = app_b2(model, ref, target, 5000.0)  # of the rounded inputs
    assert loss.dtype == torch.float32 and all(s.dtype == torch.float32 for s in stats)
    torch.testing.assert_close(loss.double(), want, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(stats.logits.double(), inside.detach(), rtol=2e-6, atol=2e-5)
    torch.testing.assert_close(stats.model_mse.double(), model_mse.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.ref_mse.double(), ref_mse, rtol=1e-6, atol=0)
    assert torch.equal(stats.sign.double(), sign)
    loss.backward()
    assert model.grad.dtype == model_dtype
    expected, = torch.autograd.grad(want, model)
    torch.testing.assert_close(model.grad.double(), expected.double(),
                               rtol=2 * torch.finfo(model_dtype).eps, atol=torch.finfo(torch.float16).tiny / 8)


def test_gradient_goes_to_the_policy_alone():
    model, ref, target = make((4, 4, 8, 8))
    ref.requires_grad_()
    target.requires_grad_()
    loss, stats = seppo_loss(model, ref, target, return_stats=True)
    loss.backward()
    assert model.grad is not None and ref.grad is None and target.grad is None
    assert not any(s.requires_grad for s in stats)
    with torch.no_grad():
        assert not seppo_loss(model, ref, target).requires_grad


@pytest.mark.parametrize("flipper", ["aaf", "indicator", "none"])
def test_equal_weights_are_a_tie(flipper):
    model, ref, target = make((8, 4, 8, 8), dtype=torch.bfloat16, near=0)
    loss, stats = seppo_loss(model, ref, target, 5000.0, flipper=flipper, return_stats=True)
    assert torch.equal(stats.logits, torch.zeros(4))
    assert torch.equal(stats.sign, -torch.ones(4))
    assert stats.aaf_rate == 1 and stats.implicit_acc == 0
    torch.testing.assert_close(loss, torch.tensor(2.0).log())


@pytest.mark.parametrize("flipper,worse", [("aaf", 1.0), ("indicator", 0.0), ("none", -1.0)])
def test_flippers(flipper, worse):
    target = torch.zeros(3, 10)
    ref = torch.ones(6, 10)
    # On the winner: better than the reference, equal, worse. On the loser always worse, by 3.
    model = torch.tensor([0.5, 1.0, 2.0, 2.0, 2.0, 2.0])[:, None].expand(6, 10)
    losses, stats = seppo_loss(model, ref, target, 2.0, flipper=flipper, reduction="none", return_stats=True)
    assert stats.sign.tolist() == [-1.0, -1.0, worse]
    z = [-(0.25 - 1 - 3), -(0 - 3), -(3 + worse * 3)]
    torch.testing.assert_close(stats.logits, torch.tensor(z))
    torch.testing.assert_close(losses, -F.logsigmoid(torch.tensor(z)))
    torch.testing.assert_close(stats.aaf_rate, torch.tensor(1.0 if flipper == "none" else 2 / 3))
    torch.testing.assert_close(stats.implicit_acc, torch.tensor(sum(x > 0 for x in z) / 3))
    torch.testing.assert_close(stats.model_mse, torch.tensor([0.25, 1, 4, 4, 4, 4]))
    torch.testing.assert_close(stats.ref_mse, torch.ones(6))


def test_without_flipper_it_is_diffusion_dpo():
    model, ref, target = make((8, 4, 6, 6), near=0.1)
    m = (model - target).square().mean((1, 2, 3))
    r = (ref - target).square().mean((1, 2, 3))
    (mw, ml), (rw, rl) = m.chunk(2), r.chunk(2)
    dpo = -F.logsigmoid(-0.5 * 2000.0 * ((mw - ml) - (rw - rl))).mean()
    torch.testing.assert_close(seppo_loss(model, ref, target, 2000.0, flipper="none"), dpo)


@pytest.mark.parametrize("return_stats", [False, True])
def test_reductions(return_stats):
    model, ref, target = make((10, 5))

    def call(reduction):
        out = seppo_loss(model, ref, target, 50.0, reduction=reduction, return_stats=return_stats)
        return out[0] if return_stats else out

    each = call("none")
    assert each.shape == (5,)
    torch.testing.assert_close(call("sum"), each.sum())
    torch.testing.assert_close(call("mean"), each.mean())
    weights = torch.arange(5.0, dtype=torch.float64)
    got, = torch.autograd.grad(each, model, weights)
    pairs = [[i, i + 5] for i in range(5)]
    alone = [seppo_loss(model[pair], ref[pair], target[pair], 50.0) for pair in pairs]
    want, = torch.autograd.grad(sum(w * one for w, one in zip(weights, alone, strict=True)), model)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shape", [(2, 1), (6, 7), (4, 4, 8, 8), (4, 4, 3, 6, 5)])
def test_target_shared_by_both_halves(shape):
    model, ref, target = make(shape, shared=True, dtype=torch.float32)
    got, stats = seppo_loss(model, ref, target, return_stats=True)
    got_grad, = torch.autograd.grad(got, model)
    want, wanted = seppo_loss(model, ref, torch.cat([target, target]), return_stats=True)
    want_grad, = torch.autograd.grad(want, model)
    assert torch.equal(got, want) and torch.equal(got_grad, want_grad)
    assert all(torch.equal(a, b) for a, b in zip(stats, wanted, strict=True))


def test_layouts():
    model, ref, target = (x.detach() for x in make((4, 6, 8, 10)))
    want = seppo_loss(model, ref, target)
    channels_last = model.to(memory_format=torch.channels_last).requires_grad_()
    strided = torch.empty(4, 6, 10, 16, dtype=ref.dtype).transpose(2, 3)[:, :, ::2].copy_(ref)
    assert not strided.is_contiguous()
    expanded = seppo_loss(model, ref, target[:1].expand(4, -1, -1, -1))
    torch.testing.assert_close(expanded, seppo_loss(model, ref, target[:1].repeat(4, 1, 1, 1)))
    got = seppo_loss(channels_last, strided, target)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    got.backward()
    plain = model.clone().requires_grad_()
    seppo_loss(plain, ref, target).backward()
    torch.testing.assert_close(channels_last.grad, plain.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("flipper", ["aaf", "indicator", "none"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(flipper, reduction):
    model, ref, target = make((6, 3, 2), seed=3, near=0.3)
    sign = seppo_loss(model, ref, target, return_stats=True)[1].sign
    assert set(sign.tolist()) == {1.0, -1.0}
    options = dict(flipper=flipper, reduction=reduction)
    assert torch.autograd.gradcheck(lambda m: seppo_loss(m, ref, target, 3.0, **options), model)
    errors = per_sample_mse(ref, target)
    assert torch.autograd.gradcheck(lambda m: seppo_loss(m, ref_mse=errors, target=target, beta=3.0, **options), model)


@pytest.mark.parametrize("where", [0, 1, 3, 5])  # winners of pairs 0 and 1, losers of 0 and 2
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", [0, 1, 2])
def test_one_bad_pair_stays_alone(where, value, tensor):
    inputs = [x.detach() for x in make((6, 4, 5, 5), dtype=torch.float32)]
    good, good_stats = seppo_loss(inputs[0].requires_grad_(), *inputs[1:], reduction="none", return_stats=True)
    good_grad, = torch.autograd.grad(good.mean(), inputs[0])
    broken = [x.detach().clone() for x in inputs]
    broken[tensor][where, 1, 2, 3] = value
    broken[0].requires_grad_()
    losses, stats = seppo_loss(*broken, reduction="none", return_stats=True)
    grad, = torch.autograd.grad(losses.mean(), broken[0])
    bad = where % 3
    fine = [i for i in range(3) if i != bad]
    rows = [*fine, *(i + 3 for i in fine)]
    assert not (losses[bad].isfinite() and grad[[bad, bad + 3]].isfinite().all()), "it must not be hidden"
    assert torch.equal(losses[fine], good[fine]) and torch.equal(grad[rows], good_grad[rows])
    assert torch.equal(stats.logits[fine], good_stats.logits[fine])
    assert torch.equal(stats.sign[fine], good_stats.sign[fine])


@pytest.mark.parametrize("dtype", LOW)
def test_extremes_stay_finite(dtype):
    huge = 6e4 if dtype == torch.float16 else 1e9
    model = torch.tensor([huge, -huge, 0.0, 1.0])[:, None].expand(4, 50).to(dtype).clone().requires_grad_()
    ref = torch.tensor([0.0, 0.0, huge, huge])[:, None].expand(4, 50).to(dtype)
    loss, stats = seppo_loss(model, ref, torch.zeros(2, 50, dtype=dtype), 1e6, reduction="none", return_stats=True)
    assert loss.isfinite().all() and stats.logits.isfinite().all()
    loss.sum().mul(1e-12 if dtype != torch.float16 else 1e-15).backward()
    assert model.grad.isfinite().all()


def test_large_logits_saturate_like_the_logistic():
    model = torch.tensor([[0.0], [9.0]], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([[9.0], [0.0]], dtype=torch.float64)
    target = torch.zeros(2, 1, dtype=torch.float64)
    won = seppo_loss(model, ref, target, 5000.0)
    assert won == 0 and torch.autograd.grad(won, model)[0].abs().max() == 0
    lost = seppo_loss(model, ref, target.fill_(9.0), 5000.0, flipper="none")
    torch.testing.assert_close(lost, torch.tensor(2500.0 * 162, dtype=torch.float64))


def test_autocast_changes_nothing():
    model, ref, target = make((6, 4, 8, 8), dtype=torch.bfloat16)
    plain = seppo_loss(model, ref, target, return_stats=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = seppo_loss(model, ref, target, return_stats=True)
    assert cast[0].dtype == torch.float32 and torch.equal(plain[0], cast[0])
    assert all(torch.equal(a, b) for a, b in zip(plain[1], cast[1], strict=True))


def test_it_never_reads_a_value():
    """On the meta device any `.item()`, `if tensor` or copy to the host raises: so there is no synchronisation."""
    model, ref = (torch.empty(6, 4, 8, 8, device="meta", dtype=torch.bfloat16) for _ in range(2))
    target = torch.empty(3, 4, 8, 8, device="meta")
    model.requires_grad_()
    loss, stats = seppo_loss(model, ref, target, return_stats=True)
    loss.backward()
    assert loss.device.type == model.grad.device.type == "meta" and all(s.device.type == "meta" for s in stats)
    with pytest.raises(RuntimeError):
        loss.item()
    seppo_loss(model, ref_mse=per_sample_mse(ref, target), target=target, return_stats=True)[0].backward()


@pytest.mark.slow
@pytest.mark.parametrize("flipper", ["aaf", "indicator", "none"])
def test_compiles_in_one_graph(flipper):
    torch._dynamo.reset()
    compiled = torch.compile(seppo_loss, fullgraph=True, backend="aot_eager")
    for pairs, beta in [(2, 2000.0), (3, 2000.0), (5, 500.0)]:
        model, ref, target = make((2 * pairs, 4, 8, 8), dtype=torch.float32)
        got, stats = compiled(model, ref, target, beta, flipper=flipper, return_stats=True)
        want, wanted = seppo_loss(model, ref, target, beta, flipper=flipper, return_stats=True)
        torch.testing.assert_close(got, want)
        assert isinstance(stats, SeppoStats)
        for a, b in zip(stats, wanted, strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(torch.autograd.grad(got, model), torch.autograd.grad(want, model))


@pytest.mark.slow
def test_compiles_with_inductor():
    torch._dynamo.reset()
    model, ref, target = make((4, 4, 8, 8), dtype=torch.bfloat16)
    compiled = torch.compile(seppo_loss, fullgraph=True)
    got, want = compiled(model, ref, target), seppo_loss(model, ref, target)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, model), torch.autograd.grad(want, model), rtol=1e-2, atol=1e-6)


def test_repeatable_and_differentiable_twice_over():
    model, ref, target = make((8, 4, 8, 8), dtype=torch.bfloat16)
    loss = seppo_loss(model, ref, target)
    first, = torch.autograd.grad(loss, model, retain_graph=True)
    second, = torch.autograd.grad(loss, model)
    again = seppo_loss(model, ref, target)
    assert torch.equal(first, second) and torch.equal(loss, again)


def test_inputs_are_left_alone():
    inputs = make((6, 4, 8, 8), dtype=torch.float32)
    copies = [x.detach().clone() for x in inputs]
    seppo_loss(*inputs, return_stats=True)[0].backward()
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


def test_errors_have_no_gradient_and_take_any_stride():
    model, errors, target = scored(make_low((4, 6)))
    table = torch.stack([errors, errors + 1], dim=1).requires_grad_()
    loss, stats = seppo_loss(model.requires_grad_(), ref_mse=table[:, 0], target=target, return_stats=True)
    loss.backward()
    assert table.grad is None and not stats.ref_mse.requires_grad and torch.equal(stats.ref_mse, errors)
    assert torch.equal(loss, seppo_loss(model, ref_mse=errors, target=target))


def test_backends():
    backends = available_backends()
    assert list(backends)[-1] == "reference" and backends["reference"] == "available"
    model, ref, target = make((4, 6))
    want = seppo_loss(model, ref, target)
    for name, state in backends.items():
        if state == "available":
            torch.testing.assert_close(seppo_loss(model, ref, target, backend=name), want)
    backends.clear()
    assert available_backends(), "a caller must not be able to change it"
