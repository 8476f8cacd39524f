"""A model from the hub: only the files that training and the exported pipeline need."""

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
from seppo_fast.models.files import entry_point, read_json

INDEX = "model_index.json"
SMALL = (".json", ".txt", ".model")


def download(repository: str, revision: str | None, variant: str | None) -> Path:
    """The local snapshot of a hub repository; without a connection, the one left in the hub's cache."""
    named = f"seppo.model.path {repository!r}"
    try:
        # asked first because it fails at once without a connection, where the others retry for half a minute
        info = HfApi().model_info(repository, revision=revision)
        names = [file.rfilename for file in info.siblings or []]
        if INDEX in names:
            index = read_json(Path(hf_hub_download(repository, INDEX, revision=revision)))
            wanted = needed(names, index, variant)
            return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except UserError:
        raise
    except GatedRepoError as error:
        raise UserError(f"{named} is gated: accept its terms on the hub and log in (`hf auth login`).") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{named} is neither a local directory nor a repository on the hub that you may read. "
                        "Check the spelling; a private one needs `hf auth login`.") from error
    except RevisionNotFoundError as error:
        raise UserError(f"seppo.model.revision {revision!r} does not exist in {repository!r} on the hub.") from error
    except HFValidationError as error:
        raise UserError(f"{named} is no local directory and no hub id: {error}") from error
    except Exception as error:  # the hub's HTTP library, and with it what it raises offline, has changed twice
        try:
            # not snapshot_download, which calls a snapshot incomplete when it lacks files that nobody asked for
            return Path(hf_hub_download(repository, INDEX, revision=revision, local_files_only=True)).parent
        except OSError:
            raise UserError(f"{named} is no local directory, and could not be fetched from the hub "
                            f"({type(error).__name__}: {error}). Give a diffusers directory, or connect.") from error
    raise UserError(f"{named} on the hub has no {INDEX}: it is no diffusers pipeline.")


def needed(names: list[str], index: dict[str, Any], variant: str | None) -> list[str]:
    """Of a repository's files those of the pipeline's components: configurations, vocabularies, one set of weights."""
    wanted = [INDEX]
    for component, value in index.items():
        if not (isinstance(value, list) and value and value[0]):
            continue
        inside = {PurePosixPath(name).name for name in names if PurePosixPath(name).parent == PurePosixPath(component)}
        # index files of weights that are not taken would promise shards that are not there
        wanted += [f"{component}/{name}" for name in inside if name.endswith(SMALL) and ".index." not in name]
        found = entry_point(inside, "diffusers" if value[0] == "diffusers" else "transformers", variant)
        if found is None:
            continue
        entry, tag, safetensors = found
        wanted.append(f"{component}/{entry}")
        if entry.endswith(".json"):
            extension = ".safetensors" if safetensors else ".bin"
            parts = [name for name in inside if fnmatch(name, f"*-of-*{extension}")]
            wanted += [f"{component}/{name}" for name in parts
                       if (f".{tag}" in name if tag else "." not in name.removesuffix(extension))]
    return sorted(wanted)
