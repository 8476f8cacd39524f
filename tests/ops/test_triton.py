"""What the Triton backend computes: in its interpreter, and for real where there is a GPU."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fused_parity import (
    DTYPES,
    FLIPPERS,
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
from fused_parity import SHAPES as ALL_SHAPES

triton = pytest.importorskip("triton")

from seppo_fast.ops import triton_device, triton_kernel  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from interpreter import hurry

    hurry()
DEVICE = "cpu" if INTERPRETED else "cuda" if torch.cuda.is_available() else None
runs = pytest.mark.skipif(DEVICE is None, reason="no GPU here: test_in_the_interpreter runs it in another process")
# Five parts are there what sixteen and eighteen are: full ones, and at the end one that is not. Each is a program, and takes long.
SHAPES = ALL_SHAPES | ({"video": (2, 4, 5, 32, 32), "odd_large": (2, 17_001)} if INTERPRETED else {})


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
@pytest.mark.timeout(900)
def test_in_the_interpreter():
    """All of this file that computes: the interpreter must be chosen before Triton is imported."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(Path(__file__))],
                          env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}, capture_output=True,
                          text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) > 60


@runs
@pytest.mark.parametrize("flipper", FLIPPERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s not in ("sdxl", "sd3")])
def test_against_fp64(shape, dtype, flipper):
    shared = FLIPPERS.index(flipper) == DTYPES.index(dtype)
    assert_within_twice(make(SHAPES[shape], dtype, DEVICE, shared=shared), "triton", flipper=flipper, beta=2000.0, upstream=0.37)


@runs
@pytest.mark.parametrize("beta,reduction", list(itertools.product([1.0, 5000.0], ["mean", "sum", "none"])))
def test_options(beta, reduction):
    upstream = torch.linspace(-1, 2, 3) if reduction == "none" else 1 / 256
    for dtype in DTYPES:
        assert_within_twice(make(SHAPES["odd"], dtype, DEVICE), "triton", beta=beta, reduction=reduction, upstream=upstream)


@runs
@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES, DTYPES)))
def test_mixed_dtypes(dtypes):
    inputs = [x.to(dtype) for x, dtype in zip(make((6, 3, 11, 13), device=DEVICE), dtypes, strict=True)]
    assert_within_twice(inputs, "triton", upstream=0.5)


@runs
@pytest.mark.parametrize("shape", ["sd15", "odd", "one", "odd_large"])
def test_a_tie_is_exact(shape):
    for dtype in DTYPES:
        assert_tie(make(SHAPES[shape], dtype, DEVICE), "triton")


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["odd", "seven", "odd_large"] if INTERPRETED else ["odd", "seven", "odd_large", "sd15", "video"])
def test_from_the_references_errors(shape, dtype):
    flipper = FLIPPERS[DTYPES.index(dtype)]
    inputs = make(SHAPES[shape], dtype, DEVICE)
    assert_within_twice(scored(inputs), "triton", beta=5000.0, flipper=flipper, upstream=0.37)
    if INTERPRETED and (shape == "odd_large") != (dtype is torch.float16):
        return  # one of them is slow enough
    assert_tie_of_errors(inputs, "triton")
    if len(SHAPES[shape]) == 4:
        assert_tie_of_errors([x.to(memory_format=torch.channels_last) for x in inputs], "triton")


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["odd", "seven", "odd_large"])
def test_sft_weight(shape, dtype):
    flipper = FLIPPERS[DTYPES.index(dtype)]
    for form, reduction in ((list, "none"), (scored, "mean")):
        inputs = form(make(SHAPES[shape], dtype, DEVICE))
        assert_within_twice(inputs, "triton", sft_weight=300.0, flipper=flipper, reduction=reduction, upstream=0.37)
        assert_only_the_winner_pays(inputs, "triton")


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["odd", "seven", "odd_large"])
def test_callers_sign(shape, dtype):
    for form in (list, scored):
        inputs = form(make(SHAPES[shape], dtype, DEVICE))
        assert_callers_sign(inputs, "triton")
        sign = torch.tensor([1.0, 0.0, -1.0]).repeat(2)[:len(inputs[0]) // 2].to(DEVICE)
        assert_within_twice(inputs, "triton", sign=sign, flipper="none", upstream=0.37)


@runs
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor,where", [(0, 0), (1, 4), (2, 2)])
def test_one_bad_pair_stays_alone(value, tensor, where):
    assert_alone("triton", DEVICE, value, tensor, where)
    assert_alone("triton", DEVICE, value, tensor, where, form=scored)
    if not INTERPRETED or tensor == 0 and value != value:
        assert_alone("triton", DEVICE, value, tensor, where, shape=(6, 17_000))  # several programs a pair


@runs
@pytest.mark.parametrize("shape", ["sd15", "odd", "odd_large"])
def test_the_same_bits_in_any_batch(shape):
    """Repeated, and with other pairs around: a pair's result is its own."""
    inputs = make(SHAPES[shape], torch.bfloat16, DEVICE)
    first = run(inputs, "triton", reduction="none")
    for _ in range(2 if INTERPRETED else 20):
        assert_same_bits(first, run(inputs, "triton", reduction="none"))
    pairs = SHAPES[shape][0] // 2
    alone = run([x[[0, pairs]] for x in inputs], "triton", reduction="none")
    assert torch.equal(alone["grad"], first["grad"][[0, pairs]]) and torch.equal(alone["logits"], first["logits"][:1])


@runs
def test_channels_last_keeps_its_layout():
    inputs = make((4, 4, 9, 10), device=DEVICE)
    last = [x.to(memory_format=torch.channels_last) for x in inputs]
    got, want = run(last, "triton"), run(inputs, "triton")
    assert got["grad"].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got["grad"], want["grad"])
    assert_within_twice([last[0], inputs[1], last[2]], "triton")


