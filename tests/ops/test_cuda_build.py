"""csrc/cuda.cu, where there is a GPU: what it computes, by whatever plan, in graphs and on streams."""

import ctypes
import itertools

import pytest
import torch
from fused_parity import (
    DTYPES,
    FLIPPERS,
    SHAPES,
    assert_alone,
    assert_callers_sign,
    assert_only_the_winner_pays,
    assert_same_bits,
    assert_tie,
    assert_tie_of_errors,
    assert_within_twice,
    make,
    run,
    scored,
)

from seppo_fast.ops import native, seppo_loss

AUTO, CLUSTERED, COOPERATIVE, IN_PASSES = range(4)  # enum Plan
TICKETS = 1024  # kTickets

runs = pytest.mark.skipif(native.why_not(torch.device("cuda")) is not None or not torch.cuda.is_available(),
                          reason=f"no GPU, or: {native.why_not(torch.device('cuda'))}")


def planned(inputs, plan=AUTO, blocks=0, flipper=0, wants_grad=True, sft_weight=0.0, sign=None):
    """Outputs by name, of memory that held NaN where the allocator gives back what was freed last."""
    pairs = len(inputs[0]) // 2
    poison = [torch.full(size, torch.nan, dtype=dtype, device=inputs[0].device)
              for size, dtype in (((), None), ((7 * pairs + 2,), None), (inputs[0].shape, inputs[0].dtype))]
    del poison
    loss, stats, grad = torch.ops.seppo_fast.pair_loss_planned(*inputs, 2000.0, flipper, sft_weight, 0.37, 1 / pairs, wants_grad,
                                                               plan, blocks, sign)
    names = ("model_mse", "ref_mse", "sign", "logits", "losses", "implicit_acc", "aaf_rate")
    parts = stats.split([2 * pairs, 2 * pairs, pairs, pairs, pairs, 1, 1])
    return {"loss": loss, **dict(zip(names, parts, strict=True)), "grad": grad}


