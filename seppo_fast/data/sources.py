"""Finds out what `data.source` is, and opens it without reading the images."""

import re
from pathlib import Path

from seppo_fast import config
from seppo_fast.data.captioned import has_captions, open_captioned
from seppo_fast.data.files import readable, walk
from seppo_fast.data.imagefolder import open_imagefolder
from seppo_fast.data.metadata import NAMES
from seppo_fast.data.pairs import Use, check_choice
from seppo_fast.data.rows import Part, Row, Skipped, Source
from seppo_fast.data.tables import open_dataset_folder, open_hub_dataset, open_parquet
from seppo_fast.data.tars import SUFFIXES, open_tars
from seppo_fast.data.video.source import FORMS, open_videos, video_metadata
from seppo_fast.errors import UserError
from seppo_fast.opening import expanded

__all__ = ["Part", "Row", "Skipped", "Source", "is_hub_dataset", "open_source"]

SOURCE_NOT_SET = ("seppo.data.source is not set: --set seppo.data.source=PATH (an image folder with metadata.jsonl or a .txt"
                  " beside each image, parquet files, a datasets directory or hub id, webdataset tars; for a video model"
                  " a CSV or folder of videos)")
NO_VIDEOS = f"no videos that this program knows; it wants {FORMS}"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
PATTERN = re.compile(r"[*?{\[]")


@readable()
def open_source(data: config.Data, needs_loser: bool, seed: int, video: bool | None = False, method: str = "dpo") -> Source:
    """`data.source` as a list of parts. Reads file lists, footers and metadata files, never an image or a video.

    A video model (`video`) wants clips, any other images; `UserError` when the source has the other kind. None: whichever it has.
    `method` is what a message calls the method that needs losers.
    """
    if not data.source:
        raise UserError(SOURCE_NOT_SET)
    use = Use(needs_loser, data.choose, seed, method)
    check_choice(use)
    path = expanded(data.source)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"seppo.data.source={data.source!r} is neither a regular file nor a folder")
    clips = video_metadata(path, data) if data.format in ("auto", "imagefolder", "video") else None
    if clips and video is False:
        raise UserError(f"seppo.data.source={data.source!r} has videos, and the model makes images: set seppo.model.path to a Wan"
                        " or AnimateDiff directory, or seppo.model.motion_adapter, which makes a Stable Diffusion 1.x one")
    if clips:
        return open_videos(path, clips, data, use)
    if video or data.format == "video":
        raise UserError(f"seppo.data.source={data.source!r}: {NO_VIDEOS}" + ("" if path.exists() else "; nothing is there"))
    kind = detect(path, data) if data.format == "auto" else data.format
    if kind == "webdataset":
        return open_tars(data.source, data, use)
    if kind == "datasets" and not path.exists():
        return open_hub(data, use)
    if not path.exists():
        raise UserError(f"seppo.data.source={data.source!r}: no such file or folder")
    if kind == "imagefolder":
        if path.is_file():
            if path.suffix.lower() not in (".jsonl", ".csv"):
                raise UserError(f"seppo.data.source={data.source!r} is no metadata file (.jsonl or .csv);"
                                " seppo.data.format 'imagefolder' wants one, or its folder")
            return open_imagefolder(path.parent, data, use, only=path)
        return open_imagefolder(path, data, use)
    if kind == "captions":
        if path.is_file():
            raise UserError(f"seppo.data.source={data.source!r} is a file; seppo.data.format 'captions' wants the images' folder")
        return open_captioned(path, data, use)
    if kind == "datasets":
        return open_dataset_folder(path, data, use)
    return open_parquet(path, data, use)


@readable()
def is_hub_dataset(data: config.Data) -> bool:
    """Whether opening `data.source` would download a dataset."""
    path = expanded(data.source)
    missing = bool(HUB_ID.fullmatch(data.source)) and not path.exists()
    return missing and (detect(path, data) if data.format == "auto" else data.format) == "datasets"


def open_hub(data: config.Data, use: Use) -> Source:
    """`data.source` as a hub id, unless it can only have been meant as a path."""
    if not HUB_ID.fullmatch(data.source):
        raise UserError(f"seppo.data.source={data.source!r}: no such file or folder")
    return open_hub_dataset(data.source, data, use)


def detect(path: Path, data: config.Data) -> str:
    """The value of `data.format` that fits the files there; a name that is no path is a hub id."""
    if path.is_file():
        if path.name.endswith(SUFFIXES):
            return "webdataset"
        known = {".parquet": "pickapic", ".jsonl": "imagefolder", ".csv": "imagefolder"}
        if path.suffix.lower() in known:
            return known[path.suffix.lower()]
        raise UserError(f"seppo.data.source={data.source!r}: this kind of file is not known; known are .parquet, .tar,"
                        " and metadata as .jsonl or .csv")
    if not path.exists():
        return "webdataset" if PATTERN.search(str(path)) and path.name.endswith(SUFFIXES) else "datasets"
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return "datasets"
    if any((place / name).is_file() for place in (path, path / data.split) for name in NAMES):
        return "imagefolder"
    # Metadata in sub-folders comes after tables and tars, because looking for it walks all folders.
    for suffixes, kind in (((".parquet",), "pickapic"), (SUFFIXES, "webdataset"), (NAMES, "imagefolder")):
        if any(name.endswith(suffixes) for _, names in walk(path) for name in names):
            return kind
    if any(has_captions(place, names) for place, names in walk(path)):
        return "captions"
    inside = sorted(file.name for file in path.iterdir())
    listed = ", ".join(inside[:5]) + (", ..." if len(inside) > 5 else "")
    found = f"it holds {len(inside)} entries ({listed})" if inside else "it is empty"
    raise UserError(f"seppo.data.source={data.source!r} has no demonstrations that this program knows: {found}. It"
                    " wants a metadata.jsonl or metadata.csv beside the images (file_name, text), or a .txt beside each image, or"
                    " .parquet files, a datasets directory, or webdataset .tar files")
