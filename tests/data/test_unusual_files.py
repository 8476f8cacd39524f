"""Folders with letters that libraries take for more than letters; pipes, devices and locked files where a file is expected."""

import json
import os
import shutil
import socket
from pathlib import Path

import datasets
import pytest
from data.data_files import image_bytes, pair, refused, rows_of, write_folder, write_parquet, write_tar
from data.video_files import pictures, video_settings, write_video
from powerless import powerless

from seppo_fast.data.rows import Row, Skipped, read_bytes
from seppo_fast.data.sources import open_source
from seppo_fast.data.video.probe import probe
from seppo_fast.errors import UserError
from seppo_fast.evaluation.prompts import read_prompts

NAMES = ["exp[1]", "a*b", "{x}", "a?b", "a#b", "a%20b", "with space", "train,b", "~x", "pipe:x", "a::b", "file:x", "{0..1}", "a{b"]
BESIDE = ["exp1", "aXb", "x", "a", "b", "a b", "0", "1"]  # what the names would mean as patterns or URLs


def images(folder: Path, seed: int) -> None:
    write_folder(folder, 1, images=1)
    (folder / "0.png").write_bytes(image_bytes(seed))


def parquet(folder: Path, seed: int) -> None:
    write_parquet(folder / "p.parquet", [{"image": image_bytes(seed), "text": "x"}])


def dataset(folder: Path, seed: int) -> None:
    datasets.Dataset.from_dict({"image": [image_bytes(seed)], "text": ["x"]}).save_to_disk(str(folder))


def tars(folder: Path, seed: int) -> None:
    write_tar(folder / "0.tar", [("0.png", image_bytes(seed)), ("0.txt", b"x")])


KINDS = {"imagefolder": (images, ""), "pickapic": (parquet, ""), "datasets": (dataset, ""), "webdataset": (tars, ""),
         "braces": (tars, "/{0..0}.tar"), "stars": (tars, "/*.tar"), "file": (tars, "/0.tar")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_any_name_is_that_folder(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    write, rest = KINDS[kind]
    write(tmp_path / "good", 1)
    write(tmp_path / "other", 2)
    for name in BESIDE:
        shutil.copytree(tmp_path / "other", tmp_path / name)
    for name in NAMES:
        shutil.copytree(tmp_path / "good", tmp_path / name)
        for source in (name, str(tmp_path / name)):
            (row,) = rows_of(source + rest)
            image = read_bytes(row.image) if isinstance(row.image, Path) else row.image
            assert image == image_bytes(1), source


def test_videos_in_folders_of_any_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write_video(tmp_path / "0.mp4", pictures(2))
    for name in NAMES:
        (tmp_path / name).mkdir()
        shutil.copy(file, tmp_path / name)
        (tmp_path / name / "metadata.jsonl").write_text('{"file_name": "0.mp4", "text": "x"}\n')
        (row,) = (row for part in open_source(video_settings(name, tmp_path), False, 0, video=True).parts for row in part.rows())
        assert row.image == Path(name) / "0.mp4" and probe(row.image).frames == 2


def test_a_pattern_still_is_one(tmp_path):
    for name in ("exp1", "exp2"):
        tars(tmp_path / name, 1)
    assert len(rows_of(tmp_path / "exp[12]" / "*.tar")) == 2 and len(rows_of(f"{tmp_path}/exp{{1..2}}/0.tar")) == 2
    assert "there is no" in refused(tmp_path / "exp{1" / "0.tar", format="webdataset")


def pipe(file: Path) -> None:
    os.mkfifo(file)


def device(file: Path) -> None:
    file.symlink_to("/dev/zero")


def plug(file: Path) -> None:
    here = os.getcwd()
    os.chdir(file.parent)  # a socket's path has at most 108 bytes
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(file.name)
    os.chdir(here)


def nothing(file: Path) -> None:
    file.symlink_to("gone")


ODD = [pipe, device, plug, nothing]


@pytest.mark.parametrize("make", ODD)
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "p.parquet", "0.tar", "state.json"])
def test_no_source_is_read_from_what_is_no_file(tmp_path, make, name):
    folder = tmp_path / "d"
    folder.mkdir()
    make(folder / name)
    if name == "state.json":
        (folder / "dataset_info.json").write_text("{}")
        (folder / "dataset_dict.json").write_text("{}")
    said = refused(folder)
    assert str(folder / name) in said and ("no regular file" in said or "cannot read" in said)
    said = refused(folder / name)
    assert any(part in said for part in ("neither a regular file nor a folder", "no such file", "cannot read"))


@pytest.mark.parametrize("make", ODD)
def test_no_csv_of_videos_and_no_prompts_are_read_from_what_is_no_file(tmp_path, make):
    make(tmp_path / "c.csv")
    for source in (tmp_path, tmp_path / "c.csv"):
        with pytest.raises(UserError, match="no regular file|cannot read|no such file|neither a regular|nothing is there"):
            open_source(video_settings(source, tmp_path), False, 0, video=True)
    for suffix in ("txt", "parquet", "json"):
        make(tmp_path / f"p.{suffix}")
        with pytest.raises(UserError, match="no regular file|cannot read|does not exist"):
            read_prompts([str(tmp_path / f"p.{suffix}")])


