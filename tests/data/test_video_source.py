"""Where clips come from, and what is said where there are none."""

import json
import os
import shutil
from pathlib import Path

import pytest
from data.data_files import settings, write_folder
from data.video_files import video_settings, write_csv

from seppo_fast.data.rows import Row, Skipped
from seppo_fast.data.sources import Source, open_source
from seppo_fast.data.video.source import first_window, streams
from seppo_fast.errors import UserError


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"not looked into here")


def opened(source: object, needs_loser: bool = False, video: dict | None = None, **more: object) -> Source:
    return open_source(video_settings(source, Path("unused"), video, **more), needs_loser, 0, video=True)


def rows_of(source: object, **more: object) -> list[Row | Skipped]:
    return [row for part in opened(source, **more).parts for row in part.rows()]


def test_a_csv_finds_its_videos_beside_it_or_in_videos_or_where_it_is_told(tmp_path):
    touch(tmp_path / "a" / "videos", "one.mp4", "two.WEBM".lower(), "3.mkv", "deep.mov")
    file = write_csv(tmp_path / "a" / "clips.csv", [("one", "first", 0), ("two", 'a "second"\nclip', 1), ("3", "third", 1)])
    found = rows_of(file)
    videos = tmp_path / "a" / "videos"
    assert found == [Row("clips.csv:2", "first", videos / "one.mp4", time_lapse=True),
                     Row("clips.csv:3", 'a "second"\nclip', videos / "two.webm"), Row("clips.csv:5", "third", videos / "3.mkv")]
    assert rows_of(tmp_path / "a") == found and opened(file).root == tmp_path / "a"
    shutil.copytree(videos, tmp_path / "elsewhere")
    moved = rows_of(file, video={"folder": str(tmp_path / "elsewhere")})
    assert [row.image.parent for row in moved] == [tmp_path / "elsewhere"] * 3
    touch(tmp_path / "a", "one.mp4")
    assert [row.image for row in rows_of(file)] == [tmp_path / "a" / "one.mp4", *(row.image for row in found[1:])]
    assert first_window(opened(file)) == "clips.csv:3"


def test_animatediffs_csv_has_no_time_lapses_and_more_columns(tmp_path):
    touch(tmp_path, "1.mp4", "2.mp4")
    file = write_csv(tmp_path / "webvid.csv", [(1, "http://x", "PT12S", "p", "a boat"), (2, "http://y", "PT9S", "p", "a bird")],
                     ("videoid", "contentUrl", "duration", "page_dir", "name"))
    assert [(row.prompt, row.time_lapse) for row in rows_of(file)] == [("a boat", False), ("a bird", False)]
    assert rows_of(file, caption_column="contentUrl")[0].prompt == "http://x"


def test_a_folder_with_metadata_that_names_videos(tmp_path):
    touch(tmp_path / "sub", "b.webm")
    touch(tmp_path, "a.mp4")
    lines = [{"file_name": "a.mp4", "text": "one", "is_transmit": 0},
             {"file_name": "sub/b.webm", "text": "two", "is_transmit": "1"},
             {"file_name": "../c.mp4", "text": "three", "is_transmit": 1},
             {"file_name": "a.mp4", "text": "x", "is_transmit": "maybe"},
             {"text": "no file", "is_transmit": 1}, {"file_name": "a.mp4", "is_transmit": 0}]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    one, two, *bad = rows_of(tmp_path)
    assert one == Row("metadata.jsonl:1", "one", tmp_path / "a.mp4", time_lapse=True)
    assert two == Row("metadata.jsonl:2", "two", tmp_path / "sub" / "b.webm")
    reasons = ("the video '../c.mp4' is outside", "is_transmit is 'maybe'", "no video file name", "no caption")
    for row, reason in zip(bad, reasons, strict=True):
        assert isinstance(row, Skipped) and reason in row.reason
    assert rows_of(tmp_path / "metadata.jsonl") == [one, two, *bad]


def test_rows_that_name_no_video_are_skipped(tmp_path):
    touch(tmp_path, "a.mp4")
    bad_rows = [("b", "x", 1), ("", "x", 1), ("../a", "x", 1), ("a", "", 1), ("a", "x", "")]
    file = write_csv(tmp_path / "c.csv", [("a", "good", 1), *bad_rows])
    good, *bad = rows_of(file)
    assert isinstance(good, Row)
    reasons = ("no such video file: ", "no videoid", "is outside", "empty caption", "is_transmit is ''")
    for row, reason in zip(bad, reasons, strict=True):
        assert isinstance(row, Skipped) and reason in row.reason, row


