"""Prompt sets: a text file, JSONL, CSV, Parti's TSV, HPSv2's JSON, Pick-a-Pic's parquet, ChronoMagic-Bench's CSV."""

import codecs
import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
from pyarrow import ArrowException

from seppo_fast.data.files import check_readable, open_data, readable
from seppo_fast.data.forms import LOOK_AT_QUOTES, why_no_json
from seppo_fast.errors import UserError
from seppo_fast.models import Model
from seppo_fast.models.tokens import cut_off, token_counter
from seppo_fast.opening import expanded
from seppo_fast.strict import GivenTwice, check_columns, parse_json, unlike_header

COLUMNS = ("prompt", "caption", "text", "name")  # in upper or lower case; the first that a file has
GROUP_COLUMNS = ("group", "style")
CLIP_COLUMNS = ("videoid", "video", "file_name")
FORMS = ".txt, .jsonl, .csv, .tsv, .json, .parquet, or a folder of HPSv2's .json files"


@dataclass(frozen=True)
class Prompt:
    """A prompt. `sets`: its groups, the whole file first, then a part of it; `clip`: the real clip's id or file name."""

    text: str
    sets: tuple[str, ...]
    clip: str | None = None


@dataclass(frozen=True)
class Line:
    """A prompt as its file has it, and where."""

    where: str
    text: Any
    group: str | None = None
    clip: str | None = None


@readable()
def read_prompts(given: Sequence[str], limit: int | None = None, say: Callable[[str], None] = print, flag: str = "--prompts"
                 ) -> list[Prompt]:
    """The prompts of all sets, `FILE` or `NAME=FILE`, at most `limit` of each; repeated prompts are left out with a message."""
    prompts: dict[str, Prompt] = {}
    names: set[str] = set()
    for argument in given:
        name, path = named_file(argument, flag)
        if name in names:
            raise UserError(f"{flag} {argument}: there is another set called {name!r}; give one of them a name: NAME={path}")
        names.add(name)
        again, kept = [], 0
        for line in lines_of(path):
            text = checked(line)
            if text in prompts:
                again.append(line)
                continue
            groups = (name,) if line.group is None else (name, f"{name}/{line.group}")
            prompts[text] = Prompt(text, groups, line.clip)
            kept += 1
            if kept == limit:
                break
        if not kept:
            raise UserError(f"{path} has no prompts{' that were not in a set before' if again else ''}; it wants one a line or row")
        if again:
            count = f"{len(again)} prompts that came before are" if len(again) > 1 else "a prompt that came before is"
            say(f"{name}: {count} left out, the first at {again[0].where}: {checked(again[0])[:60]!r}")
    return list(prompts.values())


def named_file(argument: str, flag: str) -> tuple[str, Path]:
    """Name and path of `NAME=FILE`; without a name, the file's stem."""
    name, equals, rest = argument.partition("=")
    path = expanded(argument if not equals or Path(argument).exists() else rest)
    if not path.exists():
        raise UserError(f"{flag} {argument}: {path} does not exist")
    return (name, path) if equals and not Path(argument).exists() else (path.stem, path)


def checked(line: Line) -> str:
    """The prompt without surrounding space; `UserError` where it is empty or not a text."""
    if not isinstance(line.text, str) or not line.text.strip():
        raise UserError(f"{line.where}: {line.text!r} is no prompt; put one there or remove the row")
    return line.text.strip()


def lines_of(path: Path) -> Iterator[Line]:
    """The prompts of one file or folder, by its ending."""
    readers = {".txt": text_lines, ".jsonl": json_rows, ".csv": table_rows, ".tsv": table_rows, ".json": json_lists,
               ".parquet": parquet_rows}
    if path.is_dir():
        return folder_of_lists(path)
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: what kind of file is that? Prompts are read from {FORMS}")
    return readers[path.suffix.lower()](path)


def text_lines(path: Path) -> Iterator[Line]:
    """One prompt in each line; empty lines do not count."""
    for number, text in enumerate(io.StringIO(content(path)), 1):
        if text.strip():
            yield Line(f"{path}, line {number}", text)


def json_rows(path: Path) -> Iterator[Line]:
    """One JSON object or string in each line."""
    for number, text in enumerate(io.StringIO(content(path)), 1):
        where = f"{path}, line {number}"
        if not text.strip():
            continue
        record = parsed(where, text, why_no_json)
        if not isinstance(record, dict | str):
            raise UserError(f"{where}: {text[:60]!r} is neither a JSON object nor a string")
        yield from_record(where, record) if isinstance(record, dict) else Line(where, record)


def table_rows(path: Path) -> Iterator[Line]:
    """CSV, and Parti-prompts' TSV, whose quotes are part of the prompt."""
    tabs = path.suffix.lower() == ".tsv"
    form: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    reader = csv.reader(io.StringIO(content(path), newline=""), **form)
    try:
        header = next(reader, [])
        check_columns(map(simple, header), str(path))
        for values in reader:
            where = f"{path}, line {reader.line_num}"
            if tabs:  # there, missing cells at a line's end are empty
                values += [""] * (len(header) - len(values)) * bool(values)
            elif len(values) < 2 and not "".join(values).strip():
                continue
            if len(values) not in (0, len(header)):
                raise UserError(f"{where}: {unlike_header(len(values), len(header))}")
            if values:
                yield from_record(where, {name: value for name, value in zip(header, values, strict=True) if name})
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}; {LOOK_AT_QUOTES}") from error


