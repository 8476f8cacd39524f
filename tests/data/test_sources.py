"""Every format, found out by itself, and what is said about data that cannot be used."""

import json
import os

import datasets
import huggingface_hub
import pytest
from data.data_files import image_bytes, pair, refused, rows_of, samples, settings, write_folder, write_parquet, write_tar

from seppo_fast.data.rows import Row, Skipped
from seppo_fast.data.sources import open_source
from seppo_fast.errors import UserError


def keys(rows: list[Row | Skipped]) -> list[str]:
    return [row.key for row in rows]


def test_image_folder_comes_in_parts_of_256_that_start_anywhere(tmp_path):
    folder = write_folder(tmp_path / "d", 600)
    source = open_source(settings(folder, tmp_path), False, 0)
    assert [part.count for part in source.parts] == [256, 256, 88]
    last = list(source.parts[2].rows())
    assert last[0] == Row("metadata.jsonl:513", f"caption {512 % 7}", folder / "12.png")
    assert last == list(source.parts[2].rows())
    assert keys(rows_of(folder)) == [f"metadata.jsonl:{i}" for i in range(1, 601)]
    assert keys(rows_of(folder / "metadata.jsonl")) == keys(rows_of(folder))


def test_csv_with_quotes_line_breaks_blank_lines_and_a_byte_order_mark(tmp_path):
    rows = "".join(f'{i}.png,"two\nlines, ""{i}"""\n\n' for i in range(300))
    (tmp_path / "metadata.csv").write_text("\ufefffile_name,text\n" + rows, encoding="utf-8")
    source = open_source(settings(tmp_path, tmp_path), False, 0)
    assert [part.count for part in source.parts] == [256, 44]
    found = list(source.parts[1].rows())
    assert found[0] == Row(f"metadata.csv:{2 + 256 * 3}", 'two\nlines, "256"', tmp_path / "256.png")
    assert len(found) == 44 and found[-1].prompt == 'two\nlines, "299"'


def test_sub_folders_and_splits(tmp_path):
    write_folder(tmp_path / "a" / "one", 2)
    write_folder(tmp_path / "a" / "two", 1)
    assert keys(rows_of(tmp_path / "a")) == ["one/metadata.jsonl:1", "one/metadata.jsonl:2", "two/metadata.jsonl:1"]
    write_folder(tmp_path / "b" / "train", 1)
    write_folder(tmp_path / "b" / "test", 2)
    assert keys(rows_of(tmp_path / "b")) == ["train/metadata.jsonl:1"]
    assert len(rows_of(tmp_path / "b", split="test")) == 2


def test_unusable_metadata_rows_are_skipped_with_their_line(tmp_path):
    (tmp_path / "metadata.jsonl").write_bytes(
        b'{"file_name": "0.png", "text": "good"}\n{broken\n[1]\n\n{"text": "x"}\n{"file_name": "0.png"}\n'
        b'{"file_name": "0.png", "text": "  "}\n{"file_name": "0.png", "text": 5}\n'
        b'{"file_name": "0.png", "text": "\\ud800"}\n'
        b'{"file_name": "0.png", "text": "\xff"}\n{"file_name": "../0.png", "text": "x"}\n'
        b'{"file_name": "/etc/passwd", "text": "x"}\n{"file_name": "a/../../0.png", "text": "x"}\n')
    good, *bad = rows_of(tmp_path)
    assert good == Row("metadata.jsonl:1", "good", tmp_path / "0.png")
    reasons = ["not valid JSON", "an object was expected", "no image file name", "no caption", "empty caption",
               "caption is int", "not valid UTF-8", "not valid UTF-8", "outside", "outside", "outside"]
    assert len(bad) == len(reasons)
    for row, line, reason in zip(bad, [2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13], reasons, strict=True):
        assert isinstance(row, Skipped) and row.key == f"metadata.jsonl:{line}"
        assert reason.replace("an object", "object") in row.reason, row


def test_identity_follows_metadata_and_images(tmp_path):
    folder = write_folder(tmp_path / "d", 3)
    (folder / "notes.txt").write_text("x")

    def identity() -> str:
        return open_source(settings(folder, tmp_path), False, 0).identity()

    first = identity()
    (folder / "notes.txt").write_text("what nobody named does not count")
    assert identity() == first
    os.utime(folder / "1.png", ns=(1, 1))
    second = identity()
    (folder / "2.png").unlink()
    assert len({first, second, identity()}) == 3


