"""Metadata files whose content does not fit their name: which form it has instead, and how to convert it."""

import csv
import io
import re
from pathlib import Path

from seppo_fast.data.files import open_data
from seppo_fast.errors import UserError
from seppo_fast.strict import check_columns, parse_json

HEAD = 1 << 16  # bytes that tell
LOOK_AT_QUOTES = "look at the quotes there and above"
ONE_A_LINE = "a .jsonl has one JSON object a line"
WIDE = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")
PYTHON = re.compile(r"\s*\{\s*'")  # how a dict prints
LONE_CR = re.compile(rb"\r(?!\n)[^\n]")


def header_of(file: Path) -> list[str] | None:
    """The column names in a CSV's first line, None for a .jsonl; `UserError` when the file has another form."""
    with open_data(file) as stream:
        head = stream.read(HEAD)
    if head.startswith(WIDE) or b"\0" in head[:256]:
        raise UserError(f"{file} is UTF-16, UTF-32 or no text at all; save it as UTF-8 (iconv -f UTF-16 -t UTF-8 OLD > NEW)")
    if b"\n" not in head and LONE_CR.search(head):
        raise UserError(f"{file}: its lines end in CR alone, as on old Macs; end them in LF (tr '\\r' '\\n' < OLD > NEW)")
    if file.suffix.lower() == ".csv":
        return csv_header(file)
    check_lines(file, head)
    return None


def csv_header(file: Path) -> list[str]:
    """The names in a CSV's first line, without space around them."""
    with io.TextIOWrapper(open_data(file), encoding="utf-8-sig", newline="", errors="surrogateescape") as stream:
        try:
            names = [name.strip() for name in next(csv.reader(stream, strict=True), [])]
        except csv.Error as error:
            raise UserError(f"{file}, line 1: {error}; {LOOK_AT_QUOTES}") from error
    check_columns(names, str(file))
    return names


def check_lines(file: Path, head: bytes) -> None:
    """`UserError` when a .jsonl begins as an array over several lines, or as an object over several."""
    first, *rest = head.removeprefix(b"\xef\xbb\xbf").strip().split(b"\n", 1)
    array = first.startswith(b"[")
    if (array or first.strip() == b"{") and not (rest and is_json(first)):
        what = f"a JSON {'array' if array else 'object over several lines'}"
        command = "jq -c '.[]' OLD > NEW" if array else "jq -c . OLD > NEW"
        raise UserError(f"{file} begins as {what}; {ONE_A_LINE} and nothing between them ({command})")


def is_json(text: bytes) -> bool:
    """Whether a line is JSON by itself."""
    try:
        parse_json(text)
    except ValueError:
        return False
    return True


def why_no_json(line: str, error: ValueError) -> str:
    """A guess at what was meant by a line that is no JSON; empty where there is none."""
    if PYTHON.match(line):
        return "; it looks like a Python dict, with single quotes: write rows with json.dumps"
    if line.lstrip().startswith("[") or line.strip() == "{":
        return f"; it begins a JSON {'array' if '[' in line else 'object'} over several lines: {ONE_A_LINE}"
    if "Extra data" in str(error):
        return f"; something follows the first JSON value on the line: {ONE_A_LINE}"
    return ""