def plans_for(shape):
    """Every way to launch it here."""
    groups = -(-torch.Size(shape[1:]).numel() // 4096)
    major, _ = torch.cuda.get_device_capability()
    held = torch.cuda.get_device_properties(0).shared_memory_per_block_optin // (32 << 10)  # groups in one block
    held = 4 if held >= 4 else 2 if held >= 2 else 1
    largest = 1 if major < 9 else 16 if major <= 10 else 8
    clusters = [(CLUSTERED, n) for n in (1, 2, 4, 8, 16) if n <= largest and groups <= held * n]
    return [(AUTO, 0), *clusters, (COOPERATIVE, 0), (IN_PASSES, 0)]


@runs
@pytest.mark.parametrize("flipper", FLIPPERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_fp64(shape, dtype, flipper):
    for beta, shared, reduction in itertools.product((1.0, 2000.0, 5000.0), (False, True), ("mean", "sum", "none")):
        inputs = make(SHAPES[shape], dtype, "cuda", shared=shared)
        upstream = torch.linspace(-1, 2, len(inputs[0]) // 2) if reduction == "none" else 0.37
        assert_within_twice(inputs, "native", beta=beta, flipper=flipper, reduction=reduction, upstream=upstream)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_from_the_references_errors(shape, dtype):
    for beta, shared, flipper in itertools.product((1.0, 2000.0, 5000.0), (False, True), FLIPPERS):
        inputs = scored(make(SHAPES[shape], dtype, "cuda", shared=shared))
        assert_within_twice(inputs, "native", beta=beta, flipper=flipper, upstream=0.37)
    inputs = make(SHAPES[shape], dtype, "cuda")
    assert_tie_of_errors(inputs, "native")
    if len(SHAPES[shape]) == 4:
        assert_tie_of_errors([x.to(memory_format=torch.channels_last) for x in inputs], "native")
    mixed = [inputs[0], inputs[1], inputs[2].to(torch.float32 if dtype is torch.bfloat16 else torch.bfloat16)]
    assert_within_twice(scored(mixed), "native")
    assert_tie_of_errors(mixed, "native")


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sft_weight(shape, dtype):
    for form, flipper, reduction in itertools.product((list, scored), FLIPPERS, ("mean", "none")):
        inputs = form(make(SHAPES[shape], dtype, "cuda"))
        assert_within_twice(inputs, "native", sft_weight=300.0, flipper=flipper, reduction=reduction, upstream=0.37)
    predicted = make(SHAPES[shape], dtype, "cuda")
    for inputs in (predicted, scored(predicted)):
        assert_only_the_winner_pays(inputs, "native")
        first = planned(inputs, sft_weight=0.5)
        for plan, blocks in plans_for(SHAPES[shape]):
            assert_same_bits(first, planned(inputs, plan, blocks, sft_weight=0.5))


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_callers_sign(shape, dtype):
    predicted = make(SHAPES[shape], dtype, "cuda")
    sign = torch.tensor([1.0, 0.0, -1.0]).repeat(2)[:len(predicted[0]) // 2].cuda()
    for inputs in (predicted, scored(predicted)):
        assert_callers_sign(inputs, "native")
        assert_within_twice(inputs, "native", sign=sign, upstream=0.37)
        first = planned(inputs, sign=sign)
        for plan, blocks in plans_for(SHAPES[shape]):
            assert_same_bits(first, planned(inputs, plan, blocks, sign=sign))


@runs
@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES, DTYPES)))
def test_mixed_dtypes(dtypes):
    for shape in ((6, 3, 11, 13), SHAPES["sd15"], SHAPES["two_groups"]):
        inputs = [x.to(dtype) for x, dtype in zip(make(shape, device="cuda"), dtypes, strict=True)]
        assert_within_twice(inputs, "native", upstream=0.5)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_plan_changes_a_bit(shape, dtype):
    """Clusters of every size, the cooperative grid, separate passes, other alignments, 20 repetitions, other batches."""
    predicted = make(SHAPES[shape], dtype, "cuda")
    for inputs in (predicted, scored(predicted)):
        first = planned(inputs)
        assert all(x.isfinite().all() for x in first.values())
        for plan, blocks in [*plans_for(SHAPES[shape]), *[(AUTO, 0)] * 20]:
            assert_same_bits(first, planned(inputs, plan, blocks))
            no_grad = planned(inputs, plan, blocks, wants_grad=False)
            assert no_grad.pop("grad").shape == (0,)
            assert_same_bits(no_grad, first)
        shifted = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x) for x in inputs]
        for plan in (AUTO, COOPERATIVE, IN_PASSES):
            assert_same_bits(first, planned(shifted, plan))
        pairs = len(inputs[0]) // 2
        alone = planned([x[[0, pairs]] for x in inputs])
        assert torch.equal(alone["grad"], first["grad"][[0, pairs]]) and torch.equal(alone["logits"], first["logits"][:1])


@runs
def test_every_kernel_after_the_other():
    """Each with blocks of more shared memory than the 48 KB that a kernel has before it is allowed more, in one process."""
    for dtype, form, how in itertools.product(DTYPES, (list, scored), ("own dtype", "other dtype", "not aligned")):
        inputs = make((4, 2, 64, 64), dtype, "cuda")  # 2 groups, 64 KB
        if how == "other dtype":
            inputs = [inputs[0], *(x.to(torch.float16 if dtype is not torch.float16 else torch.float32) for x in inputs[1:])]
        if how == "not aligned":
            inputs = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x) for x in inputs]
        inputs = form(inputs)
        assert_same_bits(planned(inputs, IN_PASSES), planned(inputs, CLUSTERED, 1))


@runs
def test_ties_and_bad_pairs():
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        assert_tie(make(SHAPES[shape], dtype, "cuda"), "native")
    for value, tensor, where in itertools.product((float("nan"), float("inf")), range(3), (0, 1, 5)):
        for shape in ((6, 4, 5, 5), (6, 4, 64, 64), (6, 16, 128, 128)):
            assert_alone("native", "cuda", value, tensor, where, shape)
            assert_alone("native", "cuda", value, tensor, where, shape, form=scored)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
def test_rescale(dtype):
    for shape in ((6, 3, 17, 29), (8, 4, 16, 16)):
        grad, pairs = torch.randn(shape, device="cuda").to(dtype), shape[0] // 2
        each = torch.linspace(-1, 2, pairs, device="cuda")
        for upstream in (each[0], each, each[:1].expand(pairs), each.repeat_interleave(2)[1::2]):
            for given in (grad, grad.to(memory_format=torch.channels_last)):
                got = torch.ops.seppo_fast.rescale(given, upstream, 0.5)
                want = (0.5 * upstream.expand(pairs).repeat(2).view(-1, 1, 1, 1) * grad.float()).to(dtype)
                assert torch.equal(got, want) and got.stride() == given.stride()


