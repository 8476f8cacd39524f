"""Tars whose samples are not what they seem: two images of one name, files that are no neighbours, tars joined."""

import bz2
import gzip
import lzma
import tarfile
import unicodedata

import pytest
from data.data_files import image_bytes, refused, rows_of, samples, write_tar

from seppo_fast.data import tars
from seppo_fast.data.rows import BadRow, Row, Skipped, read_bytes

TEXT = ("0.txt", b"first")


@pytest.mark.parametrize(("members", "reason"), [
    ([("0.png", image_bytes(0)), ("0.png", image_bytes(1)), TEXT], "two .png files"),
    ([("0.png", image_bytes(0)), TEXT, ("0.PNG", image_bytes(1))], "two .png files"),
    ([("0.png", image_bytes(0)), TEXT, ("0.txt", b"second")], "two .txt files"),
    ([("0.png", image_bytes(0)), TEXT, ("0.jpg", image_bytes(1, "JPEG"))], "several images (jpg, png)"),
    ([("0.png", image_bytes(0)), TEXT, ("0.json", b'{"a": 1, "a": 2}')], None),  # not where the caption is
])
def test_a_name_with_two_images_is_skipped(tmp_path, members, reason):
    rows = rows_of(write_tar(tmp_path / "a.tar", samples(2, first=5) + members))
    assert [row.prompt for row in rows[:2]] == ["caption 5", "caption 6"] and len(rows) == 3
    assert rows[2].prompt == "first" if reason is None else isinstance(rows[2], Skipped) and reason in rows[2].reason


def test_a_json_with_a_key_twice_is_skipped(tmp_path):
    image = image_bytes()
    members = [("0.png", image), ("0.json", b'{"text": "a", "text": "b"}'), ("1.png", image), ("1.json", b'{"text": "c"}')]
    bad, good = rows_of(write_tar(tmp_path / "a.tar", members))
    assert "text is given twice" in bad.reason and good.prompt == "c"


def test_a_samples_files_that_are_no_neighbours(tmp_path):
    apart = [("0.png", image_bytes()), *samples(2, first=5), TEXT]
    first, *good, again = rows_of(write_tar(tmp_path / "a.tar", apart))
    assert "no caption" in first.reason and "must be neighbours" in first.reason and len(good) == 2
    assert again == Skipped("a.tar:0", again.reason) and "came before in this tar" in again.reason


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
@pytest.mark.parametrize("padding", [0, 512, 10240 * 3])
def test_joined_tars_are_read_to_the_end(tmp_path, kind, padding):
    mode = "w:gz" if "gz" in kind else "w"
    parts = [write_tar(tmp_path / f"{i}.{kind}", samples(3, first=3 * i), mode).read_bytes() for i in range(3)]
    zeros = bytes(padding) if kind == "tar" else gzip.compress(bytes(padding)) if padding else b""
    (tmp_path / f"all.{kind}").write_bytes(zeros.join(parts) + zeros)
    rows = rows_of(tmp_path / f"all.{kind}")
    assert [row.prompt for row in rows] == [f"caption {i}" for i in range(9)] and all(isinstance(row, Row) for row in rows)


def test_joined_tars_with_the_same_names_are_not_mixed(tmp_path):
    one, two = (write_tar(tmp_path / f"{i}.tar", samples(2)).read_bytes() for i in range(2))
    (tmp_path / "all.tar").write_bytes(one + two)
    rows = rows_of(tmp_path / "all.tar")
    assert [isinstance(row, Row) for row in rows] == [True, True, False, False] and "came before" in rows[3].reason


def test_what_follows_a_tars_end_is_a_tar_or_an_error(tmp_path):
    whole = write_tar(tmp_path / "a.tar", samples(2)).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole + b"x" * 5000)
    assert "damaged" in refused(tmp_path / "a.tar") and "sample '0001'" in refused(tmp_path / "a.tar")


def test_a_broken_header_is_damage_though_a_good_one_follows(tmp_path):
    whole = bytearray(write_tar(tmp_path / "a.tar", [("0.png", image_bytes()), TEXT, ("1.png", b""), *samples(1)]).read_bytes())
    start = whole.index(b"1.png\0")
    whole[start:start + 5] = b"\xff" * 5
    (tmp_path / "a.tar").write_bytes(whole)
    assert f"no file header at byte {start}" in refused(tmp_path / "a.tar")


@pytest.mark.parametrize("mode", ["w:bz2", "w:xz"])
def test_other_compressions_by_content(tmp_path, mode):
    assert len(rows_of(write_tar(tmp_path / "a.tar", samples(2), mode))) == 2


def test_one_sample_in_two_ways_to_write_an_accent(tmp_path):
    image, text = (unicodedata.normalize(form, "b\u00e4r") for form in ("NFC", "NFD"))
    file = write_tar(tmp_path / "a.tar", [(f"{image}.png", image_bytes()), (f"{text}.txt", b"x")])
    assert [row.prompt for row in rows_of(file)] == ["x"]


def test_tars_in_several_folders_may_move_together(tmp_path):
    for folder in ("here", "there"):
        for name in ("a", "b"):
            write_tar(tmp_path / folder / name / "0.tar", samples(1))
    here, there = ([row.key for row in rows_of(tmp_path / folder)] for folder in ("here", "there"))
    assert here == there == ["a/0.tar:0000", "b/0.tar:0000"]


OPENERS = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}


@pytest.mark.parametrize("packed", OPENERS)
@pytest.mark.parametrize("where", ["image", "header", "end"])
def test_a_tar_that_unpacks_without_end_is_refused_early(tmp_path, monkeypatch, packed, where):
    monkeypatch.setattr(tars, "UNPACKED", 1 << 20)
    zeros = bytes(12 << 20)
    whole = write_tar(tmp_path / "whole.tar", samples(2)).read_bytes()
    entry = tarfile.TarInfo("9.png")
    entry.size = len(zeros)
    if where == "header":
        entry.type = tarfile.XHDTYPE
    bomb = (b"" if where == "end" else whole.rstrip(b"\0") + bytes(-len(whole.rstrip(b"\0")) % 512) + entry.tobuf()) + zeros
    with OPENERS[packed](tmp_path / "a.tar.gz", "wb") as stream:
        stream.write(whole + zeros if where == "end" else bomb)
    assert "unpacks to more than 100 times its size" in refused(tmp_path / "a.tar.gz")


def test_what_unpacks_to_much_because_it_is_much_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "UNPACKED", 1 << 10)
    assert len(rows_of(write_tar(tmp_path / "a.tar.gz", samples(5), "w:gz"))) == 5


def test_an_image_that_would_fill_the_memory_is_skipped(tmp_path):
    header = bytearray(tarfile.TarInfo("9.png").tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[483:495] = tarfile.itn(1 << 42, 12, tarfile.GNU_FORMAT)  # bytes of the file, none of which are in the tar
    header[148:156] = b"%06o\0 " % sum(header[:148] + b" " * 8 + header[156:])
    whole = write_tar(tmp_path / "a.tar", samples(2)).read_bytes()
    body = whole.rstrip(b"\0")
    (tmp_path / "a.tar").write_bytes(body + bytes(-len(body) % 512) + bytes(header) + bytes(1024))
    *good, bad = rows_of(tmp_path / "a.tar")
    assert len(good) == 2 and "its .png is a file of 4,398,046,511,104 bytes; images of up to" in bad.reason
    with open(tmp_path / "big.png", "wb") as file:
        file.truncate(1 << 42)
    with pytest.raises(BadRow, match="a file of 4,398,046,511,104 bytes"):
        read_bytes(tmp_path / "big.png")
