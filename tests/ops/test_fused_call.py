"""How the fused backends behave under autograd, torch.compile, autocast and DDP."""

import pytest
import torch
from ops.on_ranks import make
from torch import nn

from seppo_fast.ops import fused, native, per_sample_mse, seppo_loss

pytestmark = pytest.mark.skipif(native.why_not(torch.device("cpu")) is not None, reason=str(native.why_not(torch.device("cpu"))))


def grads(outputs, model, *upstream, **options):
    return torch.autograd.grad(outputs, model, *upstream, **options)[0]


def test_retain_graph_and_double_use():
    model, ref, target = make()
    loss = seppo_loss(model, ref, target)
    first = grads(loss, model, retain_graph=True)
    kept = first.clone()
    first.fill_(torch.nan)  # what a caller does with its gradient is not seen by the next one
    second = grads(loss + 2 * loss, model)
    assert not torch.isnan(kept).any()
    torch.testing.assert_close(second, 3 * kept)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_grad_scale(dtype):
    model, ref, target = make(dtype=dtype)
    for reduction in ("mean", "sum", "none"):
        plain = seppo_loss(model, ref, target, reduction=reduction)
        upstream = torch.full_like(plain, 1 / 256)
        want = grads(plain, model, upstream)
        known = seppo_loss(model, ref, target, reduction=reduction, grad_scale=1 / 256)
        assert torch.equal(known, plain)
        got = grads(known, model, torch.full_like(plain, 1e30))  # is not looked at
        torch.testing.assert_close(got, want)
        slow = seppo_loss(model, ref, target, reduction=reduction, grad_scale=1 / 256, backend="reference")
        torch.testing.assert_close(grads(slow, model, torch.full_like(plain, 1e30)), got)


def test_backward_launches_nothing_where_the_upstream_gradient_is_known():
    model, ref, target = make()
    for options, upstream in (({"grad_scale": 0.25}, 0.5), ({}, 1.0)):
        loss = seppo_loss(model, ref, target, **options)
        upstream = torch.tensor(upstream)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            grads(loss, model, upstream)
        kernels = {event.key for event in profile.key_averages()} & {"aten::mul", "aten::copy_", "aten::clone",
                                                                    "seppo_fast::rescale"}
        assert not kernels


@pytest.mark.parametrize("scale", [2.0**-14, 1.0, 65536.0])
def test_fp16_gradients_keep_their_range_until_the_upstream_gradient_is_known(scale):
    """beta 1e6 over 50 elements would overflow, beta 1 over 4096 underflow, if the stored gradient were fp16."""
    for beta, shape in ((1e6, (4, 50)), (1.0, (4, 4096))):
        model, ref, target = make(shape, torch.float16)
        ref = model.detach()  # a tie: the slope is 1/2
        upstream = torch.tensor(scale * 1e-4 if beta > 1 else scale)
        got = grads(seppo_loss(model, ref, target, beta), model, upstream)
        want = grads(seppo_loss(model, ref, target, beta, backend="reference"), model, upstream)
        torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-7)


def test_there_is_no_second_derivative():
    model, ref, target = make()
    loss = seppo_loss(model, ref, target)
    first = grads(loss, model, create_graph=True)
    assert torch.equal(first, grads(seppo_loss(model, ref, target), model))
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        grads(first.square().sum(), model)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()
    plain = grads(seppo_loss(model, ref, target, backend="reference"), model, create_graph=True)
    assert grads(plain.square().sum(), model).isfinite().all()


def test_the_gradient_is_the_policys_alone():
    model, ref, target = make()
    ref.requires_grad_(), target.requires_grad_()
    seppo_loss(model, ref, target).backward()
    assert model.grad is not None and ref.grad is None and target.grad is None
    assert not seppo_loss(model.detach(), ref, target).requires_grad
    with torch.no_grad():
        assert not seppo_loss(model, ref, target).requires_grad
    stats = seppo_loss(model, ref, target, return_stats=True)[1]
    assert not any(value.requires_grad for value in stats)


def test_an_unknown_upstream_gradient_takes_no_second_tensor():
    """Where nobody can ask for the stored gradient again, it is rescaled where it is."""
    model, ref, target = make((4, 4, 32, 32))
    loss = seppo_loss(model, ref, target)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        got = grads(loss, model, torch.tensor(0.37))
    assert sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages()) < model.nbytes / 4
    loss = seppo_loss(model, ref, target)
    kept = grads(loss, model, torch.tensor(0.37), retain_graph=True)
    assert torch.equal(kept, got)
    kept.fill_(torch.nan)
    assert torch.equal(grads(loss, model, torch.tensor(0.37)), got)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("grad_scale", [None, 0.25])
def test_losses_may_be_changed_in_place(backend, grad_scale):
    model, ref, target = make()
    for reduction in ("none", "sum"):
        loss = seppo_loss(model, ref, target, reduction=reduction, backend=backend, grad_scale=grad_scale)
        want = grads(loss.sum(), model, retain_graph=True)
        loss /= 4
        torch.testing.assert_close(grads(loss.sum(), model), want if grad_scale else want / 4)


def test_no_gradient_is_made_that_nobody_wants():
    """Same loss and statistics, in memory that does not grow with the inputs."""
    model, ref, target = make((4, 4, 32, 32))
    want, stats = seppo_loss(model, ref, target, return_stats=True)
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        got, same = seppo_loss(model, ref, target, return_stats=True)
    assert torch.equal(got, want) and all(map(torch.equal, same, stats))
    assert sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages()) < model.nbytes / 4
    assert fused._pair_loss(model.detach(), ref, target, 2000.0, 0, 0.0, 1.0, 1.0, False)[2].shape == (0,)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shared", [False, True])
