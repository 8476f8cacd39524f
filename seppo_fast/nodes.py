"""What must be the same on all machines of a launch, compared before training begins; messages name the machines that differ.

Every rank must call each function. All ranks get the same answer, and so end together.
"""

import hashlib
import json
import os
import platform
import socket
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import torch

from seppo_fast import __version__
from seppo_fast.disk import TEMPORARY
from seppo_fast.errors import UserError
from seppo_fast.ranks import Ranks

PACKAGES = ("torch", "deepspeed", "diffusers", "transformers", "peft")
LAG = 10  # seconds that a network file system may take to show on one machine what another wrote
SHARED = ("All machines need the same run folder, cache, data and model under the same paths: put them on a file system that all of"
          " them mount (not /tmp)")
Section = Mapping[str, Any]
T = TypeVar("T")


def check_programs(ranks: Ranks, settings: Section) -> None:
    """Refuse ranks with other versions, another source of this program, or other `settings`; another kind of GPU is only said."""
    if ranks.world == 1:
        return
    lines = differing({"": versions(), "seppo_fast/": sources(), "the setting ": flat(settings)}, ranks)
    if lines:
        raise UserError("the machines do not run the same program, libraries and settings; what differs:\n  " + "\n  ".join(lines)
                        + "\nInstall the same versions everywhere, best from one shared environment, and give the same command")
    if ranks.device.type == "cuda" and (lines := differing({"": {"GPUs": torch.cuda.get_device_name(ranks.device)}}, ranks)):
        ranks.say(f"warning: different {lines[0]}: each update waits for the slowest")


def check_same(what: str, mine: Section, ranks: Ranks, advice: str = SHARED) -> None:
    """Refuse `what` where some machine has other values, by name, than rank 0's."""
    if ranks.world > 1 and (lines := differing({"": mine}, ranks)):
        raise UserError(f"{what} is not the same on all machines:\n  " + "\n  ".join(lines) + f"\n{advice}")


def check_shared(folders: Mapping[str, Path], ranks: Ranks) -> None:
    """Refuse folders, by their key, in which some rank does not see what rank 0 writes there; rank 0 makes what is not there."""
    if ranks.world == 1:
        return
    marks = {key: _marked(folder) for key, folder in folders.items()} if ranks.rank == 0 else {}
    try:
        names = ranks.from_first({key: mark and mark.name for key, mark in marks.items()})
        unseen = {key: str(folders[key].absolute()) for key, name in names.items() if name and not _sees(folders[key], name)}
        found = ranks.objects((socket.gethostname(), unseen))
    finally:
        for mark in filter(None, marks.values()):
            with suppress(OSError):
                mark.unlink()
    hosts = [host for host, _ in found]
    lines = []
    for key, folder in folders.items():
        blind = [rank for rank, (_, keys) in enumerate(found) if key in keys]
        if blind:
            lines.append(f"{key} {found[blind[0]][1][key]}: not seen on {named(hosts, blind)} is what {named(hosts, [0])} wrote to"
                         f" {folder.absolute()}")
    if lines:
        raise UserError("not shared by all machines:\n  " + "\n  ".join(lines) + f"\n{SHARED}")


def agreed(ranks: Ranks, work: Callable[[], T]) -> T:
    """What `work` returns on this rank. A `UserError` on one rank is raised on all, which stay in step."""
    done: list[T] = []
    why = None
    try:
        done.append(work())
    except UserError as error:
        why = str(error)
    found = ranks.objects((socket.gethostname(), why))
    hosts = [host for host, _ in found]
    failed = [rank for rank, (_, words) in enumerate(found) if words is not None]
    if not failed:
        return done[0]
    words = found[failed[0]][1]
    alike = [rank for rank in failed if found[rank][1] == words]
    fine = set(hosts) - {hosts[rank] for rank in failed}
    raise UserError(f"on {named(hosts, alike)}: {words}" if fine else words)


