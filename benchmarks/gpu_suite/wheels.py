"""The wheels that a GPU machine without a network lacks, fetched or built here, with their sizes.

DALI is left out: it is larger than all the others together, and videos can be decoded without it.
"""

import os
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# What PyTorch's container images usually have, with all that these packages require. Of PLAIN the requirements do not count as
# present, because they differ between versions.
PRESENT = ("torch", "triton", "accelerate", "pytest", "scikit-learn", "matplotlib", "pandas", "pyarrow", "psutil", "pillow",
           "requests", "msgpack", "einops", "py-cpuinfo", "xxhash", "ninja", "setuptools", "wheel")
PLAIN = ("transformers", "peft", "tokenizers", "regex")
NEEDED = ("diffusers", "deepspeed", "datasets", "pydantic", "braceexpand", "xformers", "av")
PLATFORMS = [f"manylinux{kind}_x86_64" for kind in ("_2_28", "_2_27", "_2_24", "_2_17", "2014", "1")]


def required(names: Iterable[str]) -> set[str]:
    """These packages and all that they require on Linux without extras. A package that is not installed here requires nothing."""
    found: set[str] = set()
    waiting = [canonicalize_name(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        try:
            requirements = map(Requirement, distribution(name).requires or [])
        except PackageNotFoundError:
            continue
        waiting += [canonicalize_name(each.name) for each in requirements
                    if each.marker is None or each.marker.evaluate({"extra": ""})]
    return found


def missing(present: Iterable[str] = (), needed: Iterable[str] = NEEDED) -> list[str]:
    """The packages to bring, sorted. `present`: more packages that the machine has."""
    return sorted(required(needed) - required(PRESENT) - {canonicalize_name(name) for name in (*PLAIN, *present)})


def pinned(name: str, constraints: Path) -> str:
    """`name==version` from constraints.txt, or the name alone where it pins none."""
    lines = {canonicalize_name(line.split("==")[0]): line for line in constraints.read_text().split("\n") if "==" in line}
    return lines.get(canonicalize_name(name), name)


def fetch(folder: Path, constraints: Path, python: str, present: Iterable[str] = ()) -> list[Path]:
    """Wheels in `folder` of all missing packages, for `python` ("3.12") on x86-64. Without a published wheel it is built."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    where = ["--python-version", python, "--implementation", "cp",
             *(option for platform in PLATFORMS for option in ("--platform", platform))]
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    for name in missing(present):
        requirement = pinned(name, constraints)
        found = subprocess.run([*pip, "download", "--no-deps", "--only-binary=:all:", *where, "-d", str(folder), requirement],
                               capture_output=True, text=True, check=False)
        if found.returncode:  # no wheel is published
            built = subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), requirement],
                                   capture_output=True, text=True, check=False, env=os.environ | {"DS_BUILD_OPS": "0"})
            if built.returncode:
                raise SystemExit(f"{requirement}: no wheel can be downloaded ({found.stderr.strip()[-300:]}) and none can be built"
                                 f" ({built.stderr.strip()[-300:]})")
    return sorted(folder.glob("*.whl"))


def listed(wheels: Iterable[Path]) -> str:
    """A line for each wheel with its size, and the sum."""
    sizes = {wheel.name: wheel.stat().st_size for wheel in wheels}
    lines = [f"{size / 2**20:7.2f} MiB  {name}" for name, size in sizes.items()]
    return "\n".join([*lines, f"{sum(sizes.values()) / 2**20:7.2f} MiB  in all, {len(sizes)} wheels"])