@runs
def test_nothing_waits_for_the_device():
    model, ref, target = make(SHAPES["odd"], device="cuda")
    model.requires_grad_()
    for reduction, upstream in (("mean", torch.tensor(0.3)), ("sum", torch.ones(())), ("none", torch.rand(3))):
        upstream = upstream.cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss, _ = seppo_loss(model, ref, target, backend="native", reduction=reduction, return_stats=True)
            torch.autograd.grad(loss, model, upstream, retain_graph=True)
            torch.autograd.grad(loss.sum(), model)
            with torch.no_grad():
                seppo_loss(model, ref, target, backend="native", reduction=reduction)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@runs
def test_memory_formats():
    inputs = make((4, 4, 16, 16), device="cuda")
    last = [x.to(memory_format=torch.channels_last) for x in inputs]
    got, want = run(last, "native"), run(inputs, "native")
    assert got["grad"].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got["grad"], want["grad"])


@runs
@pytest.mark.parametrize("pairs", [1, 2, 31, 33, 1000])
def test_totals(pairs):
    """The loss and both shares, from what the pairs have."""
    for shape in ((2 * pairs, 3), (2 * pairs, 4, 40, 40)):
        inputs = make(shape, device="cuda")
        for (plan, blocks), flipper in itertools.product(plans_for(shape), range(3)):
            got = planned(inputs, plan, blocks, flipper)
            torch.testing.assert_close(got["loss"], got["losses"].double().mean().float(), rtol=2e-7, atol=0)
            assert got["implicit_acc"].item() == pytest.approx((got["logits"] > 0).sum().item() / pairs, rel=1e-6)
            assert got["aaf_rate"].item() == pytest.approx((got["sign"] == -1).sum().item() / pairs, rel=1e-6)
            assert pairs == 1 or len(shape) == 2 or flipper == 2 or 0 < got["aaf_rate"] < 1


@runs
def test_nan_in_one_pair_is_in_the_total():
    for pairs, plan in itertools.product((1, 2, 1000), (AUTO, COOPERATIVE, IN_PASSES)):
        inputs = make((2 * pairs, 4, 8, 8), device="cuda")
        good = planned(inputs, plan)
        inputs[0][0, 0, 0, 0] = torch.nan
        bad = planned(inputs, plan)
        assert bad["loss"].isnan() and bad["losses"].isnan().sum() == 1
        assert torch.equal(bad["losses"][1:], good["losses"][1:])
        inputs[0][0, 0, 0, 0] = 0.0
        assert planned(inputs, plan)["loss"].isfinite()


def captured(inputs, plan=AUTO):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = planned(inputs, plan)
    return graph, outputs


@runs
def test_a_graph_replays_with_new_inputs():
    inputs, others = make(SHAPES["sd15"], device="cuda"), make(SHAPES["sd15"], device="cuda", seed=1)
    for plan in (AUTO, COOPERATIVE, IN_PASSES):
        planned(inputs, plan)
        graph, outputs = captured(inputs, plan)
        for new in (others, make(SHAPES["sd15"], device="cuda", seed=2)):
            for x, y in zip(inputs, new, strict=True):
                x.copy_(y)
            for _ in range(3):
                graph.replay()
            assert_same_bits(planned(new), outputs)


