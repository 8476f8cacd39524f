"""Where the clips are: a CSV of video ids (AnimateDiff's and MagicTime's), or a folder with metadata that names its videos."""

import os
import unicodedata
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from seppo_fast import config
from seppo_fast.data.columns import CAPTIONS, pick
from seppo_fast.data.files import open_data
from seppo_fast.data.forms import header_of
from seppo_fast.data.metadata import Layout, Span, identity, metadata_files, metadata_in, named, records, scan_all
from seppo_fast.data.pairs import Use, refuse_single
from seppo_fast.data.rows import BadRow, Part, Row, Skipped, Source, checked_caption, inside, short
from seppo_fast.data.splits import files_of_split
from seppo_fast.data.video.frames import is_fixed
from seppo_fast.errors import UserError
from seppo_fast.opening import expanded

SUFFIXES = (".mp4", ".webm", ".mkv", ".mov")
ID, TIME_LAPSE = "videoid", "is_transmit"
FILES = ("file_name", "video")  # columns that name a file
LONGEST_HEADER = 1 << 16  # bytes
LOOK_AT = 16  # rows that tell what a metadata file names; the very first may be the one bad row
FORMS = f"a CSV with videoid and name, or a metadata.jsonl or .csv with file_name and text that names {', '.join(SUFFIXES)} files"


def video_metadata(path: Path, data: config.Data) -> list[Path] | None:
    """The metadata files there that name videos; None when there are none."""
    if path.is_file():
        return [path] if path.suffix.lower() in (".csv", ".jsonl") and names_videos(path) else None
    if not path.is_dir():
        return None
    first = next(metadata_in(path), None)
    if first is not None:
        return metadata_files(path, "video") if names_videos(first) else None
    files = [file for file in sorted(path.glob("*.csv")) if has_ids(file)]
    if not files:
        return None
    mine = files_of_split(files, path, data.split)
    if len(mine) > 1:
        raise UserError(f"{path} has several CSVs with a {ID} column ({', '.join(file.name for file in mine)}); set"
                        " seppo.data.source to one of them")
    return mine


def has_ids(file: Path) -> bool:
    """Whether a CSV has a column of video ids; other CSVs are ignored."""
    if file.is_dir():
        return False
    with open_data(file) as stream:
        line = stream.readline(LONGEST_HEADER)
    return ID.encode() in line.replace(b"\0", b"") and ID in header_of(file)


def names_videos(file: Path) -> bool:
    """Whether a metadata file has video ids, or names of video files."""
    header = header_of(file)
    if header is not None and ID in header:
        return True
    good = (record for _, _, record in records(Span(file, 0, 1, 0), header) if isinstance(record, dict))
    return any(ID in record or any(str(record.get(name)).lower().endswith(SUFFIXES) for name in FILES)
               for record in islice(good, LOOK_AT))


def open_videos(path: Path, files: Sequence[Path], data: config.Data, use: Use) -> Source:
    """The rows of these metadata files, in parts of 256; no video is opened."""
    refuse_single(str(path), use, "pairs of clips are not read", "clip")
    base = path.parent if path.is_file() else path
    where = str(files[0]) if len(files) == 1 else f"the metadata under {path}"
    names = (ID, *FILES)
    found = scan_all(files, base, names, data.split, where)
    columns = found.columns
    if not found.spans:
        raise UserError(f"{where} has no rows; it wants one per clip: {FORMS}")
    if ID in columns:
        places, column = videos_folders(base, files[0], data), ID
        root = next(iter(places))
        locate = partial(by_id, places, data.allow_outside)
    else:
        column = pick(None, FILES, columns, "video", where)
        folder = expanded(data.video.folder) if data.video.folder else None
        root = folder or base
        locate = partial(by_name, folder, column, data.allow_outside)
    caption = pick(data.caption_column, ("name", *CAPTIONS) if ID in columns else CAPTIONS, columns, "caption", where)
    layout = Layout(base, caption, found.headers, locate, names, data.split, found.splits)
    named_columns = {"video": column, "caption": caption} | ({"time_lapse": TIME_LAPSE} if TIME_LAPSE in columns else {})
    parts = [Part(f"{span.file.relative_to(base)}:{span.line}", count, partial(rows, span, layout, TIME_LAPSE in columns))
             for span, count in found.spans]
    return Source(str(path), "video", named_columns, parts, lambda: identity([span for span, _ in found.spans], layout), root)