def compute(inputs, flipper=0, sft_weight=0.0, scale=0.5, weight=0.25, wants_grad=True, **how):
    return triton_kernel.pair_loss(*inputs, 2000.0, flipper, sft_weight, scale, weight, wants_grad, **how)


def assert_equal(first, second):
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@runs
@pytest.mark.parametrize("wants_grad", [True, False])
@pytest.mark.parametrize("shape", ["odd", "seven", "one", "odd_large"])
@pytest.mark.parametrize("form", [list, scored])
def test_every_output_is_written(shape, wants_grad, form, monkeypatch):
    inputs = form(make(SHAPES[shape], torch.bfloat16, DEVICE))
    good = compute(inputs, wants_grad=wants_grad)
    empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    poison = lambda x: x.fill_(torch.nan) if x.is_floating_point() else x  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    poisoned = compute(inputs, wants_grad=wants_grad)
    for output in poisoned:
        assert output.isfinite().all()
    assert_equal(poisoned, good)
    assert poisoned[2].shape == (inputs[0].shape if wants_grad else (0,)) and poisoned[2].dtype is torch.bfloat16


@runs
@pytest.mark.parametrize("shape", [(2, 5), (4, 5), (14, 3, 3), (516, 2), (2, 17_000), (6, 17_000)])
def test_loss_and_shares(shape, monkeypatch):
    """Of one pair, of a few, of more than are added up at a time (in the interpreter, where a program takes long, 8 of them)."""
    if INTERPRETED and shape == (516, 2):
        shape = (2 * (8 + 2), 2)
        monkeypatch.setattr(triton_device, "LANES", triton.language.constexpr(8))
    samples, pairs = shape[0], shape[0] // 2
    inputs = make(shape, device=DEVICE, near=0.1)
    loss, stats, grad = compute(inputs)
    exact = run(inputs, "reference", torch.float64, reduction="none")
    model_mse, ref_mse, sign, logits, losses, *shares = stats.split([samples, samples, pairs, pairs, pairs, 1, 1])
    for got, want in ((model_mse, exact["model_mse"]), (ref_mse, exact["ref_mse"]), (sign, exact["sign"]),
                      (logits, exact["logits"]), (losses, exact["loss"]), (loss, 0.25 * exact["loss"].sum()),
                      (shares[0][0], exact["implicit_acc"]), (shares[1][0], exact["aaf_rate"]), (grad, 0.5 * exact["grad"])):
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=1e-6 * want.abs().max().item())
    assert torch.equal(shares[0][0], (logits > 0).float().mean()) and torch.equal(shares[1][0], (sign == -1).float().mean())
    if pairs == 1:
        assert loss == 0.25 * losses[0]
    assert_equal(compute(inputs, wants_grad=False), (loss, stats, grad.new_empty(0)))


def counters_in_use():
    device = torch.empty(0, device=DEVICE).device
    stream = torch.cuda.current_stream().cuda_stream if device.type == "cuda" else 0
    return triton_kernel._kept_counters(device, stream)


@runs
def test_the_counters_serve_again():
    """Whatever the number of pairs was, and of parts, of which each leaves a sign bit or nothing."""
    results = []
    for _ in range(2):
        for shape in ((6, 9), (2, 17_000), (4, 20_500), (10, 9)):
            results.append(compute(make(shape, torch.float16, DEVICE)))
            assert ((counters_in_use() & 0x7fffffff) == 0).all() and counters_in_use()[0] == 0
    for first, second in zip(results[:4], results[4:], strict=True):
        assert_equal(first, second)