def test_pick_a_pic_winner_loser_ties(tmp_path):
    file = write_parquet(tmp_path / "p.parquet", [pair(0, 1.0), pair(1, 0.0), pair(2, 0.5), pair(3, 1.0)], group=3)
    source = open_source(settings(file, tmp_path), True, 0)
    assert [(part.name, part.count) for part in source.parts] == [("p.parquet:0", 3), ("p.parquet:3", 1)]
    first, second, tie, last = rows_of(file, needs_loser=True)
    assert first == Row("p.parquet:0", "pair 0", image_bytes(0), image_bytes(1))
    assert second == Row("p.parquet:1", "pair 1", image_bytes(3), image_bytes(2))
    assert tie.tie and tie.key == "p.parquet:2" and last.key == "p.parquet:3"
    assert [row.loser for row in rows_of(file) if isinstance(row, Row)] == [None] * 3
    assert rows_of(file, image_column="jpg_1")[2] == Row("p.parquet:2", "pair 2", image_bytes(5))


def test_choose_random_is_seeded_by_row(tmp_path):
    file = write_parquet(tmp_path / "p.parquet", [pair(i, 1.0) for i in range(60)])

    def seconds(seed: int) -> list[bool]:
        return [row.image == image_bytes(2 * i + 1) for i, row in enumerate(rows_of(file, seed=seed, choose="random"))]

    assert seconds(0) == seconds(0) != seconds(1)
    assert 15 < sum(seconds(0)) < 45


def test_labels_that_are_none(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", [pair(0, None), pair(1, 1.0), pair(2, 7.0)])
    assert [(row.tie, row.reason) for row in rows_of(file) if isinstance(row, Skipped)] == [
        (False, "label_0 is None, which is none of 0, 0.5, 1"), (False, "label_0 is 7.0, which is none of 0, 0.5, 1")]
    file = write_parquet(tmp_path / "b.parquet", [pair(0, None, has_label=False), pair(1, 1.0, has_label=True)])
    assert rows_of(file)[0].tie and rows_of(file)[1].key == "b.parquet:1"


def test_parquet_folder_and_splits(tmp_path):
    write_parquet(tmp_path / "data" / "train-00000-of-00002-ab.parquet", [pair(0, 1.0)])
    write_parquet(tmp_path / "data" / "train-00001-of-00002-cd.parquet", [pair(1, 1.0)])
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [pair(2, 1.0)])
    assert keys(rows_of(tmp_path)) == [f"data/train-{name}.parquet:0" for name in
                                       ("00000-of-00002-ab", "00001-of-00002-cd")]
    assert len(rows_of(tmp_path, split="test")) == 1
    assert "it has the splits: test, train" in refused(tmp_path, split="val")
    write_parquet(tmp_path / "data" / "train-00001-of-00002-cd.parquet", [{"caption": "x", "jpg": b""}])
    assert "train-00001-of-00002-cd.parquet has no column jpg_0" in refused(tmp_path)


def test_parquet_with_one_image_a_row(tmp_path):
    file = write_parquet(tmp_path / "p.parquet", [{"image": {"bytes": image_bytes(), "path": None}, "prompt": "x"}])
    assert rows_of(file) == [Row("p.parquet:0", "x", image_bytes())]


def test_datasets_directories(tmp_path):
    rows = [{"image": {"bytes": image_bytes(i), "path": None}, "text": f"t {i}"} for i in range(300)]
    rows[7]["image"] = None
    rows[8]["image"] = {"bytes": b"", "path": None}
    dataset = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    dataset.save_to_disk(tmp_path / "one")
    source = open_source(settings(tmp_path / "one", tmp_path), False, 0)
    assert [part.count for part in source.parts] == [256, 44]
    found = rows_of(tmp_path / "one")
    assert found[7] == Skipped("one:7", "no image") and found[8].image == b"" and found[299].image == image_bytes(299)
    datasets.DatasetDict(train=dataset.select([3]), test=dataset).save_to_disk(tmp_path / "two")
    assert rows_of(tmp_path / "two") == [Row("two:0", "t 3", image_bytes(3))]
    assert "has the splits: train, test" in refused(tmp_path / "two", split="val")
    datasets.Dataset.from_list([pair(0, 0.0)]).save_to_disk(tmp_path / "pairs")
    assert rows_of(tmp_path / "pairs", needs_loser=True) == [Row("pairs:0", "pair 0", image_bytes(1), image_bytes(0))]
    data_file = next((tmp_path / "one").glob("*.arrow"))
    data_file.write_bytes(data_file.read_bytes()[:100])
    assert "cannot be opened" in refused(tmp_path / "one")


