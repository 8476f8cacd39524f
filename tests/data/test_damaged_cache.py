"""A cache that is not what was written: found by checksums, made anew, never trained on."""

import json
import os
import re
import shutil
from dataclasses import replace

import datasets
import pytest
from data.data_files import cached, contents, image_bytes, settings, write_parquet

from seppo_fast.data import build_cache, open_source
from seppo_fast.data.shards import write_json
from seppo_fast.data.stamps import CHECKSUM, SEAL, read_stamp
from seppo_fast.errors import UserError

KINDS = ("latents", "prompts")


def rows(count: int) -> list[dict]:
    return [{"image": image_bytes(i), "text": f"caption {i}"} for i in range(count)]


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    """A finished cache with three parts: its folder, and that of its source."""
    place = tmp_path_factory.mktemp("made")
    source = write_parquet(place / "p.parquet", rows(12), group=4)
    return cached(model, settings(source, place), place).folder, source


@pytest.fixture
def whole(made, tmp_path):
    """(settings, folder, content) of a copy."""
    folder, source = made
    shutil.copytree(folder, tmp_path / "cache" / folder.name)
    return settings(source, tmp_path), tmp_path / "cache" / folder.name, contents(folder)


def flip(content: bytes) -> bytes:
    return content[:len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", [flip, lambda content: bytes(len(content))])
def test_a_damaged_shard_is_made_anew_and_said(model, whole, tmp_path, capsys, kind, damage):
    data, folder, before = whole
    arrow = folder / kind / "00000.arrow"
    times = arrow.stat()
    arrow.write_bytes(damage(before[f"{kind}/00000.arrow"]))
    os.utime(arrow, ns=(times.st_atime_ns, times.st_mtime_ns))
    others = {file: file.stat().st_mtime_ns for file in folder.rglob("*.arrow") if file != arrow}
    cached(model, data, tmp_path)
    assert contents(folder) == before and f"{arrow} is not what was written there" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in others} == others
    cached(model, data, tmp_path)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("name", [f"{kind}/00000.json" for kind in KINDS] + ["fingerprint.json"])
def test_a_damaged_stamp_does_not_count(model, whole, tmp_path, name):
    data, folder, before = whole
    stamp = json.loads(before[name])
    torn = [b"null", b"[]", b"12", b'"a"', b"", bytes(len(before[name])), b"\xff\xfe", b"[" * 100_000, before[name][:-20],
            before[name].replace(b"1", b"2", 1), json.dumps({"bytes": stamp.get("bytes")}).encode(), b'{"demonstrations": []}']
    for content in torn:
        (folder / name).write_bytes(content)
        if name != "fingerprint.json":
            assert read_stamp((folder / name).with_suffix(".arrow")) is None
    cached(model, data, tmp_path)
    assert contents(folder) == before
    if name == "fingerprint.json":
        for content in torn:
            (folder / name).write_bytes(content)
            cached(model, data, tmp_path)
            assert (folder / name).read_bytes() == before[name]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_of_an_older_program_counts_where_it_can_be_opened(model, whole, tmp_path, capsys, kind):
    data, folder, before = whole
    stamp, arrow = folder / kind / "00000.json", folder / kind / "00000.arrow"
    write_json(stamp, {name: value for name, value in json.loads(stamp.read_bytes()).items() if name not in (CHECKSUM, SEAL)})
    old, changed = stamp.read_bytes(), arrow.stat().st_mtime_ns
    cached(model, data, tmp_path)
    assert stamp.read_bytes() == old and arrow.stat().st_mtime_ns == changed
    arrow.write_bytes(bytes(len(before[f"{kind}/00000.arrow"])))
    cached(model, data, tmp_path)
    assert contents(folder) == before and "is not what was written" in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gone", ["cut off", "removed"])
def test_a_cache_that_shrinks_while_it_is_read_is_a_message(model, whole, tmp_path, kind, gone):
    data, folder, _ = whole
    cache = cached(model, data, tmp_path)
    arrow = folder / kind / "00000.arrow"
    if gone == "cut off":
        os.truncate(arrow, 600)  # reading what was there would end the process: SIGBUS
    else:
        arrow.unlink()
    with pytest.raises(UserError, match=f"{re.escape(str(arrow))} was cut off or removed while this run reads it.*--resume auto"):
        cache.rows([11, 0]) if kind == "latents" else cache.embeddings([1])
    if kind == "latents":
        assert cache.rows([11]).captions == ["caption 11"]  # of another file


def test_each_rank_looks_at_its_share(model, whole, tmp_path, capsys):
    data, folder, before = whole
    for number in range(3):
        (folder / "latents" / f"{number:05}.arrow").write_bytes(flip(before[f"latents/{number:05}.arrow"]))
    cached(model, data, tmp_path, rank=1, world=2)
    said = capsys.readouterr().out
    assert "00001.arrow" in said and "00000.arrow" not in said and "00002.arrow" not in said
    assert contents(folder)["latents/00001.arrow"] == before["latents/00001.arrow"]


def test_a_cache_that_is_removed_while_it_is_made_is_a_message(model, tmp_path):
    data = settings(write_parquet(tmp_path / "p.parquet", rows(8), group=4), tmp_path)
    source = open_source(data, False, 0)

    def remove():
        for number, row in enumerate(source.parts[1].rows()):
            if number == 2:
                shutil.rmtree(tmp_path / "cache")
            yield row

    removing = replace(source, parts=[source.parts[0], replace(source.parts[1], rows=remove)])
    with pytest.raises(UserError, match=r"cache/\w+/latents was removed while this run wrote to it; start again"):
        build_cache(removing, model, data, seed=0, needs_loser=False, output_dir=tmp_path / "run", progress=False)
    assert len(cached(model, data, tmp_path)) == 8


def test_a_dataset_that_shrinks_while_it_is_read_is_a_message(tmp_path):
    pairs = {"image": [image_bytes(i) for i in range(200)], "text": ["x"] * 200}
    datasets.Dataset.from_dict(pairs).save_to_disk(str(tmp_path / "d"), num_shards=2)
    rows = open_source(settings(tmp_path / "d", tmp_path), False, 0).parts[0].rows()
    next(rows)
    os.truncate(tmp_path / "d" / "data-00001-of-00002.arrow", 5000)
    assert len([next(rows) for _ in range(99)]) == 99  # of the first file
    with pytest.raises(UserError, match="00001-of-00002.arrow was cut off or removed while this run reads it; restore it"):
        next(rows)