@runs
def test_more_large_pairs_than_there_are_counters(monkeypatch):
    inputs = make((6, 17_000), torch.bfloat16, DEVICE)
    good = compute(inputs)
    monkeypatch.setattr(triton_kernel, "COUNTERS", 3)
    assert_equal(compute(inputs), good)


@pytest.mark.skipif(not INTERPRETED, reason="where programs run at the same time they can wait")
@pytest.mark.parametrize("dtype,shape,form,sft_weight", [(torch.bfloat16, (4, 20_500), list, 0.0),
                                                         (torch.float32, (2, 17_000), list, 0.5),
                                                         (torch.float32, (4, 17_000), scored, 0.5)])
def test_together_but_for_the_waiting(dtype, shape, form, sft_weight, monkeypatch):
    """Nobody waits, and so all sums are there when the same programs run a second time."""
    inputs = form(make(shape, dtype))
    want = compute(inputs, sft_weight=sft_weight)
    parts, _ = triton_kernel.plan(shape[1], inputs[0].element_size())
    partial, empty = torch.full((8 * shape[0] // 2 * parts,), torch.nan), torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *a, **k: partial if a == (len(partial),) else empty(x, *a, **k))
    monkeypatch.setattr(triton_device, "_meet", lambda counter, first, parts: None)
    monkeypatch.setattr(triton_kernel, "_room", lambda device: parts + 1)
    compute(inputs, sft_weight=sft_weight)
    assert_equal(compute(inputs, sft_weight=sft_weight), want)


gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU: the interpreter has no cooperative launch, stream or graph")
LARGE = [(2, 65_536), (2, 16, 128, 128), (128, 4, 16, 32, 32), (600, 17_000), (2, 70_001), (6, 262_143)]


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LARGE)
def test_together_or_in_turn(shape, dtype):
    """One cooperative launch, on grids of any size too, or three launches: the same bits."""
    for shared, form, sft_weight in itertools.product((False, True), (scored, list), (0.5, 0.0)):
        inputs = form(make(shape, dtype, DEVICE, shared=shared))
        want = compute(inputs, sft_weight=sft_weight, together=False)
        for _ in range(5):
            assert_equal(compute(inputs, sft_weight=sft_weight), want)
        assert_equal(compute(inputs, sft_weight=sft_weight, wants_grad=False)[:2], want[:2])
    parts, _ = triton_kernel.plan(inputs[0][0].numel(), inputs[0].element_size())
    for room in (parts, parts + 1, 2 * parts + 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton_kernel, "_room", lambda device, room=room: room)
            assert_equal(compute(inputs), want)


@gpu
def test_larger_than_the_chip():
    elements = triton_kernel.PART * triton_kernel._room(torch.device("cuda", 0)) + 5
    for inputs in (make((2, elements), torch.bfloat16, DEVICE), make((4, elements - 5), torch.bfloat16, DEVICE)):
        assert_within_twice(inputs, "triton")


@gpu
@pytest.mark.parametrize("shape", [(16, 4, 64, 64), (6, 4, 16, 32, 32), (2, 17_000)])
def test_captured_among_others(shape):
    """A graph's replays, on its stream and another, with eager calls between and beside them."""
    cases = [make(shape, torch.bfloat16, DEVICE, seed) for seed in range(4)]
    wants = [compute(case) for case in cases]
    inputs = [x.clone() for x in cases[0]]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [compute(inputs) for _ in range(3)]
    side = torch.cuda.Stream()
    for turn in range(40):
        for x, value in zip(inputs, cases[turn % 4], strict=True):
            x.copy_(value)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side if turn % 2 else torch.cuda.current_stream()):
            graph.replay()
        beside = [compute(case) for case in cases]
        torch.cuda.current_stream().wait_stream(side)
        for result in results:
            assert_equal(result, wants[turn % 4])
        for result, want in zip(beside, wants, strict=True):
            assert_equal(result, want)


@gpu
def test_on_several_streams():
    cases = [make(shape, torch.bfloat16, DEVICE) for shape in ((32, 4, 64, 64), (6, 4, 16, 32, 32), (2, 262_144), (40, 9))]
    wants = [compute(case) for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    results = []
    for _ in range(50):
        for stream, case in zip(streams, cases, strict=True):
            with torch.cuda.stream(stream):
                results.append(compute(case))
    torch.cuda.synchronize()
    for result, want in zip(results, wants * 50, strict=True):
        assert_equal(result, want)
