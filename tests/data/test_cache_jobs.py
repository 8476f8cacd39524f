"""The cache under a kill, two jobs at once, a full disk and many rows."""

import gc
import os
import resource
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from data.data_files import cached, contents, settings, write_folder
from forked import Forks, Strike

from seppo_fast import config
from seppo_fast.data import LatentCache, open_source
from seppo_fast.data.encode import decoded, encoded
from seppo_fast.data.rows import Part
from seppo_fast.errors import UserError

BATCH = 32  # images in the VAE at once


def job(model, data: config.Data, folder: Path, together: bool = False) -> dict:
    """A cache that all ranks build together, or each rank as if it were alone."""
    return {"model": str(model.path), "data": data.model_dump(), "folder": str(folder), "together": together}


def finished(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/latents/*.json"))


@pytest.fixture(scope="module")
def many(model, tmp_path_factory):
    """1,200 rows in 5 parts, and the cache of an undisturbed job."""
    folder = tmp_path_factory.mktemp("many")
    write_folder(folder / "d", 1200)
    return folder / "d", contents(cached(model, settings(folder / "d", folder, encode_batch_size=BATCH), folder).folder)


def test_killed_in_the_middle_and_resumed(forks: Forks, model, many, tmp_path):
    source, whole = many
    data = settings(source, tmp_path, encode_batch_size=BATCH)
    in_the_third_part = 2 * 256 // BATCH + 4
    result = forks.run([job(model, data, tmp_path)], module="data.cache_job",
                       strike=Strike("seppo_fast.data.encode:encode_batch", in_the_third_part))
    done = finished(tmp_path / "cache")
    assert result.status == -signal.SIGKILL and 2 <= len(done) < 5, result.output[-3000:]
    times = {file: file.stat().st_mtime_ns for stamp in done for file in (stamp, stamp.with_suffix(".arrow"))}
    left = next((tmp_path / "cache").iterdir()) / "latents" / ".00004.arrow.0123.tmp"  # what a kill leaves, long ago
    left.write_bytes(b"x")
    os.utime(left, (1, 1))
    cache = cached(model, data, tmp_path)
    assert {file: file.stat().st_mtime_ns for file in times} == times
    assert not left.exists()
    kept = {name: content for name, content in contents(cache.folder).items() if not name.endswith(".tmp")}
    assert kept == whole and len(cache) == 1200


def test_two_ranks_write_what_one_writes_and_two_jobs_at_once_do_no_harm(forks: Forks, model, many, tmp_path):
    source, whole = many
    ranks, both = tmp_path / "ranks", tmp_path / "both"
    jobs = [job(model, settings(source, folder, encode_batch_size=BATCH), folder, together=folder == ranks)
            for folder in (ranks, both)]
    result = forks.run(jobs, ranks=2, module="data.cache_job")
    assert result.statuses == [0, 0], result.output[-3000:]
    assert result.output.count("cached 1200 rows\n") == 4
    for folder in (ranks, both):
        (cache,) = (folder / "cache").iterdir()
        assert contents(cache) == whole


def test_what_will_be_added_is_known_before(model, tmp_path):
    data = settings(write_folder(tmp_path / "d", 300), tmp_path)
    said: list[tuple[Path, int]] = []
    folder = cached(model, data, tmp_path, room=lambda *given: said.append(given)).folder
    latents, prompts = (sum(file.stat().st_size for file in folder.glob(f"{kind}/*.arrow")) for kind in ("latents", "prompts"))
    assert [into for into, _ in said] == [folder, folder]
    assert said[0][1] == pytest.approx(latents, rel=0.1) and said[1][1] == pytest.approx(prompts, rel=0.1)
    said.clear()
    (folder / "latents" / "00001.json").unlink()
    cached(model, data, tmp_path, room=lambda *given: said.append(given))
    assert [size for _, size in said] == [300 * 4 * 8 * 8 * 2 * 2 // 2, 0], "the second of two parts"


@pytest.mark.slow
def test_no_room_left_names_the_folder_and_leaves_no_debris(model, tmp_path):
    data = settings(write_folder(tmp_path / "d", 300), tmp_path, encode_batch_size=16)
    cached(model, settings(write_folder(tmp_path / "first", 9), tmp_path), tmp_path)
    before = contents(tmp_path / "cache")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # the nearest to a full disk that needs no disk; the first part is 290 kB
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, limits[1]))
        with pytest.raises(UserError, match=f"no room left while writing to {tmp_path / 'cache'}"):
            cached(model, data, tmp_path)
        after = contents(tmp_path / "cache")
        assert before.items() <= after.items()
        assert {Path(name).name for name in after.keys() - before.keys()} == {"fingerprint.json"}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(cached(model, data, tmp_path)) == 300


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(model, tmp_path):
    """2,500 rows in one part: the reader stays a window ahead of the VAE, and no pixels outlive their batch."""
    folder = write_folder(tmp_path / "d", 2500)
    data = settings(folder, tmp_path, encode_batch_size=64)
    source, read = open_source(data, False, 0), 0

    def rows():
        nonlocal read
        for part in source.parts:
            for row in part.rows():
                read += 1
                yield row

    vae, seen, ahead, alive = model.load_vae("cpu"), 0, 0, []
    with torch.no_grad(), ThreadPoolExecutor(2) as threads:
        for _, _, count in encoded(decoded(Part("all", None, rows), data, 0, threads), model, vae, data, "cpu"):
            seen += count
            ahead = max(ahead, read - seen)
            if seen % 512 == 0:
                gc.collect()
                alive.append(sum(type(thing) is torch.Tensor for thing in gc.get_objects()))
    assert seen == 2500 and ahead <= 2 * 64 + 2
    assert len(alive) == 4 and max(alive) - min(alive) <= 2 * 64 + 16, alive


def test_an_unfinished_cache_is_not_opened(model, many, tmp_path):
    folder = tmp_path / "cache"
    for name, content in many[1].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    assert len(LatentCache(folder)) == 1200
    (folder / "latents" / "00003.json").unlink()
    with pytest.raises(UserError, match="00003.arrow is missing or cut off"):
        LatentCache(folder)
