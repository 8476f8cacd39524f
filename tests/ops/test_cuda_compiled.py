"""csrc/cuda.cu: what nvcc makes of it for both chips."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
OPT_IN = {80: 163 << 10, 90: 227 << 10}  # the most shared memory of a block of each chip, static and dynamic
NAMES = {"float": "f", "half": "6__half", "bfloat16": "13__nv_bfloat16"}  # as C++ mangles them

builds = pytest.mark.skipif(NVCC is None, reason="there is no nvcc")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The object file for both chips, with the host's side, and ptxas's report."""
    output = tmp_path_factory.mktemp("cuda") / "cuda.o"
    include = str(Path(torch.__file__).parent / "include")
    command = [NVCC, "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA",
               "-isystem", include, *(f"-gencode=arch=compute_{chip},code=sm_{chip}" for chip in OPT_IN), "-Xcompiler", "-fPIC",
               "-Xptxas", "-v", "-c", str(ROOT / "csrc/cuda.cu"), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output, done.stderr


@pytest.fixture(scope="module", params=list(OPT_IN))
def chip(request, built):
    """Chip, ptxas's report by kernel, SASS by kernel."""
    output, said = built
    pattern = (rf"Compiling entry function '(\S+)' for 'sm_{request.param}'.*?(\d+) bytes stack frame, (\d+) bytes spill stores,"
               r" (\d+) bytes spill loads.*?Used (\d+) registers")
    report = {name: tuple(map(int, rest)) for name, *rest in re.findall(pattern, said, re.S)}
    tool = cuobjdump()
    sass = {}
    if tool:
        text = subprocess.run([tool, "-sass", "-arch", f"sm_{request.param}", str(output)], capture_output=True, text=True,
                              check=True).stdout
        sass = {part.split(None, 1)[0]: part for part in text.split("Function : ")[1:]}
    return request.param, report, sass


def cuobjdump():
    if importlib.util.find_spec("triton"):
        import triton
        return triton.knobs.nvidia.cuobjdump.path
    return shutil.which("cuobjdump")


def kernels(found, kernel, name, from_errors=False):
    """The instantiation for policy, reference (if it is not known by its errors) and target of one dtype, with 16-byte accesses."""
    code = NAMES[name]
    again = "f" if code == "f" else r"S\w*?_"
    reference = r"N\w*?6ScoredE" if from_errors else again
    chosen = [k for k in found if re.search(rf"\d{kernel}I{code}{reference}{again}Lb1E", k)]
    assert len(chosen) == 1, (kernel, name, chosen)
    return found[chosen[0]]


# What runs SD-1.5 and video shapes: on sm_80 one block and the cooperative grid, on sm_90 clusters.
PATHS = [(80, "clustered"), (80, "cooperative"), (90, "clustered")]


@builds
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_no_spills(chip, name):
    number, report, _ = chip
    for kernel in [kernel for other, kernel in PATHS if other == number]:
        for from_errors in (False, True):
            stack, stores, loads, registers = kernels(report, kernel, name, from_errors)
            assert (stack, stores, loads) == (0, 0, 0) and registers <= 64, (number, kernel, name, from_errors)


@builds
@pytest.mark.timeout(900)
def test_little_is_spilled_anywhere(chip):
    """Not on a path that the usual shapes take; a few bytes are left where they are not worth slower code."""
    assert len(chip[1]) > 30
    for name, (_, stores, loads, _) in chip[1].items():
        assert stores <= 32 and loads <= 32, name


@builds
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("from_errors", [False, True])
def test_16_bytes_at_a_time(chip, name, from_errors):
    """Every input element read once and every gradient element written once, in 16-byte accesses, in one kernel."""
    number, _, sass = chip
    if not sass:
        pytest.skip("there is no cuobjdump")
    steps = 16 * (4 if name == "float" else 2) // 16  # 16 elements of a half; the code of the two halves is one loop
    for kernel in [kernel for other, kernel in PATHS if other == number]:
        code = kernels(sass, kernel, name, from_errors)
        loads = re.findall(r"\bLDG\.E\.\S*", code)
        wide = [load for load in loads if ".128" in load]
        assert len(wide) == (2 if from_errors else 3) * steps, (kernel, loads)
        rest = [load for load in loads if load not in wide and "STRONG" not in load]  # STRONG is what other blocks summed
        assert rest == (["LDG.E.CONSTANT"] * 2 if from_errors else []), "the reference's two errors"
        assert len(re.findall(r"\bSTG\.E\.128", code)) == steps
        assert not re.search(r"\b(LDL|STL)\b", code)


@builds
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("nm") is None, reason="there is no nm")
def test_every_kernel_is_asked_for_itself(built, chip):
    """Whether clusters fit, and the permission for large blocks, are kept by the kernel: one kept answer each, none shared."""
    names = subprocess.run(["nm", "-C", str(built[0])], capture_output=True, text=True, check=True).stdout
    kept = re.findall(r"^\S+ \w \(anonymous namespace\)::largest_cluster_fits<(.*)>\(.*::answers$", names, re.M)
    kernels = [name for name in chip[1] if "9clusteredI" in name]
    assert len(kernels) == 18 and len(kept) == len(set(kept)) == len(kernels), kept
    assert all("clustered<" in kernel for kernel in kept)


@builds
@pytest.mark.timeout(900)
def test_shared_memory_of_every_launch(built, chip):
    """Static and dynamic together are what a block may have: 48 KB, but where csrc/cuda.cu asks for more."""
    tool = cuobjdump()
    if not tool:
        pytest.skip("there is no cuobjdump")
    usage = subprocess.run([tool, "-res-usage", "-arch", f"sm_{chip[0]}", str(built[0])], capture_output=True, text=True,
                           check=True).stdout
    shared = {name: int(size) for name, size in re.findall(r"Function (\S+):.*?SHARED:(\d+)", usage, re.S)}
    group = 32 << 10  # kGroupBytes
    dynamic = {"9clustered": 4 * group, "11cooperative": group, "13gradient_pass": group, "8sum_pass": 0, "11finish_pass": 0,
               "8rescaled": 0}
    assert shared.keys() == chip[1].keys()
    for name, static in shared.items():
        kernel = next(kernel for kernel in dynamic if kernel + "I" in name)
        assert static + dynamic[kernel] <= (OPT_IN[chip[0]] if kernel == "9clustered" else 48 << 10), name
