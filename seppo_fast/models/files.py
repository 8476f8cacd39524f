"""Which files hold a component's weights, and whether they are whole."""

import json
import re
import struct
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seppo_fast.errors import UserError
from seppo_fast.strict import parse_json

# library -> file stems of its safetensors and of its pickled weights
STEMS = {
    "diffusers": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "transformers": ("model", "pytorch_model"),
}
REFETCH = "The download is probably incomplete: fetch the model again"


@dataclass(frozen=True)
class Weights:
    """A component's weights: their files (the index first when there are shards), and how a loader takes these."""

    entry: str
    files: tuple[Path, ...]
    variant: str | None
    safetensors: bool


def entry_point(names: Collection[str], library: str, variant: str | None) -> tuple[str, str | None, bool] | None:
    """The file to load, `(name, variant, is safetensors)`: the variant before none, safetensors before pickles."""
    for tag in dict.fromkeys((variant, None)):
        dot = f".{tag}" if tag else ""
        for stem, extension in zip(STEMS[library], ("safetensors", "bin"), strict=True):
            single, index = f"{stem}{dot}.{extension}", f"{stem}.{extension}.index{dot}.json"
            # each library has its own preference where both exist
            for name in (index, single) if library == "diffusers" else (single, index):
                if name in names:
                    return name, tag, extension == "safetensors"
    return None


def variants(names: Collection[str], library: str) -> list[str]:
    """The variants ("fp16") that there are weights of: in stem.VARIANT.extension, in indices and in both forms of shards."""
    stems = "|".join(STEMS[library])
    shard = r"(?:-\d+-of-\d+)?"
    form = re.compile(rf"(?:{stems}){shard}(?:\.([\w-]+?))?{shard}\.(?:safetensors|bin)(?:\.index(?:\.([\w-]+))?\.json)?")
    tags = {tag for match in map(form.fullmatch, names) if match for tag in match.groups() if tag}
    return sorted(tags)


def check_variant(where: object, names: Collection[str], library: str, key: str | None) -> None:
    """`UserError` where there are weights, but of other variants than the one that was asked for; `key` is what asks for one."""
    if others := variants(names, library):
        quoted = [f"{tag!r}" for tag in others]
        advice = f"set {key} to {' or '.join(quoted)}" if key else "rename its files, or give one without a variant"
        raise UserError(f"{where} holds weights of the variant{'s' * (len(others) > 1)} {', '.join(quoted)} alone: {advice}.")


def find_weights(folder: Path, library: str, variant: str | None, key: str | None = None) -> Weights:
    """The whole and complete weights in `folder`, or a UserError that names the file at fault. `key`: what sets the variant."""
    names = {path.name for path in folder.iterdir()}
    found = entry_point(names, library, variant)
    if found is None:
        check_variant(folder, names, library, key)
        raise UserError(f"{folder} holds no weights ({STEMS[library][0]}.safetensors). {REFETCH}.")
    entry, tag, safetensors = found
    files = [folder / entry]
    if entry.endswith(".json"):
        files += [folder / shard for shard in shards(folder / entry)]
    for file in files[-1:] if len(files) == 1 else files[1:]:
        check_tensors(file) if safetensors else check_pickle(file)
    return Weights(entry, tuple(files), tag, safetensors)


def shards(index: Path) -> list[str]:
    """File names that an index of shards lists."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f'{index} lists no shards (no "weight_map"). {REFETCH}.')
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if Path(name).name != name or not (index.parent / name).is_file()]
    if missing:
        raise UserError(f"{index} lists {len(names)} shards, of which {len(missing)} are missing: "
                        f"{', '.join(missing[:5])}. {REFETCH}.")
    return names


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a UserError that names it."""
    if not path.is_file():
        raise UserError(f"{path} is missing. {REFETCH}.")
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, not UTF-8, a key given twice
        raise UserError(f"{path} is not readable JSON ({error}). {REFETCH}.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object, not {type(value).__name__}. {REFETCH}.")
    return value


def check_not_empty(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing. {REFETCH}.")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes). {REFETCH}.")
    with path.open("rb") as file:
        if file.read(24) == b"version https://git-lfs.":
            raise UserError(f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in its repository.")


def check_tensors(path: Path) -> None:
    """A safetensors file is as long as its header says: 8 bytes of length, the JSON header, the tensors' bytes."""
    check_not_empty(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise UserError(f"{path} is truncated or no safetensors file: its header does not fit in its {size} "
                            f"bytes. {REFETCH}.")
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(f"{path} has a damaged safetensors header. {REFETCH}.") from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise UserError(f"{path} has {size} bytes where its header announces {expected}. {REFETCH}.")


def check_pickle(path: Path) -> None:
    """A torch zip archive has its directory at the end, so a truncated one is not a zip file."""
    check_not_empty(path)
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    if zipped and not zipfile.is_zipfile(path):
        raise UserError(f"{path} is truncated. {REFETCH}.")
