"""csrc/cuda.cu: what nvcc makes of it for both chips."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from seppo_fast.ops import native

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
OPT_IN = {80: 163 << 10, 90: 227 << 10}  # the most shared memory of a block of each chip, static and dynamic
NAMES = {"float": "f", "half": "6__half", "bfloat16": "13__nv_bfloat16"}  # as C++ mangles them


def cuobjdump():
    if importlib.util.find_spec("triton"):
        import triton
        return triton.knobs.nvidia.cuobjdump.path
    return shutil.which("cuobjdump")


LIBRARY = native.LIBRARIES["cuda"]
builds = pytest.mark.skipif(not cuobjdump() or not (NVCC or LIBRARY.exists()), reason="no cuobjdump, or neither library nor nvcc")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The library for both chips: the installed one where it is of these sources and flags, else one that is built now."""
    spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
    spec.loader.exec_module(setup := importlib.util.module_from_spec(spec))
    if LIBRARY.exists() and bytes.fromhex(setup.cuda_sources()) in LIBRARY.read_bytes():
        return LIBRARY
    if not NVCC:
        pytest.skip(f"{LIBRARY.name} is of other sources, and there is no nvcc")
    output = tmp_path_factory.mktemp("cuda") / "_cuda.so"
    done = subprocess.run([*setup.command("_cuda", str(output)), "--threads=2"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module", params=list(OPT_IN))
def chip(request, built):
    """Chip, what each kernel takes (REG, STACK, SHARED, LOCAL), SASS by kernel."""
    def said(what):
        return subprocess.run([cuobjdump(), what, "-arch", f"sm_{request.param}", str(built)], capture_output=True, text=True,
                              check=True).stdout

    usage = {name: {what: int(size) for what, size in re.findall(r"(\w+):(\d+)", line)}
             for name, line in re.findall(r"Function (\S+):\s*(.*)", said("-res-usage"))}
    sass = {part.split(None, 1)[0]: part for part in said("-sass").split("Function : ")[1:]}
    assert usage.keys() == sass.keys()
    return request.param, usage, sass


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


def spilled(code):
    """The bytes that instructions store to local memory, and those that they load."""
    widths = {kind: [int(bits or 32) // 8 for bits in re.findall(rf"{kind}\b(?:\.(?:[A-Z]+\d*\.)*(64|128))?", code)]
              for kind in ("STL", "LDL")}
    return tuple(map(sum, widths.values()))


@builds
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_no_spills(chip, name):
    number, usage, sass = chip
    for kernel in [kernel for other, kernel in PATHS if other == number]:
        for from_errors in (False, True):
            takes = kernels(usage, kernel, name, from_errors)
            assert (takes["STACK"], takes["LOCAL"]) == (0, 0) and takes["REG"] <= 64, (number, kernel, name, from_errors)
            assert spilled(kernels(sass, kernel, name, from_errors)) == (0, 0)


@builds
@pytest.mark.timeout(900)
def test_little_is_spilled_anywhere(chip):
    """Not on a path that the usual shapes take; a few bytes are left where they are not worth slower code."""
    assert len(chip[1]) > 30
    for name, code in chip[2].items():
        assert max(spilled(code)) <= 32, name


@builds
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("from_errors", [False, True])
def test_16_bytes_at_a_time(chip, name, from_errors):
    """Every input element read once and every gradient element written once, in 16-byte accesses, in one kernel."""
    number, _, sass = chip
    steps = 16 * (4 if name == "float" else 2) // 16  # 16 elements of a half; the code of the two halves is one loop
    for kernel in [kernel for other, kernel in PATHS if other == number]:
        code = kernels(sass, kernel, name, from_errors)
        loads = re.findall(r"\bLDG\.E\.\S*", code)
        wide = [load for load in loads if ".128" in load]
        assert len(wide) == (2 if from_errors else 3) * steps, (kernel, loads)
        rest = [load for load in loads if load not in wide and "STRONG" not in load]  # STRONG is what other blocks summed
        assert rest == ["LDG.E.CONSTANT"] * (3 if from_errors else 1), "the caller's sign, and the reference's two errors"
        assert len(re.findall(r"\bSTG\.E\.128", code)) == steps
        assert not re.search(r"\b(LDL|STL)\b", code)


@builds
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("nm") is None, reason="there is no nm")
def test_every_kernel_is_asked_for_itself(built, chip):
    """Whether clusters fit, and the permission for large blocks, are kept by the kernel: one kept answer each, none shared."""
    names = subprocess.run(["nm", "-C", str(built)], capture_output=True, text=True, check=True).stdout
    kept = re.findall(r"^\S+ \w \(anonymous namespace\)::largest_cluster_fits<(.*)>\(.*::answers$", names, re.M)
    kernels = [name for name in chip[1] if "9clusteredI" in name]
    assert len(kernels) == 18 and len(kept) == len(set(kept)) == len(kernels), kept
    assert all("clustered<" in kernel for kernel in kept)


@builds
@pytest.mark.timeout(900)
def test_shared_memory_of_every_launch(chip):
    """Static and dynamic together are what a block may have: 48 KB, but where csrc/cuda.cu asks for more."""
    shared = {name: takes["SHARED"] for name, takes in chip[1].items()}
    group = 32 << 10  # kGroupBytes
    dynamic = {"9clustered": 4 * group, "11cooperative": group, "13gradient_pass": group, "8sum_pass": 0, "11finish_pass": 0,
               "8rescaled": 0}
    for name, static in shared.items():
        kernel = next(kernel for kernel in dynamic if kernel + "I" in name)
        assert static + dynamic[kernel] <= (OPT_IN[chip[0]] if kernel == "9clustered" else 48 << 10), name