def json_lists(path: Path) -> Iterator[Line]:
    """A list of prompts, or a list for each style: `{"anime": [...], ...}`, as in HPSv2's benchmark."""
    found = parsed(str(path), content(path))
    if isinstance(found, list):
        yield from listed(path, found, None)
    elif isinstance(found, dict) and all(isinstance(value, list) for value in found.values()):
        for style, prompts in found.items():
            yield from listed(path, prompts, style)
    else:
        raise UserError(f'{path}: a list of prompts is needed, or one a style: {{"anime": ["..."], ...}}')


def folder_of_lists(path: Path) -> Iterator[Line]:
    """HPSv2's benchmark as it is published: a JSON list for each style (anime, concept-art, paintings, photo)."""
    files = sorted(path.glob("*.json"))
    if not files:
        raise UserError(f"{path}: there are no .json files in this folder; prompts are read from {FORMS}")
    for file in files:
        yield from (Line(line.where, line.text, file.stem, line.clip) for line in json_lists(file))


def listed(path: Path, prompts: Sequence[Any], group: str | None) -> Iterator[Line]:
    place = f"{path}, {group}" if group else str(path)
    for number, prompt in enumerate(prompts, 1):
        where = f"{place}, number {number}"
        line = from_record(where, prompt) if isinstance(prompt, dict) else Line(where, prompt)
        yield Line(where, line.text, group or line.group, line.clip)


def parquet_rows(path: Path) -> Iterator[Line]:
    """Each prompt once: Pick-a-Pic's validation set has a row for each pair of images, so a prompt has several rows."""
    check_readable(path)
    try:
        file = pyarrow.parquet.ParquetFile(path.absolute())  # Arrow would take `a:b/c` for a URI
        check_columns(map(simple, file.schema_arrow.names), str(path))
        wanted = [name for name in file.schema_arrow.names if simple(name) in (*COLUMNS, *GROUP_COLUMNS, *CLIP_COLUMNS)]
        if not wanted:
            raise no_column(str(path), file.schema_arrow.names)
        seen, row = set(), 0
        for batch in file.iter_batches(columns=wanted):
            for record in batch.to_pylist():
                row += 1
                line = from_record(f"{path}, row {row}", record)
                if line.text not in seen:
                    seen.add(line.text)
                    yield line
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: no readable parquet file ({str(error).splitlines()[0]})") from error


def from_record(where: str, record: Mapping[str, Any]) -> Line:
    """A row's prompt, found by the names of the columns."""
    check_columns(map(simple, record), where)
    columns = {simple(name): value for name, value in record.items()}
    column = next((name for name in COLUMNS if name in columns), None)
    if column is None:
        raise no_column(where, list(record))
    group, clip = (next((columns[name] for name in names if columns.get(name)), None) for names in (GROUP_COLUMNS, CLIP_COLUMNS))
    return Line(where, columns[column], None if group is None else str(group), None if clip is None else str(clip))


def simple(name: str) -> str:
    """A column's name in lower case, without characters that a spreadsheet may put around it."""
    return name.lower().strip().removeprefix("\ufeff")


def parsed(where: str, text: str, why: Callable[[str, ValueError], str] = lambda text, error: "") -> Any:
    """A JSON value; `UserError` where the text is not JSON (`why` may explain it), or an object has a key twice."""
    try:
        return parse_json(text)
    except GivenTwice as error:
        raise UserError(f"{where}: {error}") from error
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}{why(text, error)})") from error


def no_column(where: str, columns: Sequence[str]) -> UserError:
    return UserError(f"{where}: there is no column {', '.join(COLUMNS)}, but {', '.join(columns) or 'none at all'}")


def content(path: Path) -> str:
    """The file's text, with line ends as "\n"; `UserError` where it is neither UTF-8 nor marked as UTF-16."""
    try:
        with open_data(path) as stream:
            wide = stream.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
            return io.TextIOWrapper(stream, encoding="utf-16" if wide else "utf-8-sig").read()
    except UnicodeError as error:
        place = f" (byte {error.start})" if isinstance(error, UnicodeDecodeError) else ""
        raise UserError(f"{path}: not a UTF-8 text file{place}; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def tell_truncated(prompts: Sequence[Prompt], model: Model, say: Callable[[str], None], whose: str = "") -> None:
    """Say how many prompts are longer than the model's text encoder can see; nothing where none is."""
    if not model.directory.weights:  # a model whose shape alone is known
        return
    count, limit = token_counter(model)
    texts = [prompt.text for prompt in prompts]
    if cut := cut_off(list(zip(texts, count(texts), strict=True)), limit):
        say(f"prompts: of {len(texts)} {cut}{whose}")
