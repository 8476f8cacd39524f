"""The C++ backend against fp64: no more than twice the error of the same thing in fp32 PyTorch."""

import ctypes
import itertools
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from functools import partial

import fused_parity
import numpy as np
import psutil
import pytest
import torch
from fused_parity import DTYPES, FLIPPERS, assert_tie_of_errors, make, run, scored
from hypothesis import given, settings
from hypothesis import strategies as st

from seppo_fast.ops import available_backends, native, per_sample_mse, seppo_loss
from seppo_fast.ops.loss import _find_out

pytestmark = pytest.mark.skipif(native.why_not(torch.device("cpu")) is not None, reason=str(native.why_not(torch.device("cpu"))))

PIECE = 16384  # kPiece: what one task of csrc/cpu.cpp reads
SHAPES = fused_parity.SHAPES | {"sd3": (4, 16, 32, 32), "piece": (2, PIECE + 1)}
assert_within_twice = partial(fused_parity.assert_within_twice, backend="native")


@pytest.mark.parametrize("flipper", FLIPPERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_fp64(shape, dtype, flipper):
    """Every beta with every reduction, and each of these two with every upstream gradient."""
    for shared in (False, True):
        inputs = make(SHAPES[shape], dtype, shared=shared)
        for (i, beta), (j, reduction) in itertools.product(enumerate((1.0, 2000.0, 5000.0)), enumerate(("mean", "sum", "none"))):
            each = torch.linspace(-1, 2, SHAPES[shape][0] // 2) if reduction == "none" else 0.37
            assert_within_twice(inputs, upstream=(1.0, 1 / 256, each)[(i + j) % 3], beta=beta, flipper=flipper, reduction=reduction)


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES, DTYPES)))
def test_mixed_dtypes(dtypes):
    inputs = [x.to(dtype) for x, dtype in zip(make((6, 3, 11, 13), torch.float32), dtypes, strict=True)]
    assert_within_twice(inputs, upstream=0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_tie_is_exact(shape, dtype):
    fused_parity.assert_tie(make(SHAPES[shape], dtype), "native")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_from_the_references_errors(shape, dtype):
    for beta, shared, reduction in ((1.0, False, "mean"), (2000.0, True, "none"), (5000.0, False, "sum")):
        inputs = scored(make(SHAPES[shape], dtype, shared=shared))
        each = torch.linspace(-1, 2, SHAPES[shape][0] // 2) if reduction == "none" else 0.37
        for flipper in FLIPPERS:
            assert_within_twice(inputs, upstream=each, beta=beta, flipper=flipper, reduction=reduction)
    inputs = make(SHAPES[shape], dtype)
    assert_tie_of_errors(inputs, "native")
    if len(SHAPES[shape]) == 4:
        assert_tie_of_errors([x.to(memory_format=torch.channels_last) for x in inputs], "native")


@settings(max_examples=60, deadline=None)
@given(pairs=st.integers(1, 5), rest=st.lists(st.integers(1, 9), min_size=1, max_size=4), dtype=st.sampled_from(DTYPES),
       shared=st.booleans(), permute=st.randoms(use_true_random=False), seed=st.integers(0, 99))
def test_any_shape_and_strides(pairs, rest, dtype, shared, permute, seed):
    inputs = []
    for x in make((2 * pairs, *rest), dtype, seed=seed, shared=shared):
        order = list(range(x.dim()))
        permute.shuffle(order)
        inverse = [order.index(d) for d in range(x.dim())]
        padded = torch.full([n + permute.randint(0, 2) for n in x.permute(order).shape], torch.nan, dtype=dtype)
        view = padded[tuple(slice(n) for n in x.permute(order).shape)]
        view.copy_(x.permute(order))
        inputs.append(view.permute(inverse))  # the same values, in some order in memory, with gaps of NaN
    assert_within_twice(inputs)


@pytest.mark.slow
def test_the_same_bits_20_times_whatever_the_threads():
    before = torch.get_num_threads()
    try:
        for shape in [(2, 4, 128, 128), (34, 4, 64, 64), (6, 5, 7), (2, 300_001)]:
            inputs, seen = make(shape, torch.bfloat16), []
            for run_number in range(20):
                torch.set_num_threads(1 + run_number % 3)
                seen.append(run(inputs, "native") | {"scored": run(scored(inputs), "native")["grad"],
                                                     "errors": per_sample_mse(inputs[0], inputs[2])})
            for other in seen[1:]:
                assert all(torch.equal(seen[0][name], other[name]) for name in other)
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """malloc hands out 0xfe bytes: as fp32, bf16 or fp16 huge numbers, where nothing was stored."""
    libc, perturb = ctypes.CDLL(None), -6  # M_PERTURB of malloc.h
    if not hasattr(libc, "mallopt") or not libc.mallopt(perturb, 1):
        pytest.skip("this malloc cannot be told what to hand out")
    yield
    libc.mallopt(perturb, 0)


def test_every_output_is_written(poisoned):
    for elements in (1000, 1 << 20):
        assert (torch.empty(elements).view(torch.uint8) == 0xfe).all(), "malloc is not poisoned"
    for shape in [(2, 1), (6, 7), (4, 4, 64, 64), (2, 16 * 16384 + 3), (66, 4, 8, 8), (64, 4, 64, 64)]:
        for dtype in DTYPES:
            g = torch.Generator().manual_seed(0)
            model, ref, target = (torch.randn(shape, generator=g).to(dtype) for _ in range(3))
            errors = (ref - target).float().square().flatten(1).mean(1)
            for inputs in ((model, ref, target), (model, errors, target)):
                want, got = (run(inputs, backend, beta=1.0) for backend in ("reference", "native"))
                for name in want:
                    torch.testing.assert_close(got[name], want[name])


def test_channels_last_is_not_copied():
    for dims, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        shape = (4, 6, 5, 8, 7)[:dims]
        inputs = [x.to(memory_format=layout) for x in make(shape, torch.float32)]
        got = run(inputs, "native")
        assert got["grad"].stride() == inputs[0].stride()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            seppo_loss(*inputs, backend="native")
        assert not {"aten::copy_", "aten::clone", "aten::contiguous"} & {event.key for event in profile.key_averages()}
        want = run([x.contiguous() for x in inputs], "native")
        torch.testing.assert_close(got["grad"], want["grad"])


@pytest.mark.parametrize("where", [0, 1, 3, 5])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("tensor", [0, 1, 2])
def test_a_bad_pair_stays_alone(where, value, tensor):
    inputs = list(make((6, 4, 33, 5), torch.float32))
    good = run(inputs, "native", reduction="none")
    inputs[tensor] = inputs[tensor].clone()
    inputs[tensor][where, 1, 2, 3] = value
    bad = run(inputs, "native", reduction="none")
    pair = where % 3
    fine, rows = [i for i in range(3) if i != pair], [i for i in range(6) if i % 3 != pair]
    assert not bad["grad"][[pair, pair + 3]].isfinite().any()
    for name in ("loss", "logits", "sign"):
        assert torch.equal(bad[name][fine], good[name][fine])
    for name in ("grad", "model_mse", "ref_mse"):
        assert torch.equal(bad[name][rows], good[name][rows])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_sixteen_bit_number_survives(dtype):
    """Widening and rounding of every value there is, against PyTorch's: subnormals, Inf, and the tails of odd sizes."""
    every = torch.arange(-2**15, 2**15).to(torch.int16).view(dtype)
    every = every[every.isfinite() & (every.abs() < (60000 if dtype == torch.float16 else 1e10))]
    model = torch.stack([every, torch.zeros_like(every)])
    ref, target = torch.ones_like(model), torch.zeros_like(model)
    ref[0] = 0.5 * model[0]
    got = run((model, ref, target), "native", flipper="none", beta=1e-3)
    sums = model.double().square().mean(1)
    torch.testing.assert_close(got["model_mse"].double(), sums, rtol=1e-6, atol=0)
    assert_within_twice((model, ref, target), flipper="none", beta=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_more_than_2_to_the_31_elements():
    """Zeros, and in every piece another number: policy and gradient are at most 8 GiB, the target's pages are only read."""
    free, elements = psutil.virtual_memory().available, 2**30 + 1
    if free < 10 << 30:
        pytest.skip(f"{free >> 30} GiB of free memory, and the gradient alone has 4")
    model, target = (torch.from_numpy(np.zeros((rows, elements), np.int16)).view(torch.bfloat16) for rows in (2, 1))
    model[:, ::PIECE] = 1
    model[1, -1] = 2**18  # is the first of a piece
    loss, stats = seppo_loss(model.requires_grad_(), model.detach(), target, return_stats=True, backend="native")
    ones = 2**30 // PIECE
    assert stats.logits.item() == 0
    assert stats.model_mse.tolist() == pytest.approx([(ones + 1) / elements, (ones + 2**36) / elements], rel=1e-6)
    loss.backward()
    assert model.grad[1, -1] == 2**18 * model.grad[1, 0] != 0
    assert (model.grad[1, :-1:PIECE] == model.grad[1, 0]).all() and (model.grad[0, ::PIECE] == -model.grad[1, 0]).all()


@pytest.fixture
def with_library(tmp_path, monkeypatch):
    """`with_library(bytes)`: what native says of the CPU, and warns of, when this is its library."""

    def ask(library):
        file = tmp_path / "_cpu.so"  # of a path that was not loaded yet
        file.write_bytes(library)
        monkeypatch.setitem(native.LIBRARIES, "cpu", file)
        x = torch.zeros(2, 3)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            seppo_loss(x, x, x), seppo_loss(x, x, x)
            reasons = available_backends("cpu")
        assert reasons["reference"] == "available"
        return reasons["native"], [str(warning.message) for warning in seen if warning.category is RuntimeWarning]

    _find_out.cache_clear()
    yield ask
    _find_out.cache_clear()


def test_a_library_that_cannot_be_loaded_says_why_once(with_library):
    reason, warned = with_library(b"not a library")
    assert "cannot be loaded" in reason and ("file too short" in reason or "invalid ELF header" in reason), reason
    assert warned == [f"seppo_fast: {reason}; a slower backend is used"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcc"), reason="there is no C compiler")
def test_a_library_of_other_sources_is_not_used(tmp_path, with_library):
    """Nothing else would notice that its operators have another signature."""
    source = b"int seppo_fast_abi() { return 2; }"
    subprocess.run(["gcc", "-shared", "-xc", "-", "-o", str(tmp_path / "old.so")], input=source, check=True)
    reason, warned = with_library((tmp_path / "old.so").read_bytes())
    assert reason == f"_cpu.so was built from other sources (its interface is 2, not {native.ABI}): install seppo_fast again"
    assert len(warned) == 1


def test_it_is_what_auto_takes():
    assert available_backends("cpu")["native"] == "available"
    inputs = make((4, 4, 8, 8), torch.bfloat16)
    auto, named = run(inputs, "auto"), run(inputs, "native")
    assert all(torch.equal(auto[name], named[name]) for name in auto)
