"""The Triton backend: in its interpreter, for real where there is a GPU, and compiled ahead of time for both chips."""

import itertools
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from fused_parity import DTYPES, FLIPPERS, SHAPES, assert_alone, assert_same_bits, assert_tie, make, run
from fused_parity import assert_within_twice as within_twice

triton = pytest.importorskip("triton")

from seppo_fast.ops import triton_kernel  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda" if torch.cuda.is_available() else None
runs = pytest.mark.skipif(DEVICE is None, reason="no GPU here: test_in_the_interpreter runs it in another process")
# The interpreter adds up a program's threads one after another, a GPU as a tree.
assert_within_twice = partial(within_twice, roundings=16 if INTERPRETED else 2)
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")


@compiles
@pytest.mark.timeout(900)
def test_in_the_interpreter():
    """All of this file that computes: the interpreter must be chosen before Triton is imported."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(Path(__file__))],
                          env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}, capture_output=True,
                          text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) > 50


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
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor,where", [(0, 0), (1, 4), (2, 2)])
def test_one_bad_pair_stays_alone(value, tensor, where):
    assert_alone("triton", DEVICE, value, tensor, where)
    assert_alone("triton", DEVICE, value, tensor, where, shape=(6, 17_000))  # in two kernels


@runs
@pytest.mark.parametrize("shape", ["sd15", "odd", "odd_large"])
def test_the_same_bits_in_any_batch(shape):
    """Repeated, and with other pairs around: a pair's result is its own."""
    inputs = make(SHAPES[shape], torch.bfloat16, DEVICE)
    first = run(inputs, "triton", reduction="none")
    for _ in range(3 if INTERPRETED else 20):
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


@runs
def test_every_output_is_written(monkeypatch):
    empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(torch.nan))
    for shape in ("odd", "seven", "odd_large"):
        model, ref, target = make(SHAPES[shape], torch.bfloat16, DEVICE)
        for output in triton_kernel.pair_loss(model, ref, target, 2000.0, 0, 1.0):
            assert output.isfinite().all()


@pytest.mark.parametrize("elements", [1, 7, 128, 129, 16384, 16385, 65536, 262144, 2**22, 2**22 + 1, 2**31, 2**33 + 5])
@pytest.mark.parametrize("size", [2, 4])
def test_the_plan_covers_every_element(elements, size):
    how = triton_kernel.plan(elements, size)
    block, warps = how["BLOCK"], how["num_warps"]
    assert block & (block - 1) == 0 and block % how["WIDTH"] == 0 and 1 <= warps <= 32
    if "CHUNKS" in how:
        assert elements <= triton_kernel.ONE_PROGRAM and (how["CHUNKS"] - 1) * block < elements <= how["CHUNKS"] * block
    else:
        each = how["slices"] * block
        assert (how["parts"] - 1) * each < elements <= how["parts"] * each
        assert (how["blocks"] - 1) * block < elements <= how["blocks"] * block
        assert how["parts"] <= how["PARTS"] <= triton_kernel.MOST_PARTS


def compiled(kernel, chip, policy, other, num_warps, **constants):
    """PTX and what `cuobjdump -res-usage` says of the kernel, for dense and aligned tensors."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    names = kernel.arg_names
    types = dict.fromkeys(("losses", "model_mse", "ref_mse", "signs", "logits", "partial"), "*fp32")
    types |= {"policy": "*" + policy, "grad": "*" + policy, "reference": "*" + other, "target": "*" + other, "beta": "fp32",
              "scale": "fp32"} | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name][0] == "*" or name == "elements"}
    source = ASTSource(kernel, signature, constexprs={(names.index(k),): v for k, v in constants.items()}, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options={"num_warps": num_warps}).asm


def resources(asm, folder):
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert len(found) == 1, "one kernel"
    return dict(zip(("registers", "stack", "shared", "local"), map(int, found[0]), strict=True))


@compiles
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("policy,other", [("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("fp16", "fp32"), ("bf16", "fp32")])
@pytest.mark.parametrize("chip", [80, 90])
def test_compiled_for_sd15(chip, policy, other, shared, tmp_path):
    """One kernel; each input read once, 16 bytes at a time; no spills."""
    how = triton_kernel.plan(16384, 4 if policy == "fp32" else 2)
    asm = compiled(triton_kernel.pair_kernel, chip, policy, other, how.pop("num_warps"), FLIPPER=0, SHARED=shared, **how)
    used = resources(asm, tmp_path)
    assert used["stack"] == used["local"] == 0 and used["registers"] * 32 * asm_warps(asm) <= 65536, used
    per_thread = 16384 // (32 * asm_warps(asm))
    vectors = {name: per_thread * (4 if name == "fp32" else 2) // 16 for name in (policy, other)}
    loads = re.findall(r"ld\.global\S*", asm["ptx"])
    assert set(loads) == {"ld.global.v4.b32"} and len(loads) == 2 * (vectors[policy] + 2 * vectors[other]), loads
    stores = re.findall(r"st\.global\S*", asm["ptx"])
    assert stores.count("st.global.v4.b32") == 2 * vectors[policy] and len(stores) == 2 * vectors[policy] + 7, stores


@compiles
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("chip", [80, 90])
def test_compiled_for_video(chip, dtype, tmp_path):
    how = triton_kernel.plan(4 * 16 * 32 * 32, 4 if dtype == "fp32" else 2)
    parts = compiled(triton_kernel.parts_kernel, chip, dtype, dtype, how["num_warps"], SHARED=False, BLOCK=how["BLOCK"],
                     WIDTH=how["WIDTH"])
    gradient = compiled(triton_kernel.gradient_kernel, chip, dtype, dtype, how["num_warps"], FLIPPER=0, SHARED=False,
                        BLOCK=how["BLOCK"], PARTS=how["PARTS"])
    for asm, tensors in ((parts, 6), (gradient, 4)):
        used = resources(asm, tmp_path)
        assert used["stack"] == used["local"] == 0, used
        vectors = how["BLOCK"] // 256 * (4 if dtype == "fp32" else 2) // 16
        loads = re.findall(r"ld\.global\S*", asm["ptx"])
        assert loads.count("ld.global.v4.b32") == tensors * vectors, loads
        assert len(loads) - tensors * vectors == (0 if tensors == 6 else 6), "the rest are the six partial sums"
    assert re.findall(r"st\.global\S*", gradient["ptx"]).count("st.global.v4.b32") == 2 * vectors


def asm_warps(asm):
    return int(re.search(r"\.reqntid (\d+)", asm["ptx"]).group(1)) // 32
