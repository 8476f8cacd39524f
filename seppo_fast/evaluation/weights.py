"""Where a score's weights are (the user's paths, else the hub), and what the files hold."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from safetensors.torch import load_file
from torch import Tensor

from seppo_fast.errors import UserError, few
from seppo_fast.models.files import REFETCH, check_pickle, check_tensors, load_pickle
from seppo_fast.models.hub import one_set, small_files
from seppo_fast.opening import expanded

TOKENIZER = "tokenizer"  # of this part of a score, a repository's weights are not needed
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt")  # a tokenizer has one of them


class MissingWeights(UserError):
    """A score cannot be computed: the message says which part is missing, where it is published, and the flag for its path."""


class NeedsWeights(Protocol):
    """Any score: what has weights to find."""

    @property
    def name(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def wants(self) -> Mapping[str, str]: ...


def flags(score: NeedsWeights, part: str) -> tuple[str, ...]:
    """The names of a part after --weights, the usual name first."""
    return (score.name, f"{score.name}.{part}") if part == "model" else (f"{score.name}.{part}",)


def source(score: NeedsWeights, part: str, given: Mapping[str, str]) -> str:
    """Where a part comes from: a path that the user gave, or where it is published."""
    return _path(score, part, given) or score.wants[part]


def locate(score: NeedsWeights, given: Mapping[str, str]) -> dict[str, Path]:
    """Part -> its file or folder: `given["name"]` for the part "model", `given["name.part"]` for any, else the hub's.

    A tokenizer beside the model that was given is used.
    """
    return {part: _part(score, part, given) for part in score.wants}


def read_tensors(path: Path) -> dict[str, Any]:
    """The tensors in a safetensors file or a pickled dictionary, on the CPU; no code in a pickle is run."""
    safetensors = path.suffix == ".safetensors"
    check_tensors(path) if safetensors else check_pickle(path)
    content = load_file(path) if safetensors else load_pickle(path, "cpu")
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__} and not tensors by name. {REFETCH}.")
    return content


def check_fit(path: Path, expected: Mapping[str, Tensor], found: Mapping[str, Any], what: str) -> None:
    """UserError unless `found` in `path` has exactly the names and shapes of `expected`, the weights of `what`."""
    shapes = {name: (_shape(found[name]), _shape(expected[name])) for name in sorted(expected.keys() & found.keys())}
    faults = {
        "missing": sorted(expected.keys() - found.keys()), "unknown": sorted(found.keys() - expected.keys()),
        "of another shape": [f"{name} {has} for {wants}" for name, (has, wants) in shapes.items() if has != wants],
    }
    told = [f"{kind}: {few(names)}" for kind, names in faults.items() if names]
    if told:
        raise UserError(f"{path} does not hold the weights of {what} ({'; '.join(told)}). "
                        "It is another model's file, or not the one published.")


def _shape(tensor: Any) -> str:
    return str(tuple(tensor.shape)) if isinstance(tensor, Tensor) else f"of type {type(tensor).__name__}"


def _part(score: NeedsWeights, part: str, given: Mapping[str, str]) -> Path:
    usual, *_ = flags(score, part)
    path = _path(score, part, given)
    return _local(score, part, usual, expanded(path)) if path else _hub(score, part, usual)


def _path(score: NeedsWeights, part: str, given: Mapping[str, str]) -> str | None:
    """The user's path of a part, if there is one."""
    path = next((given[flag] for flag in flags(score, part) if flag in given), None)
    if path is None and part == TOKENIZER and (model := _path(score, "model", given)):
        return next((str(folder) for folder in _tokenizer_folders(expanded(model))
                     if any((folder / name).is_file() for name in VOCABULARIES)), None)
    return path


def _tokenizer_folders(model: Path) -> tuple[Path, Path]:
    """The folders in which a tokenizer may be: the model's, or that of its file, and a `tokenizer` in it."""
    folder = model.parent if model.is_file() else model
    return folder, folder / TOKENIZER


def _local(score: NeedsWeights, part: str, flag: str, path: Path) -> Path:
    """The path that the user gave, checked to be a folder or file as needed; a folder that has the file is right, too."""
    _, file = _source(score, part)
    if file and path.is_dir():
        path = path / file
    if not (path.is_file() if file else path.is_dir()):
        raise MissingWeights(_message(score, part, flag, f"{path} is no {'file' if file else 'folder'}"))
    return path


def _hub(score: NeedsWeights, part: str, flag: str) -> Path:
    """The hub's file or snapshot; without a connection, the one in the hub's cache."""
    if score.wants[part].startswith("https://"):
        raise MissingWeights(_message(score, part, flag, "it is not on the hub"))
    repository, file = _source(score, part)
    try:
        # called first, because it fails at once without a connection, where the others retry for half a minute
        names = [entry.rfilename for entry in HfApi().model_info(repository).siblings or []]
        if file:
            return Path(hf_hub_download(repository, file))
        return Path(snapshot_download(repository, allow_patterns=needed(names, part)))
    except Exception as error:  # no connection, no such repository, gated, disk full: the user decides what to do
        try:
            # not snapshot_download, which calls a snapshot incomplete when it lacks files that were never asked for
            entry = file or ("tokenizer_config.json" if part == TOKENIZER else "config.json")
            cached = Path(hf_hub_download(repository, entry, local_files_only=True))
            return cached if file else cached.parent
        except OSError:
            reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
            raise MissingWeights(_message(score, part, flag, f"it could not be fetched ({reason})")) from error


def needed(names: list[str], part: str) -> list[str]:
    """A repository's files that a transformers folder needs: configurations, vocabularies, one set of weights."""
    top = [name for name in names if "/" not in name]
    return sorted(small_files(top) + ([] if part == TOKENIZER else one_set(top, "transformers", None)))


def _source(score: NeedsWeights, part: str) -> tuple[str, str]:
    """Repository and file; the file is "" where the part is a whole repository. For a URL, the URL and its last part."""
    if score.wants[part].startswith("https://"):
        return score.wants[part], score.wants[part].rsplit("/", 1)[1]
    owner, name, *file = score.wants[part].split("/", 2)
    return f"{owner}/{name}", "".join(file)


def _message(score: NeedsWeights, part: str, flag: str, reason: str) -> str:
    repository, file = _source(score, part)
    form = f"the file {file}" if file else f"the folder of {repository}"
    place = repository if repository.startswith("https://") else f"https://huggingface.co/{repository}"
    return (f"{score.label} ({score.name}) lacks its {part}: {reason}. It wants {form}, published at {place}; "
            f"give it by --weights {flag}=PATH.")
