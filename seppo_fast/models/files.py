"""Which files hold a component's weights, and whether they are whole."""

import json
import math
import os
import re
import struct
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from seppo_fast.errors import UserError
from seppo_fast.opening import open_file, read_object, unreadable
from seppo_fast.strict import GivenTwice, parse_json

# library -> file stems of its safetensors and of its pickled weights
STEMS = {
    "diffusers": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "transformers": ("model", "pytorch_model"),
}
SMALL = (".json", ".txt", ".model", ".jinja")  # configurations, vocabularies, chat templates
MOST_HEADER = 100_000_000  # the safetensors library's own limit
SWITCHES = ("force_zeros_for_empty_prompt", "is_cosxl_edit")  # SDXL's in model_index.json
REFETCH = "The download is probably incomplete: fetch the model again"


@dataclass(frozen=True)
class Weights:
    """A component's weights: their files (the index first where there are shards), and the loader's arguments for them."""

    entry: str
    files: tuple[Path, ...]
    variant: str | None
    safetensors: bool


def entry_point(names: Collection[str], library: str, variant: str | None) -> tuple[str, str | None, bool] | None:
    """The file to load, `(name, variant, is safetensors)`: the variant's before others, safetensors before pickles."""
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
    """The variants ("fp16") that have weights here: stem.VARIANT.extension, indices and both forms of shards."""
    stems = "|".join(STEMS[library])
    shard = r"(?:-\d+-of-\d+)?"
    form = re.compile(rf"(?:{stems}){shard}(?:\.([\w-]+?))?{shard}\.(?:safetensors|bin)(?:\.index(?:\.([\w-]+))?\.json)?")
    tags = {tag for match in map(form.fullmatch, names) if match for tag in match.groups() if tag}
    return sorted(tags)


def check_variant(where: object, names: Collection[str], library: str, key: str | None) -> None:
    """`UserError` where all weights are of other variants than the one asked for; `key` is the setting that asks for one."""
    if others := variants(names, library):
        quoted = [f"{tag!r}" for tag in others]
        advice = f"set {key} to {' or '.join(quoted)}" if key else "rename its files, or give one without a variant"
        raise UserError(f"{where} holds weights of the variant{'s' * (len(others) > 1)} {', '.join(quoted)} alone: {advice}.")


def find_weights(folder: Path, library: str, variant: str | None, key: str | None = None) -> Weights:
    """The complete weights in `folder`, or a UserError that names the wrong file. `key` is the setting of the variant."""
    check_folder(folder)
    names = set(os.listdir(folder))
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
    if not all(isinstance(name, str) and name for name in weight_map.values()):
        raise UserError(f"{index}: its \"weight_map\" should give each weight the name of a file. {REFETCH}.")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if Path(name).name != name or not os.path.exists(index.parent / name)]
    if missing:
        raise UserError(f"{index} lists {len(names)} shards, of which {len(missing)} are missing: "
                        f"{', '.join(missing[:5])}. {REFETCH}.")
    return names


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model's file, or a UserError that names it."""
    value = read_object(path, f"{REFETCH}.")
    for key, item in value.items():
        # The only key that is infinite in diffusers' own defaults.
        if not finite(item) and not (key == "lambda_min_clipped" and item == -math.inf):
            raise UserError(f"{path}: {key} is {json.dumps(item)[:60]}, and no finite number. {REFETCH}.")
    return value


def read_index(file: Path) -> dict[str, Any]:
    """Check model_index.json: an entry that is not a name with library and class would be used as a path, or fail later."""
    index = read_json(file)
    for name, value in index.items():
        if isinstance(value, list) and not (len(value) == 2 and all(isinstance(part, str | None) for part in value)):
            raise UserError(f"{file}: {name} is {value!r}, where [library, class] is expected. {REFETCH}.")
        if isinstance(value, list) and not name.isidentifier():
            raise UserError(f"{file}: {name!r} is no name of a component. {REFETCH}.")
    for switch in SWITCHES:
        if not isinstance(index.get(switch, True), bool):
            raise UserError(f"{file}: {switch} is {index[switch]!r}, where true or false is expected. {REFETCH}.")
    return index


def finite(value: Any) -> bool:
    """Whether a JSON value has no NaN and no infinity: Python reads NaN, Infinity and 1e400 as numbers."""
    if isinstance(value, float):
        return math.isfinite(value)
    return all(map(finite, value.values() if isinstance(value, dict) else value)) if isinstance(value, dict | list) else True


def check_folder(folder: Path) -> None:
    """Refuse small files that a library would open by name, where one cannot be read or is not a file."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise unreadable(folder, error) from error
    for path in (folder / name for name in names if name.endswith(SMALL)):
        if path.exists() and not path.is_dir():  # the hub's cache may hold links to files that were never fetched
            open_file(path).close()


def check_not_empty(path: Path) -> None:
    """Refuse what is not a readable file, and pointers of git-lfs."""
    with open_file(path, f"{REFETCH}.") as file:
        start = file.read(24)
    if not start:
        raise UserError(f"{path} is empty (0 bytes). {REFETCH}.")
    if start == b"version https://git-lfs.":
        raise UserError(f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in its repository.")


def check_tensors(path: Path) -> None:
    """Refuse a safetensors file that is not as long as its header says, or whose header has a name twice or contradicts itself.

    Such a file is 8 bytes of length, the JSON header, the tensors' bytes.
    """
    check_not_empty(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise UserError(f"{path} is truncated or no safetensors file: its header does not fit in its {size} "
                            f"bytes. {REFETCH}.")
        if length > MOST_HEADER:
            raise UserError(f"{path} has a damaged safetensors header (of {length} bytes). {REFETCH}.")
        try:
            header = parse_json(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            why = f" ({error})" if isinstance(error, GivenTwice) else ""
            raise UserError(f"{path} has a damaged safetensors header{why}. {REFETCH}.") from error
    if size != expected:
        raise UserError(f"{path} has {size} bytes where its header announces {expected}. {REFETCH}.")
    try:
        safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:  # offsets, shapes and dtypes that contradict each other
        raise UserError(f"{path} has a damaged safetensors header ({error}). {REFETCH}.") from error


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a safetensors file's tensors, by name."""
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


def check_pickle(path: Path) -> None:
    """Refuse pickled weights that are truncated, or hold more than tensors; no code in them is run."""
    check_not_empty(path)
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    # A torch zip archive has its directory at the end, so a truncated one is not a zip file.
    if zipped and not zipfile.is_zipfile(path):
        raise UserError(f"{path} is truncated. {REFETCH}.")
    load_pickle(path, "meta", mmap=zipped)


def load_pickle(path: Path, device: str, mmap: bool = False) -> Any:
    """The content of a pickle of tensors; a `UserError` for any other pickle. No code in it is run."""
    try:
        return torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except MemoryError:
        raise
    except Exception as error:  # the unpickler's own, EOFError, RuntimeError, KeyError, ...
        raise UserError(f"{path} is damaged, or a pickle of more than tensors, which would run code and is not loaded. "
                        f"{REFETCH}, or give it as safetensors.") from error
