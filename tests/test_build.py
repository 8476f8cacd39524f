"""setup.py: what is built where, and what is said where something is missing. Every build goes to a folder of its own."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
NO_COMPILER = {"CXX": "no-such-compiler", "CUDA_HOME": "/no/such/cuda"}


def build(folder: Path, **environment: str) -> tuple[subprocess.CompletedProcess, set[str]]:
    """The finished process, and the names of the libraries it left."""
    run = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder / "lib"), "--build-temp",
                          str(folder / "temp")], cwd=ROOT, env=os.environ | environment, text=True, capture_output=True)
    return run, {file.name for file in folder.rglob("*.so")}


def test_a_missing_compiler_is_a_warning(tmp_path: Path) -> None:
    run, built = build(tmp_path, **NO_COMPILER)
    assert run.returncode == 0 and not built
    assert "WARNING: seppo_fast: _cpu.so is not built: there is no C++ compiler (no-such-compiler)" in run.stderr
    assert "will run on the 'reference' backend" in run.stderr and "_cuda.so is not built: there is no nvcc" in run.stderr


@pytest.mark.parametrize("what, problem", [("cpu", "there is no C++ compiler"), ("cuda", "there is no C++ compiler"),
                                           ("gpu", "SEPPO_FAST_BUILD must be cpu, cuda or none, got 'gpu'")])
def test_what_is_forced_and_cannot_be_built_fails(what: str, problem: str, tmp_path: Path) -> None:
    run, built = build(tmp_path, **NO_COMPILER, SEPPO_FAST_BUILD=what)
    assert run.returncode != 0 and not built and problem in run.stderr


def test_a_compiler_that_fails_is_a_warning_with_what_it_said(tmp_path: Path) -> None:
    broken = tmp_path / "broken++"
    broken.write_text("#!/bin/sh\necho 'internal compiler error' >&2\nexit 4\n")
    broken.chmod(0o755)
    run, built = build(tmp_path, CXX=str(broken), CUDA_HOME="/no/such/cuda")
    assert run.returncode == 0 and not built
    assert "internal compiler error" in run.stderr and "_cpu.so is not built: the compiler failed" in run.stderr


def test_nothing_is_built_when_nothing_is_wanted(tmp_path: Path) -> None:
    run, built = build(tmp_path, SEPPO_FAST_BUILD="none")
    assert run.returncode == 0 and not built and "WARNING: seppo_fast" not in run.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler")
def test_one_wheel_for_every_python(tmp_path: Path) -> None:
    """Its name says no Python and no torch, its library links none, and loads from where the wheel is unpacked."""
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.so", "*.egg-info", "tests", "benchmarks", "runs"))
    quick = tmp_path / "g++"
    quick.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} "$@" -O0\n')  # a third of the time; the last -O is the one that counts
    quick.chmod(0o755)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(tmp_path),
                    str(source)], check=True, env=os.environ | {"SEPPO_FAST_BUILD": "cpu", "CXX": str(quick)})
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    read = {str(file.relative_to(source)) for file in (source / "seppo_fast").rglob("*") if file.is_file()
            and file.suffix not in (".py", ".pyc", ".so", ".md")}
    assert len(read) > 8 and read <= set(names), "[tool.setuptools.package-data] lacks files that the package reads"
    assert any(name.endswith("licenses/LICENSE") for name in names)
    (script,) = (tmp_path / "site").glob("*.dist-info/entry_points.txt")
    assert "seppo-fast = seppo_fast.__main__:main" in script.read_text()
    library = (tmp_path / "site/seppo_fast/_cpu.so").read_bytes()
    assert b"Py_" not in library and b"PyObject" not in library and b"libtorch_python" not in library
    code = ("import torch, seppo_fast.ops as ops; print(ops.__file__); x = torch.ones(2, 3, requires_grad=True);"
            "ops.seppo_loss(x, x.detach(), 0 * x.detach(), backend='native').backward()")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "site", text=True, capture_output=True)
    assert done.returncode == 0 and str(tmp_path) in done.stdout, done.stderr
    assert torch.__version__ not in wheel.name
