"""Images with a text file of the same name beside each, as kohya's scripts read them."""

import codecs
import shutil
from pathlib import Path

import pytest
from data.data_files import cached, image_bytes, listed, pixels, refused, rows_of, settings
from PIL import Image

from seppo_fast.data.rows import Row, Skipped
from seppo_fast.data.sources import open_source
from seppo_fast.models import Model


def write(folder: Path, **texts: bytes | str | None) -> Path:
    """A folder of PNGs by these names, each with its caption, or none."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, text) in enumerate(texts.items()):
        (folder / f"{name}.png").write_bytes(image_bytes(number))
        if text is not None:
            (folder / f"{name}.txt").write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


def test_the_first_line_is_the_caption(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", a="a red cat\n", b="  a dog, \u00e9\u732b  \r\nanother line\r\n", c=codecs.BOM_UTF8 + b"the sky",
                   d="old Mac\rsecond")
    assert rows_of(folder) == [Row(f"{name}.png", text, folder / f"{name}.png") for name, text in
                               (("a", "a red cat"), ("b", "a dog, \u00e9\u732b"), ("c", "the sky"), ("d", "old Mac"))]


def test_what_has_no_caption_is_skipped_and_says_why(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", good="a cat", none=None, empty="", blank=" \n \n", later="\nsecond line", latin=b"caf\xe9",
                   wide="a cat".encode("utf-16"), two="a")
    (folder / "two.caption").write_text("b")
    (folder / "folder.txt").mkdir()
    (folder / "folder.png").write_bytes(image_bytes(9))
    found = {row.key: row for row in rows_of(folder)}
    reasons = {row.key: row.reason for row in found.values() if isinstance(row, Skipped)}
    words = {"none.png": "no caption: there is no none.txt beside it", "empty.png": "empty.txt: empty caption",
             "blank.png": "blank.txt: empty caption", "later.png": "later.txt: its first line is empty",
             "latin.png": "latin.txt: the caption is not valid UTF-8", "wide.png": "wide.txt: it is UTF-16 or no text",
             "two.png": "several captions: two.caption and two.txt", "folder.png": "no caption: there is no folder.txt"}
    assert found.keys() == {*words, "good.png"} and isinstance(found["good.png"], Row)
    assert all(reasons[key].startswith(start) for key, start in words.items()), reasons


def test_names(tmp_path: Path) -> None:
    """Other endings, capitals, dots, nested folders, accents as a Mac stores them; what a Mac adds is no picture."""
    folder = write(tmp_path / "d" / "10_a style", **{"a.b.c": "dots"})
    Image.fromarray(pixels(1)).save(folder / "B.JPG")
    (folder / "B.TXT").write_text("capitals")
    Image.fromarray(pixels(2)).save(folder / "cafe\u0301.webp")
    (folder / "caf\u00e9.caption").write_text("accents")
    (folder / "._B.jpg").write_bytes(b"\0\5\x16\7")
    (folder / "notes.txt").write_text("of no picture")
    deeper = write(folder / "deeper", x="nested")
    (folder / "link").symlink_to(folder)
    found = {row.key: row.prompt for row in rows_of(tmp_path / "d")}
    assert found == {"10_a style/B.JPG": "capitals", "10_a style/a.b.c.png": "dots", "10_a style/cafe\u0301.webp": "accents",
                     "10_a style/deeper/x.png": "nested"} and (deeper / "x.png").exists()


def test_splits_are_told_by_folders_alone(tmp_path: Path) -> None:
    write(tmp_path / "train", **{"a test drive": "a"})
    write(tmp_path / "test", b="b", c="c")
    assert [row.key for row in rows_of(tmp_path)] == ["train/a test drive.png"]
    assert [row.key for row in rows_of(tmp_path, split="test")] == ["test/b.png", "test/c.png"]
    assert len(rows_of(tmp_path, split="all")) == 3
    assert "has no such split; it has the splits: test, train" in refused(tmp_path, split="val")


def test_metadata_win(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", a="by its file")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "by metadata"}\n')
    assert [row.prompt for row in rows_of(folder)] == ["by metadata"]
    assert [row.prompt for row in rows_of(folder, format="captions")] == ["by its file"]


def test_what_cannot_be_meant(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", a=None, b=None)
    assert "a .txt beside each image" in refused(folder)
    assert "has no image with a caption beside it" in refused(folder, format="captions")
    (folder / "a.txt").write_text("a cat")
    assert "seppo.data.caption_column" in refused(folder, caption_column="text")
    assert "wants the images' folder" in refused(folder / "a.txt", format="captions")
    assert "known are .parquet" in refused(folder / "a.txt")


def test_parts_and_identity(tmp_path: Path) -> None:
    """Another caption, picture or name is other data; parts start anywhere."""
    folder = write(tmp_path / "d", **{f"{number:03d}": f"caption {number}" for number in range(300)})
    source = open_source(settings(folder, tmp_path), False, 0)
    assert [part.count for part in source.parts] == [256, 44] and source.count == 300 and source.kind == "captions"
    assert next(source.parts[1].rows()).key == "256.png"
    first = source.identity()
    assert open_source(settings(folder, tmp_path), False, 0).identity() == first
    (folder / "299.txt").write_text("another")
    changed = open_source(settings(folder, tmp_path), False, 0).identity()
    assert changed.names != first.names and changed.written[0] == first.written[0] and changed.written[1] != first.written[1]


def test_the_cache_has_it(model: Model, tmp_path: Path) -> None:
    """Other times of the files make no other cache."""
    folder = write(tmp_path / "d", a="a red cat", b="a blue dog", c=None)
    cache = cached(model, settings(folder, tmp_path, max_skipped=0.5), tmp_path)
    assert cache.rows([0, 1]).captions == ["a red cat", "a blue dog"] and [row["key"] for row in listed(tmp_path)] == ["c.png"]
    copied = shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    assert cached(model, settings(copied, tmp_path, max_skipped=0.5), tmp_path).fingerprint == cache.fingerprint


@pytest.mark.parametrize("method", ["pairs", "random"])
def test_there_are_no_pairs(method: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "d", a="a")
    words = refused(folder, needs_loser=True) if method == "pairs" else refused(folder, choose="random")
    assert "one image a row" in words