def refused(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


def test_each_kind_of_model_gets_its_kind_of_data(tmp_path):
    touch(tmp_path / "v", "a.mp4")
    file = write_csv(tmp_path / "v" / "clips.csv", [("a", "text", 1)])
    images = write_folder(tmp_path / "i", 2)
    for source in (file, tmp_path / "v"):
        said = refused(lambda source=source: open_source(settings(source, tmp_path), False, 0))
        assert "seppo.model.path" in said and "seppo.model.motion_adapter" in said and "has videos" in said
    for source in (images, images / "metadata.jsonl", tmp_path / "nothing", "someone/dataset"):
        assert "no videos that this program knows" in refused(lambda source=source: opened(source))
    assert "no videos that this program knows" in refused(lambda: opened(images, format="video"))
    assert "has videos" in refused(lambda: open_source(settings(file, tmp_path, format="video"), False, 0))
    assert "one clip a row" in refused(lambda: opened(file, needs_loser=True))
    assert "seppo.data.choose" in refused(lambda: opened(file, choose="random"))
    assert "no such folder" in refused(lambda: opened(file, video={"folder": str(tmp_path / "gone")}))
    touch(tmp_path / "w")
    assert "seppo.data.video.folder" in refused(lambda: opened(write_csv(tmp_path / "w" / "c.csv", [("a", "b", 1)])))
    write_csv(tmp_path / "v" / "more.csv", [("a", "text", 1)])
    assert "several CSVs" in refused(lambda: opened(tmp_path / "v"))
    assert "has no rows" in refused(lambda: opened(write_csv(tmp_path / "v" / "none.csv", [])))


def test_identity_follows_rows_and_files(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    file = write_csv(tmp_path / "c.csv", [("a", "text", 1), ("b", "text", 0)])
    first = opened(file).identity()
    assert opened(file).identity() == first
    os.utime(tmp_path / "b.mp4", ns=(1, 1))
    second = opened(file).identity()
    write_csv(file, [("a", "text", 0), ("b", "text", 0)])
    assert len({first, second, opened(file).identity()}) == 3


def test_what_is_cached_and_what_is_streamed(tmp_path):
    touch(tmp_path, "a.mp4")
    still = write_csv(tmp_path / "still.csv", [("a", "x", 0), ("a", "y", 0)])
    moving = write_csv(tmp_path / "moving.csv", [("a", "x", 0), ("a", "y", 1)])

    def is_streamed(file: Path, choice: str, wanted: bool | str) -> bool:
        data = video_settings(file, tmp_path, {"choice": choice}, cache_latents=wanted)
        return streams(open_source(data, False, 0, video=True), data, video=True)

    assert [is_streamed(still, choice, "auto") for choice in ("uniform", "dynamic", "window")] == [False, False, True]
    assert [is_streamed(moving, choice, "auto") for choice in ("uniform", "dynamic", "window")] == [False, True, True]
    assert is_streamed(still, "uniform", False) and not is_streamed(still, "dynamic", True)
    assert "the frames of moving.csv:3, which is not marked" in refused(lambda: is_streamed(moving, "dynamic", True))
    assert "the frames of every row are drawn anew" in refused(lambda: is_streamed(still, "window", True))
    images = settings(write_folder(tmp_path / "i", 2), tmp_path, cache_latents=False)
    assert "is for videos" in refused(lambda: streams(open_source(images, False, 0), images, video=False))


def test_where_the_model_is_not_known_yet_either_kind_is_taken(tmp_path):
    """A dry run with a hub id does not know what the model makes."""
    touch(tmp_path / "clips", "one.mp4")
    clips = video_settings(write_csv(tmp_path / "clips" / "clips.csv", [("one", "first", 0)]), tmp_path)
    images = settings(write_folder(tmp_path / "images", 2), tmp_path)
    assert [open_source(data, False, 0, video=None).kind for data in (clips, images)] == ["video", "imagefolder"]
    assert "the model makes images" in refused(lambda: open_source(clips, False, 0, video=False))
    assert "no videos that this program knows" in refused(lambda: open_source(images, False, 0, video=True))
