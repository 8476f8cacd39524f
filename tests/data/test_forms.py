"""Metadata that say something else than they seem to: rows cut at commas, names given twice, other forms than a row a line."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.data_files import cached, image_bytes, refused, rows_of, settings
from data.video_files import video_settings

from seppo_fast.data import metadata
from seppo_fast.data.rows import Row, Skipped
from seppo_fast.data.sources import open_source
from seppo_fast.errors import UserError

GOOD = '{"file_name": "0.png", "text": "a"}\n'


def test_csv_rows_that_do_not_fit_the_header_are_skipped(tmp_path):
    (tmp_path / "metadata.csv").write_text('file_name,text\n0.png,"one, two"\n1.png,a red fox, sitting\n2.png\n   \n3.png,four\n')
    good, more, fewer, last = rows_of(tmp_path)
    assert good == Row("metadata.csv:2", "one, two", tmp_path / "0.png")
    assert more == Skipped("metadata.csv:3", "3 values where the header has 2 names; is a text with a comma in it not in quotes?")
    assert isinstance(fewer, Skipped) and fewer.key == "metadata.csv:4" and "1 value where the header has 2 names" in fewer.reason
    assert last == Row("metadata.csv:6", "four", tmp_path / "3.png")


def test_a_video_csv_that_does_not_fit_its_header(tmp_path):
    (tmp_path / "1.mp4").touch()
    file = tmp_path / "clips.csv"
    file.write_text("videoid,name\n1,a boat, at sea\n1,a bird\n")
    bad, good = [row for part in open_source(video_settings(file, tmp_path), False, 0, video=True).parts for row in part.rows()]
    assert "3 values" in bad.reason and good.prompt == "a bird"
    named = tmp_path / "named" / "metadata.csv"
    named.parent.mkdir()
    named.write_text("file_name,text\n" + "1.mp4,a boat, at sea\n" * 20 + "1.mp4,a bird\n")
    source = open_source(video_settings(named, tmp_path), False, 0, video=True)
    assert [isinstance(row, Row) for part in source.parts for row in part.rows()] == [False] * 20 + [True]


def test_a_file_that_is_bad_as_a_whole_is_one_message(tmp_path):
    file = tmp_path / "metadata.csv"
    file.write_text("file_name,text\n" + "0.png,a fox, sitting\n" * 3)
    assert f"{file}: not one of 3 rows can be read; line 2: 3 values where the header has 2 names" in refused(tmp_path)
    (tmp_path / "0.png").write_bytes(image_bytes())


def test_too_many_bad_rows_stop_as_ever(model, tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "0.png").write_bytes(image_bytes())
    (folder / "metadata.csv").write_text("file_name,text\n0.png,good\n" + "0.png,a fox, sitting\n" * 3)
    with pytest.raises(UserError, match=r"3 of 4 rows .75.0%. cannot be used(.|\n)*metadata.csv:3: 3 values where"):
        cached(model, settings(folder, tmp_path), tmp_path)


def test_header_names_have_no_blanks_around_them(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name , text,\n0.png,a,\n")
    assert rows_of(tmp_path) == [Row("metadata.csv:2", "a", tmp_path / "0.png")]


@pytest.mark.parametrize("header", ["file_name,text,text", "file_name,text, text"])
def test_a_column_given_twice_is_refused(tmp_path, header):
    (tmp_path / "metadata.csv").write_text(f"{header}\n0.png,a,b\n")
    assert "has the column text twice" in refused(tmp_path)


def test_a_key_given_twice_makes_a_row_bad(tmp_path):
    (tmp_path / "metadata.jsonl").write_text(GOOD + '{"file_name": "0.png", "text": "a", "text": "b"}\n')
    good, bad = rows_of(tmp_path)
    assert isinstance(good, Row) and "text is given twice" in bad.reason


def test_a_parquet_column_given_twice_is_refused(tmp_path):
    columns = [pa.array([image_bytes()]), pa.array(["a"]), pa.array(["b"])]
    pq.write_table(pa.table(columns, names=["image", "text", "text"]), tmp_path / "p.parquet")
    assert "has the column text twice" in refused(tmp_path / "p.parquet")


ROWS = [{"file_name": f"{i}.png", "text": f"t {i}"} for i in range(3)]


@pytest.mark.parametrize(("content", "message"), [
    (json.dumps(ROWS), "begins as a JSON array; a .jsonl has one JSON object a line"),
    (json.dumps(ROWS, indent=1), "begins as a JSON array"),
    ("[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n", "begins as a JSON array"),
    ("\n".join(json.dumps(row, indent=2) for row in ROWS), "begins as a JSON object over several lines"),
    (" ".join(map(json.dumps, ROWS)), "something follows the first JSON value on the line"),
    ("".join(f"{row}\n" for row in ROWS), "looks like a Python dict, with single quotes"),
    ("\r".join(map(json.dumps, ROWS)), "its lines end in CR alone"),
])
def test_jsonl_of_another_form_is_named(tmp_path, content, message):
    (tmp_path / "metadata.jsonl").write_text(content, newline="")
    said = refused(tmp_path)
    assert message in said and "metadata.jsonl" in said and "has no image column" not in said


def test_a_wrong_line_among_good_ones_is_a_skipped_row(tmp_path):
    (tmp_path / "metadata.jsonl").write_text(f"[1]\n{GOOD}{ROWS[0]}\n{GOOD.strip()} {GOOD}" + "[" * 100_000 + "\n")
    array, good, python, two, deep = rows_of(tmp_path)
    assert isinstance(good, Row) and "got list" in array.reason and "Python dict" in python.reason and "follows" in two.reason
    assert "nested too deeply" in deep.reason


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_utf_16_is_named(tmp_path, name):
    (tmp_path / name).write_text("file_name,text\n0.png,a\n" if name.endswith("csv") else GOOD, encoding="utf-16")
    assert "is UTF-16" in refused(tmp_path) and name in refused(tmp_path)


def test_csv_of_old_macs_is_named(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,text\r0.png,a\r", newline="")
    assert "its lines end in CR alone" in refused(tmp_path)


def test_other_csvs_beside_do_no_harm(tmp_path):
    (tmp_path / "metadata.jsonl").write_text(GOOD)
    (tmp_path / "notes.csv").write_text("a,a\n", encoding="utf-16")
    (tmp_path / "folder.csv").mkdir()
    assert len(rows_of(tmp_path)) == 1


@pytest.mark.parametrize("line", [b"12", b"{}", b"null", b'"a"', b"[]", b"\xff\xfe", b"\0\0\0", b"1e999", b"[" * 5000, b"1" * 5000,
                                  b'{"file_name": {}, "text": "a"}', b'{"file_name": "0.png", "text": {"a": 1}}'])
def test_a_line_that_is_no_row_is_a_skipped_row(tmp_path, line):
    (tmp_path / "metadata.jsonl").write_bytes(b"\n".join([GOOD.encode() * 9, line, GOOD.encode()]))
    rows = rows_of(tmp_path)
    assert [isinstance(row, Skipped) for row in rows] == 9 * [False] + [True, False] and rows[9].key == "metadata.jsonl:11"
    (tmp_path / "metadata.jsonl").write_bytes(line + b"\n")
    try:
        assert all(isinstance(row, Skipped) for row in rows_of(tmp_path))
    except UserError as error:
        assert str(tmp_path) in str(error)


def test_a_line_without_end_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(metadata, "LONGEST_LINE", 1000)
    (tmp_path / "metadata.jsonl").write_text(GOOD * 40 + '{"file_name": "' + "x" * 2000 + '"}\n')
    assert "metadata.jsonl: line 41 is longer than 1,000 bytes" in refused(tmp_path)