def test_a_folder_called_like_a_table_holds_tables(tmp_path):
    parquet(tmp_path / "d" / "x.parquet", 1)  # as Spark writes
    (tmp_path / "t" / "a.tar").mkdir(parents=True)
    tars(tmp_path / "t" / "a.tar", 1)
    assert len(rows_of(tmp_path / "d")) == 1 and len(rows_of(tmp_path / "t")) == 1


def test_links_are_followed_but_in_no_circle(tmp_path):
    for write in (images, parquet, tars):
        place = tmp_path / write.__name__
        write(place / "elsewhere", 1)
        (place / "d" / "sub").mkdir(parents=True)
        (place / "d" / "sub" / "back").symlink_to(place / "d")
        (place / "d" / "here").symlink_to(place / "elsewhere")
        assert len(rows_of(place / "d")) == 1


@pytest.mark.parametrize("write", [images, parquet, dataset, tars])
def test_what_may_not_be_read_is_a_message(tmp_path, write):
    write(tmp_path / "d" / "sub" if write is not dataset else tmp_path / "d", 1)
    locked = [file for file in sorted((tmp_path / "d").rglob("*")) if file.suffix != ".png"]
    for file in locked:
        mode = file.stat().st_mode
        file.chmod(0)
        with powerless():
            said = refused(tmp_path / "d")
        assert "Permission denied" in said and str(tmp_path / "d") in said
        file.chmod(mode)
    (tmp_path / "d").chmod(0)
    with powerless():
        assert "Permission denied" in refused(tmp_path / "d") and "Permission denied" in refused(tmp_path / "d" / "x")
    (tmp_path / "d").chmod(0o700)
    assert isinstance(rows_of(tmp_path / "d")[0], Row)


def test_images_that_may_not_be_read_are_skipped_rows(tmp_path):
    images(tmp_path / "d", 1)
    (tmp_path / "d" / "0.png").chmod(0)
    with powerless(), pytest.raises(Exception, match="cannot read .*0.png: Permission denied"):
        read_bytes(rows_of(tmp_path / "d")[0].image)


OUTSIDE = ["{folder}/a/0.png", "../a/0.png", "sub/../../a/0.png"]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("kind", ["imagefolder", "parquet", "text", "datasets"])
def test_rows_keep_to_their_folder_unless_they_may_leave(tmp_path, kind, name):
    images(tmp_path / "a", 1)
    (tmp_path / "d" / "sub").mkdir(parents=True)
    name = name.format(folder=tmp_path)
    if kind == "imagefolder":
        (tmp_path / "d" / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}) + "\n")
    elif kind == "datasets":
        rows = {"image": [{"bytes": None, "path": name}], "text": ["x"]}
        datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "d"))
    else:
        image = name if kind == "text" else {"bytes": None, "path": name}
        write_parquet(tmp_path / "d" / "p.parquet", [{"image": image, "text": "x"}])
    (row,) = rows_of(tmp_path / "d", split="all")
    assert isinstance(row, Skipped) and "outside the data folder" in row.reason and "seppo.data.allow_outside" in row.reason
    (row,) = rows_of(tmp_path / "d", split="all", allow_outside=True)
    assert read_bytes(row.image) == image_bytes(1)


@pytest.mark.parametrize("name", ["{folder}/a/0.mp4", "../a/0.mp4"])
def test_videos_keep_to_their_folder_unless_they_may_leave(tmp_path, name):
    for folder in ("a", "d"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.mp4").touch()
    name = name.format(folder=tmp_path)
    (tmp_path / "d" / "c.csv").write_text(f"videoid,name\n{name},x\n")
    (tmp_path / "d" / "sub").mkdir()
    deeper = f"../{name}" if name[0] == "." else name
    (tmp_path / "d" / "sub" / "metadata.jsonl").write_text(json.dumps({"file_name": deeper, "text": "x"}))
    for source in ("d/c.csv", "d/sub"):
        for allowed in (False, True):
            data = video_settings(tmp_path / source, tmp_path, split="all", allow_outside=allowed)
            (row,) = (row for part in open_source(data, False, 0, video=True).parts for row in part.rows())
            if allowed:
                assert os.path.samefile(row.image, tmp_path / "a" / "0.mp4")
            else:
                assert isinstance(row, Skipped) and "outside the data folder" in row.reason


def test_a_dataset_whose_tables_lie_elsewhere(tmp_path):
    dataset(tmp_path / "d", 1)
    (tmp_path / "d" / "data-00000-of-00001.arrow").rename(tmp_path / "x.arrow")
    state = json.loads((tmp_path / "d" / "state.json").read_text())
    for name in ("../x.arrow", str(tmp_path / "x.arrow")):
        (tmp_path / "d" / "state.json").write_text(json.dumps(state | {"_data_files": [{"filename": name}]}))
        assert "tables outside it" in refused(tmp_path / "d")


def test_pairs_keep_to_their_folder(tmp_path):
    write_parquet(tmp_path / "p.parquet", [pair(0, 1.0) | {"jpg_0": "/etc/passwd", "jpg_1": "1.png"}])
    (row,) = rows_of(tmp_path / "p.parquet")
    assert "outside the data folder" in row.reason