def test_webdataset_tars(tmp_path):
    write_tar(tmp_path / "t" / "00.tar", samples(3))
    write_tar(tmp_path / "t" / "01.tar", samples(2, first=3))
    expected = ["00.tar:0000", "00.tar:0001", "00.tar:0002", "01.tar:0003", "01.tar:0004"]
    for source in ("t", "t/{00..01}.tar", "t/0*.tar"):
        found = rows_of(tmp_path / source)
        assert keys(found) == expected and found[4] == Row("01.tar:0004", "caption 4", image_bytes(4))
    zipped = write_tar(tmp_path / "z.tar.gz", samples(2), "w:gz")
    assert keys(rows_of(zipped)) == ["z.tar.gz:0000", "z.tar.gz:0001"]
    assert f"there is no {tmp_path / 't' / '02.tar'}" in refused(tmp_path / "t" / "{00..02}.tar")


def test_webdataset_json_captions_and_incomplete_samples(tmp_path):
    file = write_tar(tmp_path / "a.tar", [
        ("a.jpg", b"1"), ("a.json", b'{"caption": "A", "long": "aaa"}'),
        ("b.webp", b"2"), ("b.json", b'{"caption": "B"}'),
        ("c.jpg", b"3"), ("d.json", b'{"caption": "D"}'), ("e.jpg", b"5"), ("e.json", b"{broken")])
    found = rows_of(file)
    assert found[:2] == [Row("a.tar:a", "A", b"1"), Row("a.tar:b", "B", b"2")]
    assert [(row.key, row.reason.split(";")[0]) for row in found[2:]] == [
        ("a.tar:c", "no caption: there is no .json"), ("a.tar:d", "no image"), ("a.tar:e", "no caption")]
    assert rows_of(file, caption_column="long")[0].prompt == "aaa"
    assert "the json keys caption, long" in refused(file, caption_column="txet")


def test_damaged_tars_name_the_last_good_sample(tmp_path):
    whole = write_tar(tmp_path / "a.tar", samples(20)).read_bytes()  # 2,560 bytes a sample
    file = tmp_path / "b.tar"
    for content, message in ((whole[:9000], "sample '0003' (unexpected end"),
                             (whole[:2560] + b"\xff" * 100 + whole[2660:], "no file header at byte 2560"),
                             (b"", "empty file"), (b"hello" * 999, "invalid header")):
        file.write_bytes(content)
        assert message in refused(file) and str(file) in refused(file)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("metadata.jsonl", "", "has no rows"), ("metadata.csv", "file_name,text\n", "has no rows"),
    ("metadata.csv", 'file_name,text\n0.png,"open\n1.png,b\n', "metadata.csv, line 3: unexpected end of data"),
    ("metadata.jsonl", '{"file_name": "0.png", "label": "x"}', "no caption column (looked for text, caption, prompt)"),
    ("a.png", "x", "it holds 1 entries (a.png)"), ("p.parquet", "x", "not a readable parquet file"),
    ("state.json", "x", "looks like a datasets directory but cannot be opened"),
])
def test_unusable_sources(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    assert message in refused(tmp_path) and str(tmp_path) in refused(tmp_path)


def test_wrong_names_get_the_right_ones(tmp_path):
    folder = write_folder(tmp_path / "d", 2)
    assert "data.caption_column='captoin': " in (said := refused(folder, caption_column="captoin"))
    assert "it has: file_name, text" in said
    assert "it has: file_name, text" in refused(folder, image_column="img")
    assert "no such file or folder" in refused(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "it is empty" in refused(empty)
    assert "no metadata file" in refused(folder / "0.png", format="imagefolder")
    with pytest.raises(UserError, match="data.source is not set"):
        open_source(settings(folder, tmp_path).model_copy(update={"source": None}), False, 0)


def test_pairs_are_wanted_or_not(tmp_path):
    folder = write_folder(tmp_path / "d", 2)
    tar = write_tar(tmp_path / "a.tar", samples(1))
    single = write_parquet(tmp_path / "s.parquet", [{"image": image_bytes(), "text": "x"}])
    pairs = write_parquet(tmp_path / "p.parquet", [pair(0, 1.0)])
    for source in (folder, tar, single):
        assert "method 'dpo' needs pairs" in refused(source, needs_loser=True)
        assert "data.choose='random' picks one image of a pair" in refused(source, choose="random")
    assert "method 'dpo' needs pairs" in refused(pairs, needs_loser=True, image_column="jpg_0")
    assert "data.choose='random' does not go with method 'dpo'" in refused(pairs, needs_loser=True, choose="random")


def test_a_hub_id_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    said = refused("nobody/nothing")
    assert "data.source='nobody/nothing': there is no such file or folder here, and as a hub dataset" in said


def test_metadata_may_use_the_configured_columns(tmp_path):
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"photo": "a.png", "words": "hi", "text": "no"}) + "\n")
    assert rows_of(tmp_path, image_column="photo", caption_column="words") == [
        Row("metadata.jsonl:1", "hi", tmp_path / "a.png")]
