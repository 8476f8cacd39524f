"""The evaluation as one self-contained HTML file: figures, charts, small pictures; a pure function of the result."""

import json
import math
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from html import escape
from io import BytesIO
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image, ImageSequence

from seppo_fast.errors import UserError

HERE = Path(__file__).parent
SIDE, QUALITY = 256, 80
CLIP_SIDE, CLIP_QUALITY = 192, 60  # a clip has many frames
METHOD = 2  # half the time of WebP's default, for 5 % more bytes

Picture = tuple[str, int, int]  # data URI, width, height


def write_page(result: Mapping[str, Any], folder: Path) -> Path:
    """Write `folder`/index.html from the result and the samples in `folder`; all of the file or nothing."""
    path, temporary = folder / "index.html", folder / ".index.html"
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(parts_of(result, folder))
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}. Samples and scores are kept: see to it and run the same command"
                        " again") from error
    return path


def parts_of(result: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """The page in the order of its file, with the pictures row by row."""
    before, after = template("page.html").split("$pictures")
    yield Template(before).substitute(title=escape(title_of(result["models"])), style=template("page.css"), result=as_json(result),
                                      script=template("page.js"))
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for sample in result["samples"]:
        rows.setdefault(f"pictures-{sample['prompt']}-{sample['sample']}", []).append(sample)
    unreadable = {}
    with ThreadPoolExecutor() as threads:
        every = threads.map(partial(pictures_of, folder=folder), rows.values())
        for (row, samples), pictures in zip(rows.items(), every, strict=True):
            made = list(zip(samples, pictures, strict=True))
            unreadable |= {sample["file"]: why for sample, why in made if isinstance(why, str)}
            shown = {sample["model"]: picture for sample, picture in made if isinstance(picture, tuple)}
            # One script a row: the browser parses only those of the rows that it shows.
            yield f'<script type="application/json" id="{row}">{as_json(shown)}</script>\n'
    yield Template(after).substitute(unreadable=as_json(unreadable))


def template(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def title_of(models: Sequence[Mapping[str, str]]) -> str:
    """"Evaluation of tuned against base"."""
    first, *others = (model["name"] for model in models)
    return f"Evaluation of {', '.join(others)} against {first}" if others else f"Evaluation of {first}"


def as_json(value: Any) -> str:
    """JSON that is safe inside a script element; numbers that are not finite are null."""
    text = json.dumps(finite(value), separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def finite(value: Any) -> Any:
    """The same value with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(each) for name, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, list | tuple) else value


def pictures_of(samples: Sequence[Mapping[str, Any]], folder: Path) -> list[Picture | str | None]:
    return [picture_of(sample, folder) for sample in samples]


def picture_of(sample: Mapping[str, Any], folder: Path) -> Picture | str | None:
    """A small picture of the sample, or why there is none. None for a sample that was not made, whose problem says why."""
    if sample["file"] is None:
        return None
    try:
        return thumbnail(folder / sample["file"])
    except FileNotFoundError:
        return "the file is missing"
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError and others on damaged files
        return f"the file cannot be read ({str(error).replace(f'{folder}/', '') or type(error).__name__})"


def thumbnail(path: Path) -> Picture:
    """WebP of at most 256 pixels a side; a clip keeps its frames and their times, and has at most 192."""
    buffer = BytesIO()
    with Image.open(path) as image:
        if getattr(image, "n_frames", 1) == 1:
            small = shrunk(image, SIDE)
            small.save(buffer, "WEBP", quality=QUALITY, method=METHOD)
        else:
            frames = [(shrunk(frame, CLIP_SIDE), frame.info["duration"]) for frame in ImageSequence.Iterator(image)]
            (small, _), *others = frames
            small.save(buffer, "WEBP", quality=CLIP_QUALITY, method=METHOD, save_all=True,
                       append_images=[frame for frame, _ in others], duration=[time for _, time in frames], loop=0)
    return f"data:image/webp;base64,{b64encode(buffer.getvalue()).decode()}", *small.size


def shrunk(image: Image.Image, side: int) -> Image.Image:
    """An RGB copy whose longer side is at most `side`."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return small
