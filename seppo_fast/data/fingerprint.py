"""The name of a cache: a digest of everything that decides its content, so that other settings never read it."""

import hashlib
import json
import os
import pwd
from pathlib import Path
from typing import Any

from seppo_fast import config
from seppo_fast.data.rows import Source
from seppo_fast.errors import UserError
from seppo_fast.opening import expanded

FORMAT = 2  # raise it when the cache's layout or the preprocessing changes
PAIRS = 2  # the same for what only pairs have; before 2 winner and loser were cropped and mirrored apart


def made_of(source: Source, names: str, model: Any, data: config.Data, seed: int, needs_loser: bool, streams: bool
            ) -> dict[str, Any]:
    """What rows are made of: demonstrations (`names` of `source.identity()`), the VAE's and text encoders' files, preprocessing."""
    files = {name_of(file, model.path): sha256(file) for file in model.fingerprint_files()}
    quantized = model.directory.quantize_text
    drawn = streams or data.crop == "random" or data.flip or data.choose == "random"
    frames = {"frames": data.video.frames, "choice": data.video.choice, "stride": data.video.stride, "streams": streams}
    return {
        "format": FORMAT,
        "demonstrations": {"kind": source.kind, "columns": source.columns, "parts": len(source.parts),
                           "identity": names, **({"outside": True} if data.allow_outside else {})},
        "model": {"name": model.name, "files": files, **({"quantize_text": quantized} if quantized else {})},
        "preprocessing": {"resolution": data.resolution, "crop": data.crop, "flip": data.flip, "choose": data.choose,
                          "seed": seed if drawn else None, **({"video": frames} if model.video else {}),
                          **({"vae_tiling": True} if model.vae_memory.tiling else {})},
        "needs_loser": needs_loser,
        **({"pairs": PAIRS} if needs_loser else {}),
        "dtype": data.cache_dtype,
        "shape": latent_shape(model, data),
    }


def of_files_alone(about: dict[str, Any]) -> dict[str, Any]:
    """The part of `made_of` that matters for a stream, which keeps no pixels: preprocessing is left out."""
    return {name: value for name, value in about.items() if name not in ("preprocessing", "shape")}


def latent_shape(model: Any, data: config.Data) -> list[int]:
    """[C, h, w] of an image's latents, [C, F', h, w] of a clip's."""
    if data.resolution % model.multiple:
        raise UserError(f"seppo.data.resolution={data.resolution} is no multiple of {model.multiple}, as {model.path} needs it: by"
                        f" {model.vae_scale_factor} the VAE shrinks images"
                        + (", and the transformer takes them in patches" if model.multiple > model.vae_scale_factor else ""))
    model.check_side(data.resolution)
    return list(model.latent_shape(data.resolution, data.video.frames))


def digest(parts: dict[str, Any]) -> str:
    """The cache's folder name."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def cache_folder(data: config.Data, fingerprint: str) -> Path:
    """The folder of one cache."""
    return cache_root(data) / fingerprint


def cache_root(data: config.Data) -> Path:
    """`data.cache_dir`, or `$XDG_CACHE_HOME/seppo_fast`, or `~/.cache/seppo_fast`."""
    if data.cache_dir:
        return expanded(data.cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or home() / ".cache") / "seppo_fast"


def home() -> Path:
    """The home folder; `UserError` where the environment names none, nor the system one for this user."""
    try:
        return Path(os.environ.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        raise UserError(f"user {os.getuid()} has no home folder here (HOME is not set) for what is encoded: set"
                        " seppo.data.cache_dir") from None


def name_of(file: Path, root: Path) -> str:
    """The file's name within the model directory."""
    return str(file.relative_to(root)) if file.is_relative_to(root) else file.name


def sha256(file: Path) -> str:
    """The digest of a file's content."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
