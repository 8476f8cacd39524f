"""Splits by the names of folders and files, as in `datasets`: what is of another split is never trained on."""

import json

import pytest
from data.data_files import image_bytes, pair, refused, rows_of, samples, write_folder, write_parquet, write_tar
from data.video_files import video_settings
from datasets.data_files import get_data_patterns

from seppo_fast.data.rows import Row
from seppo_fast.data.sources import open_source
from seppo_fast.data.splits import splits_of

TRAIN_AND_TEST = [
    ("train.parquet", "test.parquet"), ("default/train/0000.parquet", "default/test/0000.parquet"),
    ("train-00000-of-00002.parquet", "test-00000-of-00001.parquet"),
    ("data/train-00000-of-00001-ab.parquet", "data/test-00000-of-00001-ab.parquet"),
    ("training/0.parquet", "evaluation/0.parquet"), ("my_train_set/a.parquet", "my_val_set/a.parquet"),
    ("Train/0.parquet", "TEST/0.parquet"),
    ("train/data-00000-of-00002.parquet", "test/data-00000-of-00002.parquet"), ("a/train.1.parquet", "a/dev.1.parquet"),
]


@pytest.mark.parametrize(("train", "test"), TRAIN_AND_TEST)
def test_parquet(tmp_path, train, test):
    folder = tmp_path / "test [1]"  # the folder's own name tells nothing
    write_parquet(folder / train, [pair(0, 1.0)])
    write_parquet(folder / test, [pair(1, 1.0)])
    assert [row.prompt for row in rows_of(folder)] == ["pair 0"]
    other = "test" if "est" in test.lower() or "eval" in test else "validation"
    assert [row.prompt for row in rows_of(folder, split=other)] == ["pair 1"]
    assert [row.prompt for row in rows_of(folder, split="all")] in (["pair 0", "pair 1"], ["pair 1", "pair 0"])
    said = refused(folder, split="fold1")
    assert "seppo.data.split='fold1'" in said and f"it has the splits: {', '.join(sorted(('train', other)))}" in said


@pytest.mark.parametrize(("train", "test"), [pair for pair in TRAIN_AND_TEST if pair[0].islower()])
def test_the_library_sees_the_same(tmp_path, train, test):
    for name in (train, test):
        write_parquet(tmp_path / name, [pair(0, 1.0)])
    assert set(get_data_patterns(str(tmp_path))) == set(splits_of([train, test], "train"))


def test_one_split_alone_and_none_at_all(tmp_path):
    write_parquet(tmp_path / "a" / "test.parquet", [pair(0, 1.0)])
    assert "it has the splits: test" in refused(tmp_path / "a")
    assert len(rows_of(tmp_path / "a" / "test.parquet")) == len(rows_of(tmp_path / "a" / "test.parquet", split="test")) == 1
    assert "has the splits: test" in refused(tmp_path / "a" / "test.parquet", split="val")
    write_parquet(tmp_path / "b" / "contest.parquet", [pair(0, 1.0)])  # no word of its own
    assert len(rows_of(tmp_path / "b")) == 1 and "it has the splits: train" in refused(tmp_path / "b", split="test")
    write_parquet(tmp_path / "b" / "test.parquet", [pair(1, 1.0)])
    assert [row.prompt for row in rows_of(tmp_path / "b")] == ["pair 0"]
    write_parquet(tmp_path / "b" / "train.parquet", [pair(2, 1.0)])
    assert "others that name no split (contest.parquet)" in refused(tmp_path / "b")
    assert len(rows_of(tmp_path / "b", split="all")) == 3 and len(rows_of(tmp_path / "b", split="test")) == 1
    write_parquet(tmp_path / "c" / "fold1" / "0.parquet", [pair(0, 1.0)])
    write_parquet(tmp_path / "c" / "fold2" / "0.parquet", [pair(1, 1.0)])
    assert [row.prompt for row in rows_of(tmp_path / "c", split="fold2")] == ["pair 1"]


def test_tars(tmp_path):
    write_tar(tmp_path / "train-0.tar", samples(2))
    write_tar(tmp_path / "val-0.tar", samples(1, first=5))
    for source in (tmp_path, tmp_path / "*.tar"):
        assert [row.prompt for row in rows_of(source)] == ["caption 0", "caption 1"]
        assert [row.prompt for row in rows_of(source, split="val")] == ["caption 5"]
    assert [row.prompt for row in rows_of(tmp_path / "val-*.tar")] == ["caption 5"]
    assert len(rows_of(tmp_path / "{train,val}-0.tar")) == 3  # named one by one
    assert "it has the splits: train, validation" in refused(tmp_path, split="test")


def test_metadata_in_a_split_below_the_roots(tmp_path):
    write_folder(tmp_path / "d", 2)
    write_folder(tmp_path / "d" / "test", 3)
    (tmp_path / "d" / "test" / "metadata.jsonl").write_bytes(b"[\nnot read")
    assert [row.key for row in rows_of(tmp_path / "d")] == ["metadata.jsonl:1", "metadata.jsonl:2"]


def named(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image_bytes())
    (folder / "metadata.jsonl").write_text("".join(json.dumps({"file_name": name, "text": name}) + "\n" for name in names))
    return folder


def test_metadata_that_names_folders_of_splits(tmp_path):
    folder = named(tmp_path / "a", *(f"train/{i}.png" for i in range(300)), *(f"test/{i}.png" for i in range(300)))
    with open(folder / "metadata.jsonl", "a") as file:
        file.write("no json\n")
    source = open_source(video_settings(folder, tmp_path), False, 0)
    *train, bad = [row for part in source.parts for row in part.rows()]
    assert source.count == 301 and [part.count for part in source.parts] == [256, 44, 1]
    assert all(row.prompt.startswith("train/") for row in train) and len(train) == 300 and bad.key == "metadata.jsonl:601"
    assert "it has the splits: test, train" in refused(folder, split="validation")
    assert rows_of(named(tmp_path / "b", "0.png", "steam train.png", "crash-test.png"))[2].prompt == "crash-test.png"
    assert [row.prompt for row in rows_of(named(tmp_path / "c", "0.png", "test/1.png"))] == ["0.png"]
    assert "name no split (metadata.jsonl from line 1 on)" in refused(named(tmp_path / "d", "0.png", "train/1.png"))


def test_videos(tmp_path):
    def prompts(source, **more):
        parts = open_source(video_settings(source, tmp_path, **more), False, 0, video=True).parts
        return [row.prompt for part in parts for row in part.rows() if isinstance(row, Row)]

    folder = named(tmp_path / "a", "train/1.mp4", "val/1.mp4")
    assert prompts(folder) == ["train/1.mp4"] and prompts(folder, split="val") == ["val/1.mp4"]
    named(tmp_path / "b" / "default" / "train", "1.mp4")
    named(tmp_path / "b" / "default" / "test", "2.mp4")
    assert prompts(tmp_path / "b") == ["1.mp4"]
    (tmp_path / "c").mkdir()
    for name in ("train", "test"):
        (tmp_path / "c" / f"{name}.mp4").touch()
        (tmp_path / "c" / f"clips_{name}.csv").write_text(f"videoid,name\n{name},{name}\n")
    assert prompts(tmp_path / "c") == ["train"] and prompts(tmp_path / "c", split="test") == ["test"]
