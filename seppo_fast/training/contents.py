"""Which models a run was made from, by what is in their files: a moved copy is the same model, and other bytes are another one."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from seppo_fast.checksums import checksum, checksum_of
from seppo_fast.models import AnimateDiff, Model
from seppo_fast.models.directory import Directory
from seppo_fast.models.improvement import network_files

Stamps = dict[str, list[list[str | int]]]


def files_of(model: Model, others: Sequence[Model | None]) -> dict[str, list[Path]]:
    """The files that decide what a run's networks answer, by the key that names them.

    VAE and text encoders are compared with the data, whose latents and embeddings they make.
    """
    files = {model.directory.labels.path: _networks(model.directory)}
    if isinstance(model, AnimateDiff) and model.adapter is not None:
        files[model.directory.labels.motion_adapter] = [model.adapter.path / "config.json",
                                                        *(file for each in model.adapter.weights.values() for file in each.files)]
    return files | {other.directory.labels.path: network_files(other) for other in others if other is not None}


def _networks(directory: Directory) -> list[Path]:
    parts = [name for name in sorted(directory.weights) if name != "vae" and not name.startswith("text_encoder")]
    return [directory.path / "scheduler" / "scheduler_config.json",
            *(file for name in parts for file in (directory.path / name / "config.json", *directory.weights[name].files))]


def sums_of(files: Mapping[str, Sequence[Path]], known: Mapping[str, str], stamps: Stamps) -> tuple[dict[str, str], Stamps]:
    """Checksums by key, and the files' stamps (path, size, times of change).

    What has the stamps of before has the checksum that was `known` then: reading 24 GB takes as long as the disk needs.
    """
    sums: dict[str, str] = {}
    now: Stamps = {key: [_stamp(path) for path in paths] for key, paths in files.items()}
    with ThreadPoolExecutor() as threads:
        for key, paths in files.items():
            if key in known and now[key] == stamps.get(key):
                sums[key] = known[key]
                continue
            each = list(threads.map(checksum, paths))
            sums[key] = each[0] if len(each) == 1 else checksum_of("".join(each).encode())
    return sums, now


def _stamp(path: Path) -> list[str | int]:
    facts = path.stat()
    return [str(path.resolve()), facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]