def in_turn(ranks: Ranks, work: Callable[[], T]) -> T:
    """The same, with the first rank before the others, because it downloads from the hub."""
    first = agreed(ranks, lambda: work() if ranks.rank == 0 else None)
    done = agreed(ranks, lambda: work() if ranks.rank != 0 else None)
    return first if ranks.rank == 0 else done  # type: ignore[return-value]


def differing(sections: Mapping[str, Section], ranks: Ranks) -> list[str]:
    """A line for each name whose value is not the same on all ranks: the values, and who has them. Digests are compared first."""
    mine = {section: hashlib.sha256(_text(values).encode()).hexdigest() for section, values in sections.items()}
    everyone = ranks.objects((socket.gethostname(), mine))
    other = [section for section in sections if any(each[section] != mine[section] for _, each in everyone)]
    if not other:
        return []
    hosts = [host for host, _ in everyone]
    values = ranks.objects({section + name: value for section in other for name, value in sections[section].items()})
    lines = []
    for name in dict.fromkeys(name for each in values for name in each):
        by_value: dict[str, list[int]] = {}
        for rank, each in enumerate(values):
            by_value.setdefault(str(each[name]) if name in each else "missing", []).append(rank)
        if len(by_value) > 1:
            lines.append(f"{name}: " + "; ".join(f"{value} on {named(hosts, who)}" for value, who in by_value.items()))
    return lines[:10] + ([f"and {len(lines) - 10} more"] if len(lines) > 10 else [])


def named(hosts: Sequence[str], chosen: Collection[int]) -> str:
    """Ranks by the names of their machines: "one (ranks 0-7), two (rank 9)"."""
    parts = []
    for host, ranks in groupby(sorted(chosen, key=lambda rank: (hosts.index(hosts[rank]), rank)), key=lambda rank: hosts[rank]):
        numbers = list(ranks)
        together = numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 1
        parts.append(f"{host} (rank{'s' * (len(numbers) > 1)} "
                     + (f"{numbers[0]}-{numbers[-1]}" if together else ", ".join(map(str, numbers))) + ")")
    return ", ".join(parts[:5]) + (f" and {len(parts) - 5} more machines" if len(parts) > 5 else "")


def versions() -> dict[str, str]:
    """This program's version, Python's and the libraries'."""
    found = {"seppo_fast": __version__, "Python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def sources() -> dict[str, str]:
    """The start of a digest of each of this package's own files of code, compiled ones included."""
    root = Path(__file__).parent
    files = sorted(file for file in root.rglob("*") if file.suffix in (".py", ".so", ".json"))
    return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files}


def sizes(folder: Path) -> dict[str, int]:
    """The bytes of each file in a model's folder and the folders in it."""
    files = (file for pattern in ("*", "*/*") for file in folder.glob(pattern) if not file.name.startswith("."))
    return {str(file.relative_to(folder)): file.stat().st_size for file in sorted(files) if file.is_file()}


def flat(settings: Section, path: str = "") -> dict[str, Any]:
    """Nested settings by their keys' whole paths."""
    found = {}
    for key, value in settings.items():
        found |= flat(value, f"{path}{key}.") if isinstance(value, Mapping) and value else {f"{path}{key}": value}
    return found


def _text(values: Section) -> str:
    return json.dumps(values, sort_keys=True, default=str)


def _marked(folder: Path) -> Path | None:
    """A new file in the folder; None where this process may not write there, and so neither does the run."""
    mark = folder / f"{TEMPORARY}{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError:
        return None
    return mark


def _sees(folder: Path, name: str) -> bool:
    """Whether a file is there; a folder that is opened anew is asked of the server anew."""
    give_up = time.monotonic() + LAG
    while True:
        with suppress(OSError):
            if name in os.listdir(folder):
                return True
        if time.monotonic() > give_up:
            return False
        time.sleep(0.2)