def test_opcheck(dtype, shared):
    model, ref, target = make(dtype=dtype)
    target = target[:2] if shared else target
    arguments = (model.detach(), ref, target, 2000.0, 0, 0.3, 0.5, 1.0, True)
    torch.library.opcheck(torch.ops.seppo_fast.pair_loss.default, arguments)
    torch.library.opcheck(torch.ops.seppo_fast.pair_loss.default, (*arguments[:-1], False))
    torch.library.opcheck(torch.ops.seppo_fast.rescale.default, (model.detach(), torch.tensor(0.5), 2.0))
    torch.library.opcheck(torch.ops.seppo_fast.rescale.default, (model.detach(), torch.tensor([0.5, 3.0]), 2.0))
    torch.library.opcheck(torch.ops.seppo_fast.rescale_.default, (model.detach(), torch.tensor([0.5, 3.0]), 2.0))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_references_errors(dtype):
    """Under opcheck, autograd and the compiler like its predictions."""
    model, ref, target = make(dtype=dtype)
    errors = per_sample_mse(ref, target)
    assert not errors.requires_grad and not per_sample_mse(model, target).requires_grad
    torch.library.opcheck(torch.ops.seppo_fast.pair_loss.default, (model.detach(), errors, target, 2000.0, 0, 0.3, 0.5, 1.0, True))
    given = torch.stack([errors, errors], dim=1).requires_grad_()[:, 0]  # a column of a table
    for options in ({}, {"reduction": "none"}, {"reduction": "sum", "grad_scale": 0.3}):
        loss = seppo_loss(model, ref_mse=given, target=target, **options)
        upstream = torch.full_like(loss, 0.3)
        want = grads(seppo_loss(model, ref, target, **options), model, upstream)
        first = grads(loss, model, upstream, retain_graph=True)
        torch.testing.assert_close(first, want, rtol=1e-4 if dtype is torch.float32 else 2e-3, atol=1e-5)
        assert torch.equal(grads(loss, model, upstream), first)
    torch._dynamo.reset()

    def step(model, errors, target):
        loss, stats = seppo_loss(1.0 * model, ref_mse=errors, target=target, return_stats=True)
        return 0.3 * loss, stats.logits, per_sample_mse(model, target)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for pairs in (1, 2, 5):
        model, ref, target = make((2 * pairs, 4, 8, 8), dtype, seed=pairs)
        arguments = model, per_sample_mse(ref, target), target
        got, want = compiled(*arguments), step(*arguments)
        assert all(map(torch.equal, got, want)) and torch.equal(grads(got[0], model), grads(want[0], model))


@pytest.mark.slow
@pytest.mark.parametrize(("reduction", "backend"), [("mean", "aot_eager"), ("none", "aot_eager"), ("mean", "inductor")])
def test_compiles_in_one_graph(reduction, backend):
    torch._dynamo.reset()

    def step(model, ref, target, weight):
        loss, stats = seppo_loss(model * weight, ref, target, reduction=reduction, return_stats=True)
        return (0.3 * loss).sum(), stats.logits

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for pairs in (1, 2, 5):
        model, ref, target = make((2 * pairs, 4, 8, 8), torch.bfloat16, seed=pairs)
        weight = torch.ones((), requires_grad=True)
        got, logits = compiled(model, ref, target, weight)
        want, wanted = step(model, ref, target, weight)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(logits, wanted)
        for a, b in zip(torch.autograd.grad(got, (model, weight)), torch.autograd.grad(want, (model, weight)), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-5)


def test_autocast_changes_nothing():
    model, ref, target = make(dtype=torch.bfloat16)
    plain = seppo_loss(model, ref, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = seppo_loss(model, ref, target)
        got = grads(cast, model)
    assert cast.dtype == torch.float32 and torch.equal(cast, plain) and torch.equal(got, grads(plain, model))


def test_the_launcher_of_other_devices_rescales_with_one_rounding():
    """The expression that CUDA tensors take, on CPU tensors, against the native kernel."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        grad = make(dtype=dtype)[0].detach().to(memory_format=torch.channels_last)
        for upstream in (torch.tensor(0.37), torch.tensor([0.37, -2.0])):
            native_result = torch.ops.seppo_fast.rescale(grad, upstream, 2.0)
            exact = (grad.double().unflatten(0, (2, 2)) * (2 * upstream.double()).view(1, -1, 1, 1, 1)).flatten(0, 1)
            torch.testing.assert_close(native_result.double(), exact.to(dtype).double(), rtol=torch.finfo(dtype).eps, atol=0)
            assert native_result.stride() == grad.stride()
            for backend in ("native", "triton"):
                for in_place in (False, True):
                    given = grad.clone(memory_format=torch.preserve_format)
                    got = fused._rescaled(given, upstream * 2.0, backend, in_place)
                    assert torch.equal(got, native_result) and got.stride() == grad.stride()
                    assert (got is given) == in_place and (in_place or torch.equal(given, grad))


def test_ddp(forks, tmp_path):
    done = forks.run([str(tmp_path)], ranks=2, module="ops.on_ranks")
    assert done.statuses == [0, 0], done.output
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.manual_seed(0)
    layer = nn.Linear(12, 12)
    for rank in range(2):
        noisy, ref, target = (x.detach() for x in make((4, 12), seed=rank))
        for _ in range(2):
            (0.5 * seppo_loss(layer(noisy), ref, target, 50.0, backend="reference")).backward()
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0], layer.weight.grad)
