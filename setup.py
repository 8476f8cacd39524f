"""Builds csrc/ into two plain shared libraries, seppo_fast/_cpu.so and seppo_fast/_cuda.so; the rest is in pyproject.toml.

They use torch's stable ABI and nothing of Python, so one wheel works for every Python and every torch >= 2.10. Install torch
first and build with `pip install --no-build-isolation`. SEPPO_FAST_BUILD=cpu|cuda|none decides what is built: `cpu`, or `cuda`
(which includes the CPU), fail where they cannot be built. By default, a library that cannot be built is a warning.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
HEADERS = ["csrc/pair_loss.h", "csrc/tensors.h"]
TORCH_2_10 = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# No -march and no -ffast-math: cpu.cpp picks its instructions at run time, and NaN must stay NaN.
CPU_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized", TORCH_2_10]
CUDA_FLAGS = ["-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", "--expt-relaxed-constexpr", TORCH_2_10, "-DUSE_CUDA",
              "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]"]
# libtorch.so loads libtorch_cpu.so, and in CUDA builds of torch also libtorch_cuda.so: a library that is linked against it on a
# machine without CUDA finds everything on one with CUDA.
LINK = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]


class CannotBuild(Exception):
    """Says what is missing, in one line."""


def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise CannotBuild("torch is not installed in the environment that builds (pip install torch first, then"
                          " pip install --no-build-isolation)")
    return Path(spec.submodule_search_locations[0])


def cxx() -> str:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if compiler is None or shutil.which(compiler.split()[0]) is None:
        raise CannotBuild(f"there is no C++ compiler ({compiler or 'g++, clang++, c++'})")
    return compiler


def nvcc() -> str:
    """The path of nvcc. It alone decides whether CUDA code is built, because machines that build often have no GPU."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc") or shutil.which(
        "nvcc", path="/usr/local/cuda/bin")
    if found is None:
        raise CannotBuild("there is no nvcc (on PATH or under CUDA_HOME)")
    return found


def cuda_sources() -> str:
    """A checksum of _cuda.so's sources and flags. It is the library's build id, by which tests recognise a current one."""
    files = [(ROOT / file).read_bytes() for file in ("csrc/cuda.cu", *HEADERS)]
    return hashlib.sha256(b"\0".join([*files, " ".join(CUDA_FLAGS).encode()])).hexdigest()


def command(name: str, output: str) -> list[str]:
    torch = torch_folder()
    if name == "_cpu":
        return [*cxx().split(), *CPU_FLAGS, "-isystem", str(torch / "include"), "csrc/cpu.cpp", "-o", output,
                f"-L{torch / 'lib'}", *LINK]
    return [nvcc(), "-ccbin", cxx(), *CUDA_FLAGS, "-isystem", str(torch / "include"), "csrc/cuda.cu", "-o", output,
            f"-L{torch / 'lib'}", f"-Xlinker=--build-id=0x{cuda_sources()}",
            *(f"-Xlinker={flag.removeprefix('-Wl,')}" for flag in LINK[:1]), *LINK[1:]]


class BuildLibraries(build_ext):
    """Runs one compiler command for each library, in place of setuptools' recipe for Python extension modules."""

    def run(self) -> None:
        wanted = os.environ.get("SEPPO_FAST_BUILD", "")
        if wanted not in ("", "cpu", "cuda", "none"):
            raise SystemExit(f"SEPPO_FAST_BUILD must be cpu, cuda or none, got {wanted!r}")
        names = {"": ["_cpu", "_cuda"], "cpu": ["_cpu"], "cuda": ["_cpu", "_cuda"], "none": []}[wanted]
        self.extensions = [each for each in self.extensions if each.name.removeprefix("seppo_fast.") in names]
        self.must = bool(wanted)
        self.copied = bool(self.inplace or self.editable_mode)  # into the source folder; setuptools changes it while it builds
        super().run()

    def build_extension(self, extension: Extension) -> None:
        name = extension.name.removeprefix("seppo_fast.")
        output = Path(self.get_ext_fullpath(extension.name))
        for stale in (output, Path("seppo_fast") / f"{name}.so")[:1 + self.copied]:
            stale.unlink(missing_ok=True)  # no library is better than one of another version
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            if sys.platform != "linux":
                raise CannotBuild(f"only Linux is supported, this is {sys.platform}")
            arguments = command(name, str(output))
            print(" ".join(arguments), flush=True)
            try:
                subprocess.run(arguments, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise CannotBuild(f"the compiler failed ({error}), see above") from error
        except CannotBuild as error:
            if self.must:
                raise SystemExit(f"seppo_fast: cannot build {name}.so: {error}") from error
            slower = "'triton' or 'reference'" if name == "_cuda" else "'reference'"
            # pip shows stderr only with -v; seppo_fast.ops.available_backends() says it again.
            print(f"\nWARNING: seppo_fast: {name}.so is not built: {error}. The loss will run on the {slower} backend.\n",
                  file=sys.stderr, flush=True)

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"  # without Python's version, which the library does not depend on


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension("seppo_fast._cpu", ["csrc/cpu.cpp"], depends=[*HEADERS, "csrc/cpu_kernels.h"], optional=True),
            Extension("seppo_fast._cuda", ["csrc/cuda.cu"], depends=HEADERS, optional=True),
        ],
        cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel},
    )
