"""File names that no disk can have, that look right and are not there byte for byte, and images as text in their place."""

import base64
import json
import os
import unicodedata

import pytest
from data.data_files import cached, image_bytes, listed, rows_of, settings, write_folder, write_parquet
from data.video_files import video_settings

from seppo_fast.data.columns import as_image
from seppo_fast.data.rows import BadRow, Row, read_bytes
from seppo_fast.data.sources import open_source
from seppo_fast.data.video.probe import probe

LONG = "x" * 300 + ".png"


def test_impossible_names_are_skipped_rows(model, tmp_path):
    bad = [{"file_name": name, "text": "x"} for name in (LONG, "loop.png", "0.png/1.png", "\ud800.png", "pipe.png", ["0.png"])]
    folder = write_folder(tmp_path / "d", 3, bad)
    (folder / "loop.png").symlink_to("loop.png")
    os.mkfifo(folder / "pipe.png")
    cache = cached(model, settings(folder, tmp_path, max_skipped=0.9), tmp_path)
    reasons = [row["reason"] for row in listed(tmp_path)]
    assert len(cache) == 3 and len(reasons) == len(bad)
    for reason, part in zip(reasons, ("File name too long", "symbolic links", "Not a directory", "not valid UTF-8",
                                      "no regular file", "file name is list"), strict=True):
        assert part in reason and len(reason) < 300, reason


@pytest.mark.parametrize("name", ["x" * 300 + ".mp4", "a/" + "x" * 300 + ".mp4", "loop.mp4", "pipe.mp4"])
def test_impossible_names_of_videos_are_bad_rows(tmp_path, name):
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "1.mp4").touch()
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(BadRow):
        probe(tmp_path / name)
    file = tmp_path / "c.csv"
    file.write_text(f"videoid,name\n{name},a boat\n1,a bird\n")
    rows = [row for part in open_source(video_settings(file, tmp_path), False, 0, video=True).parts for row in part.rows()]
    assert isinstance(rows[1], Row) and (name in ("loop.mp4", "pipe.mp4") or len(rows[0].reason) < 300)


def test_base64_text_is_an_image(tmp_path):
    text = base64.b64encode(image_bytes()).decode()
    uri = "data:image/png;base64," + text
    lines = "\n".join(text[i:i + 76] for i in range(0, len(text), 76))
    values = (text, uri, lines, "QUJD" * 100, "data:,")
    file = write_parquet(tmp_path / "p.parquet", [{"image": value, "text": "x"} for value in values])
    *good, cut, none = rows_of(file)
    assert [row.image for row in good] == [image_bytes()] * 3
    assert "text that looks like base64 (400 characters), but no image" in cut.reason and "a data: URI" in none.reason
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "metadata.jsonl").write_text("".join(json.dumps({"image": each, "text": "x"}) + "\n" for each in (text, uri)))
    assert [row.image for row in rows_of(tmp_path / "d")] == [image_bytes()] * 2
    assert as_image("a" * 80, tmp_path) == tmp_path / ("a" * 80)


NFC, NFD = (unicodedata.normalize(form, "b\u00e4r.png") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(("said", "there"), [(NFC, NFD), (NFD, NFC)])
def test_accents_as_the_disk_has_them(tmp_path, said, there):
    (tmp_path / there).write_bytes(image_bytes())
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": said, "text": "x"}) + "\n")
    assert [read_bytes(row.image) for row in rows_of(tmp_path)] == [image_bytes()]
    (tmp_path / said).write_bytes(b"another")
    assert [read_bytes(row.image) for row in rows_of(tmp_path)] == [b"another"]


def test_video_ids_with_accents_and_upper_case_suffixes(tmp_path):
    for name in ("1.MP4", "2.mp4", "2.MP4", "b\u0061\u0308r.WebM", "sub/3.MOV"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    ids = ["1", "1.mp4", "2", "2.MP4", "b\u00e4r", "sub/3"]
    file = tmp_path / "c.csv"
    file.write_text("videoid,name\n" + "".join(f"{each},x\n" for each in ids), encoding="utf-8")
    rows = [row for part in open_source(video_settings(file, tmp_path), False, 0, video=True).parts for row in part.rows()]
    assert [str(row.image.relative_to(tmp_path)) for row in rows] == [
        "1.MP4", "1.MP4", "2.mp4", "2.MP4", "b\u0061\u0308r.WebM", "sub/3.MOV"]