def videos_folders(base: Path, file: Path, data: config.Data) -> dict[Path, dict[str, str]]:
    """`data.video.folder`, else the CSV's own folder and the `videos` folder there; with the `listing` of each."""
    if data.video.folder:
        folder = expanded(data.video.folder)
        if not folder.is_dir():
            raise UserError(f"seppo.data.video.folder={data.video.folder!r}: no such folder")
        return {folder: listing(folder)}
    places = {place: listing(place) for place in (base, base / "videos") if place.is_dir()}
    if not any(name.lower().endswith(SUFFIXES) for names in places.values() for name in names):
        raise UserError(f"no videos ({', '.join(SUFFIXES)}) beside {file} or in a folder 'videos' there; set"
                        " seppo.data.video.folder to where they are")
    return places


def listing(folder: Path) -> dict[str, str]:
    """The names in a folder, by themselves and by their `plain` forms; of several with one form, the last."""
    names = sorted(os.listdir(folder))
    return {plain(name): name for name in names} | {name: name for name in names}


def plain(name: str) -> str:
    """A name with a lower-case suffix and accents composed (NFC; a Mac stores them decomposed, NFD)."""
    stem, dot, suffix = unicodedata.normalize("NFC", name).rpartition(".")
    return stem + dot + suffix.lower()


def by_id(places: dict[Path, dict[str, str]], outside: bool, file: Path, record: dict, key: str) -> tuple[Path]:
    """The video of a `videoid`: the first that is there."""
    video = str(record.get(ID) if record.get(ID) is not None else "").strip()
    if not video:
        raise BadRow(f"no {ID}")
    return (found_video(places, video, outside),)


def found_video(places: dict[Path, dict[str, str]], video: str, outside: bool = False) -> Path:
    """The file of this id or name, in the first of the folders that has it; `places` are folders with the `listing` of each."""
    for folder, names in places.items():
        path = inside(folder, video, "video", outside)
        for name in (video, *(video + suffix for suffix in SUFFIXES)):
            if not name.lower().endswith(SUFFIXES):
                continue
            # The names in a folder were listed once; an id with folders in it is looked up.
            if name in names or plain(name) in names:
                return folder / names.get(name, names.get(plain(name), name))
            if "/" in name:
                stem, _, suffix = name.rpartition(".")
                for other in (name, f"{stem}.{suffix.upper()}", f"{stem}.{suffix.lower()}"):
                    if os.path.isfile(found := inside(folder, other, "video", outside)):
                        return found
    raise BadRow(f"no such video file: {short(path)} with {', '.join(SUFFIXES)}")


def by_name(folder: Path | None, column: str, outside: bool, file: Path, record: dict, key: str) -> tuple[Path]:
    """The video that a `file_name` names, beside its metadata file or in `data.video.folder`."""
    return (inside(folder or file.parent, record.get(column), "video", outside),)


def rows(span: Span, layout: Layout, has_time_lapse: bool) -> Iterator[Row | Skipped]:
    """The rows of one part."""
    for key, record, files in named(span, layout):
        try:
            if isinstance(files, BadRow):
                raise files
            lapse = has_time_lapse and is_time_lapse(record.get(TIME_LAPSE))
            yield Row(key, checked_caption(record.get(layout.caption)), *files, time_lapse=lapse)
        except BadRow as bad:
            yield Skipped(key, str(bad))


def is_time_lapse(value: object) -> bool:
    """MagicTime's mark: `is_transmit` 0."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = None
    if number not in (0, 1):
        raise BadRow(f"{TIME_LAPSE} is {value!r}, which is neither 0 (a time-lapse) nor 1")
    return number == 0


def first_window(source: Source) -> str | None:
    """The key of the first row that is no time-lapse; None when all are."""
    return next((row.key for part in source.parts for row in part.rows() if isinstance(row, Row) and not row.time_lapse), None)


def streams(source: Source, data: config.Data, video: bool) -> bool:
    """Whether rows are decoded while the policy is trained, not cached; `UserError` where `data.cache_latents` cannot be had."""
    wanted = data.cache_latents
    if not video:
        if wanted is False:
            raise UserError("seppo.data.cache_latents=false is for videos: an image's latents never change and are always cached;"
                            " set it to 'auto'")
        return False
    if wanted is False:
        return True
    drawn = None if is_fixed(data.video, all_time_lapse=True) else "every row"
    if drawn is None and not is_fixed(data.video, all_time_lapse=False):
        drawn = first_window(source)
    if drawn is not None and wanted is True:
        raise UserError(f"seppo.data.cache_latents=true: with seppo.data.video.choice={data.video.choice!r} the frames of {drawn}"
                        f"{'' if drawn == 'every row' else ', which is not marked as a time-lapse,'} are drawn anew in every epoch;"
                        " set cache_latents to 'auto', or choice to 'uniform'")
    return drawn is not None
