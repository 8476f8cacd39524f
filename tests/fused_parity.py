"""Inputs and bounds for the fused backends, on whatever device: shared by the tests of Triton, of CUDA and of the GPU suite."""

import torch

from seppo_fast.ops import per_sample_mse, seppo_loss

SHAPES = {"sd15": (4, 4, 64, 64), "sdxl": (2, 4, 128, 128), "sd3": (2, 16, 128, 128), "video": (2, 4, 16, 32, 32),
          "odd": (6, 3, 17, 29), "one": (8, 1), "seven": (10, 7), "two_groups": (4, 8, 8, 100), "odd_large": (2, 70_001)}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FLIPPERS = ["aaf", "indicator", "none"]


def make(shape, dtype=torch.float32, device="cpu", seed=0, shared=False, near=0.02):
    """Policy, reference and target; the first half of the winners is worse than the reference, the others better."""
    g = torch.Generator().manual_seed(seed)
    target = torch.randn((shape[0] // 2, *shape[1:]) if shared else shape, generator=g)
    whole = torch.cat([target, target]) if shared else target
    ref = whole + 0.3 * torch.randn(shape, generator=g)
    model = ref + near * torch.randn(shape, generator=g)
    worse = shape[0] // 4
    model[:worse] += near * (ref - whole)[:worse]
    model[worse:shape[0] // 2] -= near * (ref - whole)[worse:shape[0] // 2]
    return tuple(x.to(device, dtype) for x in (model, ref, target))


def scored(inputs):
    """The same with the reference's mean squared errors, (2B,) in fp32, in place of its predictions."""
    model, ref, target = inputs
    whole = target if len(target) == len(model) else torch.cat([target, target])
    return model, (ref.double() - whole.double()).square().flatten(1).mean(1).float(), target


def run(inputs, backend, wide=None, upstream=1.0, **options):
    """Every output and the gradient, by name."""
    model, ref, target = (x.to(wide) if wide else x for x in inputs)
    model = model.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    reference = {"ref_mse" if ref.dim() == 1 else "ref_pred": ref}
    loss, stats = seppo_loss(model, target=target, backend=backend, return_stats=True, **reference, **options)
    upstream = torch.as_tensor(upstream, dtype=loss.dtype, device=loss.device).expand_as(loss)
    grad, = torch.autograd.grad(loss, model, upstream)
    return {"loss": loss.detach(), "grad": grad, **stats._asdict()}


def assert_within_twice(inputs, backend, roundings=2, **options):
    """Each output's worst error against fp64 is at most twice that of PyTorch in fp32, or a few roundings, where that has none.

    A rounding of the logit z is one of z times as much in exp(-z), and so in a loss or gradient that is nearly that. From
    errors of the reference a logit has besides the roundings of the policy's two, which do not become less in a difference.
    """
    got = run(inputs, backend, **options)
    plain = run(inputs, "reference", **options)
    exact = run(inputs, "reference", torch.float64, **options)
    rounded = 0.0
    if inputs[1].dim() == 1:
        rounded = roundings * torch.finfo(torch.float32).eps * options.get("beta", 2000.0) * exact["model_mse"].max().item()
    for name, want in exact.items():
        assert got[name].dtype == plain[name].dtype and got[name].shape == plain[name].shape, name
        assert got[name].isfinite().all(), name
        steep = 1 + exact["logits"].abs().max().item() if name in ("loss", "grad") else 1
        kind = torch.finfo(plain[name].dtype)
        rounding = (roundings * steep if kind.bits == 32 else 1) * kind.eps * want.abs().max().item() + kind.smallest_normal
        if name in ("logits", "loss"):
            rounding += rounded * (len(exact["logits"]) if options.get("reduction") == "sum" else 1)
        if name == "grad":
            rounding += rounded * want.abs().max().item()
        error, allowed = ((x[name].double() - want).abs().max().item() for x in (got, plain))
        assert error <= 2 * allowed + rounding, (name, error, allowed)


def assert_same_bits(first, second, rows=None):
    for name, value in first.items():
        a, b = (value, second[name]) if rows is None else (value[rows], second[name][rows])
        assert torch.equal(a, b), name


def assert_alone(backend, device, value, tensor, where, shape=(6, 4, 5, 5), form=list, **options):
    """A sample, or with `form=scored` an error, that is not finite spoils its own pair (of 3) and no other's."""
    options = {"reduction": "none", **options}
    inputs = form(make(shape, device=device))
    broken = [x.clone() for x in inputs]
    each = broken[tensor].view(shape[0], -1)
    each[where, 17 % each.shape[1]] = value
    good, bad = (run(x, backend, **options) for x in (inputs, broken))
    assert not (bad["loss"].expand(3)[where % 3].isfinite() and bad["grad"][[where % 3, where % 3 + 3]].isfinite().all())
    fine = [i for i in range(3) if i != where % 3]
    for name in ("loss", "sign", "logits") if options["reduction"] == "none" else ("sign", "logits"):
        assert torch.equal(good[name][fine], bad[name][fine]), name
    rows = [*fine, *(i + 3 for i in fine)]
    for name in ("grad", "model_mse", "ref_mse"):
        assert torch.equal(good[name][rows], bad[name][rows]), name


def assert_only_the_winner_pays(inputs, backend, sft_weight=300.0):
    """`sft_weight` leaves statistics and the loser's gradient as they are, to the bit; 0 leaves everything."""
    plain, zero, weighted = (run(inputs, backend, reduction="none", **options)
                             for options in ({}, {"sft_weight": 0.0}, {"sft_weight": sft_weight}))
    assert_same_bits(plain, zero)
    pairs = len(plain["loss"])
    torch.testing.assert_close(weighted.pop("loss"), plain["loss"] + sft_weight * plain["model_mse"][:pairs])
    grad = weighted.pop("grad")
    assert torch.equal(grad[pairs:], plain["grad"][pairs:]) and not torch.equal(grad[:pairs], plain["grad"][:pairs])
    assert_same_bits(weighted, plain)


def assert_callers_sign(inputs, backend, flipper="aaf"):
    """The flipper's own signs, given back, change no bit; opposite ones change the losers' gradients, not the errors."""
    decided = run(inputs, backend, flipper=flipper, reduction="none")
    assert_same_bits(decided, run(inputs, backend, sign=decided["sign"], reduction="none"))
    other = run(inputs, backend, sign=-decided["sign"], reduction="none")
    pairs, turned = len(decided["sign"]), decided["sign"] != 0
    assert torch.equal(other["sign"], -decided["sign"])
    assert not torch.equal(other["grad"][pairs:][turned], decided["grad"][pairs:][turned])
    assert_same_bits({name: other[name] for name in ("model_mse", "ref_mse")}, decided)


def assert_tie(inputs, backend):
    model, _, target = inputs
    loss, stats = seppo_loss(model, model.clone(), target, 5000.0, backend=backend, return_stats=True)
    assert (stats.logits == 0).all() and (stats.sign == -1).all() and torch.equal(stats.model_mse, stats.ref_mse)
    torch.testing.assert_close(loss.cpu(), torch.tensor(2.0).log())


def assert_tie_of_errors(inputs, backend):
    """A policy equal to the reference that was scored, in batches of whatever sizes, ties, with and without a gradient."""
    model, _, target = inputs
    errors = per_sample_mse(model, target, backend=backend)
    for count in (2, 3):
        batches = zip(model.split(count), target.split(count), strict=True)
        assert torch.equal(torch.cat([per_sample_mse(*batch, backend=backend) for batch in batches]), errors)
    assert torch.equal(per_sample_mse(torch.cat([model] * 3), torch.cat([target] * 3), backend=backend), errors.repeat(3))
    for policy, grad_scale in ((model, None), (model.detach().requires_grad_(), None), (model.detach().requires_grad_(), 0.5)):
        loss, stats = seppo_loss(policy, ref_mse=errors, target=target, beta=5000.0, backend=backend, grad_scale=grad_scale,
                                 return_stats=True)
        assert (stats.logits == 0).all() and (stats.sign == -1).all()
        assert torch.equal(stats.model_mse, errors) and torch.equal(stats.ref_mse, errors)
        torch.testing.assert_close(loss.detach().cpu(), torch.tensor(2.0).log())
