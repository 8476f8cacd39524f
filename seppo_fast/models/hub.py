"""A model from the hub: only the files that training and the exported pipeline need."""

from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from seppo_fast.errors import UserError
from seppo_fast.models.files import SMALL, check_variant, entry_point, read_index
from seppo_fast.models.labels import KEYS, Labels

PIPELINE, COMPONENT = "model_index.json", "config.json"
TRAINED_WITH = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


def download(repository: str, revision: str | None, variant: str | None, key: str = "path", labels: Labels = KEYS) -> Path:
    """The local snapshot of the pipeline that the setting `key` names, or of a component for a `key` other than "path".

    Without a connection it is the snapshot in the hub's cache.
    """
    named = f"{getattr(labels, key)} {repository!r}"
    kind, index = ("pipeline", PIPELINE) if key == "path" else ("component", COMPONENT)
    try:
        # called first, because it fails at once without a connection, where the others retry for half a minute
        info = HfApi().model_info(repository, revision=revision)
        names = [file.rfilename for file in info.siblings or []]
        if index in names:
            parts = read_index(Path(hf_hub_download(repository, PIPELINE, revision=revision))) if key == "path" else {}
            check_sets(repository, names, parts if key == "path" else {"": ["diffusers", ""]}, variant, labels)
            wanted = needed(names, parts, variant) if key == "path" else [index, *one_set(names, "diffusers", variant)]
            return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except UserError:
        raise
    except GatedRepoError as error:
        raise UserError(f"{named} is gated: accept its terms on the hub and log in (`hf auth login`).") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{named} is neither a local directory nor a repository on the hub that you may read. "
                        "Check the spelling; a private one needs `hf auth login`.") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{labels.revision} {revision!r} does not exist in {repository!r} on the hub.") from error
    except HFValidationError as error:
        raise UserError(f"{named} is no local directory and no hub id: {error}") from error
    except Exception as error:  # the hub's HTTP library, and so its errors without a connection, has changed twice
        try:
            # not snapshot_download, which calls a snapshot incomplete when it lacks files that were never asked for
            return Path(hf_hub_download(repository, index, revision=revision, local_files_only=True)).parent
        except OSError:
            raise UserError(f"{named} is no local directory, and could not be fetched from the hub "
                            f"({type(error).__name__}: {error}). Give a diffusers directory, or connect.") from error
    raise UserError(f"{named} on the hub has no {index}: it is no diffusers {kind}.")


def check_sets(repository: str, names: list[str], index: dict[str, Any], variant: str | None, labels: Labels) -> None:
    """`UserError`, before anything is fetched, where a component needed for training has only weights of other variants."""
    for component in ("", *TRAINED_WITH):
        if isinstance(index.get(component), list):
            inside, library = inside_of(names, component), library_of(index[component])
            if entry_point(inside, library, variant) is None:
                check_variant("/".join(filter(None, (repository, component))), inside, library, labels.variant)


def inside_of(names: list[str], component: str) -> set[str]:
    """The names of the files in a component's folder; "" is the repository's top folder."""
    return {PurePosixPath(name).name for name in names if PurePosixPath(name).parent == PurePosixPath(component)}


def library_of(value: list[Any]) -> str:
    """The library that names the weights of an entry in model_index.json."""
    return "diffusers" if value[0] == "diffusers" else "transformers"


def needed(names: list[str], index: dict[str, Any], variant: str | None) -> list[str]:
    """A repository's files that the pipeline's components need: configurations, vocabularies, one set of weights."""
    wanted = [PIPELINE]
    for component, value in index.items():
        if not (isinstance(value, list) and value and value[0]):
            continue
        inside, library = inside_of(names, component), library_of(value)
        wanted += [f"{component}/{name}" for name in small_files(inside) + one_set(inside, library, variant)]
    return sorted(wanted)


def small_files(names: Collection[str]) -> list[str]:
    """Configurations and vocabularies, without indices: an index of weights that are not fetched would list missing shards."""
    return [name for name in names if name.endswith(SMALL) and ".index." not in name]


def one_set(names: Collection[str], library: str, variant: str | None) -> list[str]:
    """The files of one set of weights in a component's folder: a single file, or an index and its shards."""
    found = entry_point(names, library, variant)
    if found is None:
        return []
    entry, tag, safetensors = found
    if not entry.endswith(".json"):
        return [entry]
    extension = ".safetensors" if safetensors else ".bin"
    parts = [name for name in names if fnmatch(name, f"*-of-*{extension}")]
    return [entry, *(name for name in parts if (f".{tag}" in name if tag else "." not in name.removesuffix(extension)))]