@runs
def test_on_another_stream_and_device():
    inputs = make(SHAPES["sd15"], device="cuda")
    want = planned(inputs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = planned(inputs)
    side.synchronize()
    assert_same_bits(want, got)
    if torch.cuda.device_count() > 1:
        other = planned([x.to("cuda:1") for x in inputs])
        assert other["grad"].device == torch.device("cuda:1")
        assert_same_bits(want, {name: x.to("cuda:0") for name, x in other.items()})


@runs
def test_launches_side_by_side():
    """Launches that are queued on several streams and then let go at once, with graphs between them: each total is right."""
    streams = [torch.cuda.Stream() for _ in range(4)]
    cases = [make((2 * pairs, *shape), device="cuda", seed=pairs)
             for pairs, shape in itertools.product((1, 2, 7, 64, 1000), ((3,), (4, 40, 40)))]
    for plan in (AUTO, COOPERATIVE, IN_PASSES):
        want = [planned(case, plan) for case in cases]
        graphs = [[captured(case, plan) for case in cases[2:6]] for _ in streams]
        torch.cuda.synchronize()
        kept = []
        for stream in streams:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(20_000_000)  # cycles, in which the host fills the queues
        for _ in range(10):
            for stream, own in zip(streams, graphs, strict=True):
                with torch.cuda.stream(stream):
                    kept += [(want[i], planned(case, plan)) for i, case in enumerate(cases)]
                    for graph, _ in own:
                        graph.replay()
        torch.cuda.synchronize()
        for first, second in kept:
            assert_same_bits(first, second)
        for own in graphs:
            for i, (_, outputs) in enumerate(own):
                assert_same_bits(want[2 + i], outputs)


@runs
def test_a_graph_beside_launches_on_its_stream():
    """A graph captured on one stream and replayed on another, while the first launches: they must not count together."""
    inputs = make((128, 4, 40, 40), device="cuda")
    want = planned(inputs)
    own, other = torch.cuda.Stream(), torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=own):
        outputs = planned(inputs)
    torch.cuda.synchronize()
    for _ in range(200):
        with torch.cuda.stream(other):
            graph.replay()
        with torch.cuda.stream(own):
            eager = planned(inputs)
        torch.cuda.synchronize()
        assert_same_bits(want, outputs)
        assert_same_bits(want, eager)


@runs
def test_a_thousand_launches():
    for pairs in (1, 2, 1000):
        inputs = make((2 * pairs, 4, 16, 16), device="cuda")
        losses = torch.stack([planned(inputs)["loss"] for _ in range(1000)])
        assert (losses == losses[0]).all() and losses[0].isfinite()


@runs
def test_plans_that_do_not_fit():
    inputs = make(SHAPES["sd15"], device="cuda")
    for blocks in (-1, 0, 3, 32):
        with pytest.raises(RuntimeError, match="do not hold"):
            planned(inputs, CLUSTERED, blocks)


@runs
def test_beyond_31_bits():
    """2^31 elements and more: offsets of the last pair, and a sample too large for the chip."""
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("wants 40 GB of free memory")
    for shape in ((2**17 + 2, 2**14), (2, 2**30 + 2**14)):
        small = make((2, shape[1] if shape[0] > 2 else 2**14), torch.bfloat16, "cuda")
        inputs = [torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for _ in range(3)]
        pairs = shape[0] // 2
        for x, y in zip(inputs, small, strict=True):
            x[pairs - 1, -2**14:], x[-1, -2**14:] = y[0, -2**14:], y[1, -2**14:]
        got = planned(inputs)
        exact = run([x[[pairs - 1, shape[0] - 1]][:, -2**14:] for x in inputs], "reference", torch.float64, reduction="sum")
        ratio = 2**14 / shape[1]
        torch.testing.assert_close(got["model_mse"][[pairs - 1, -1]].double(), exact["model_mse"] * ratio, rtol=1e-5, atol=0)
        assert got["logits"][-1].double() == pytest.approx((exact["logits"] * ratio).item(), rel=1e-4)
        assert got["grad"][-1, -2**14:].abs().max() > 0 and got["grad"][-1, :-2**14].abs().sum() == 0


@runs
def test_more_streams_than_words_for_tickets():
    """Streams that come and go, as those of other libraries do. At the end: none of the words is left for later streams."""
    inputs = make((14, 4, 16, 16), device="cuda")
    want = planned(inputs)
    torch.cuda.synchronize()
    for _ in range(TICKETS + 8):
        address = ctypes.c_void_p()
        torch.cuda.check_error(torch.cuda.cudart().cudaStreamCreate(ctypes.addressof(address)))
        with torch.cuda.stream(torch.cuda.ExternalStream(address.value)):
            got = [planned(inputs) for _ in range(2)]
        torch.cuda.synchronize()
        for outputs in got:
            assert_same_bits(want, outputs)
        del got, outputs
        torch.cuda.check_error(torch.cuda.cudart().cudaStreamDestroy(address.value))
    torch.cuda.empty_cache()
