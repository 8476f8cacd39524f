"""Data whose files were touched or moved are the same data; other content under the same names, sizes and times is found."""

import os
import shutil

import pytest
import torch
from data.data_files import cached, contents, image_bytes, pair, settings, write_folder, write_parquet, write_tar
from powerless import powerless

from seppo_fast.data import metadata
from seppo_fast.errors import UserError
from seppo_fast.training.checkpoint import State
from seppo_fast.training.resumption import check_data


def test_touched_and_moved_images_keep_their_cache(model, tmp_path):
    folder = write_folder(tmp_path / "d", 5, [{"file_name": "gone.png", "text": "x"}])
    data = settings(folder, tmp_path, max_skipped=0.5)
    first = cached(model, data, tmp_path)
    before = contents(first.folder)
    for file in folder.glob("*.png"):
        os.utime(file, ns=(1, 1))
    moved = data.model_copy(update={"source": str(shutil.copytree(folder, tmp_path / "moved", copy_function=shutil.copyfile))})
    for again in (cached(model, data, tmp_path), cached(model, data, tmp_path), cached(model, moved, tmp_path)):
        assert again.folder == first.folder and again.fingerprint == first.fingerprint and again.content == first.content
    assert contents(first.folder) == before
    (folder / "3.png").write_bytes(image_bytes(9))
    other = cached(model, data, tmp_path)
    assert other.folder != first.folder and other.content != first.content


def test_touched_parquet_and_another_caption(model, tmp_path):
    file = write_parquet(tmp_path / "p.parquet", [pair(0, 1.0), pair(1, 0.0)])
    first = cached(model, settings(file, tmp_path), tmp_path)
    os.utime(file, ns=(1, 1))
    assert cached(model, settings(file, tmp_path), tmp_path).folder == first.folder
    write_parquet(file, [pair(0, 1.0), pair(1, 0.0, caption="another")])
    assert cached(model, settings(file, tmp_path), tmp_path).folder != first.folder


def test_a_checkpoint_knows_its_data_by_content_where_the_cache_is_gone(model, tmp_path):
    data = settings(write_folder(tmp_path / "d", 3), tmp_path)
    first = cached(model, data, tmp_path)
    state = State("run", 1, data=first.fingerprint, config={}, content=first.content)
    os.utime(tmp_path / "d" / "0.png", ns=(1, 1))
    again = cached(model, data.model_copy(update={"cache_dir": str(tmp_path / "new")}), tmp_path)
    assert again.fingerprint != first.fingerprint
    check_data(tmp_path, state, again.fingerprint, again.content)


def replace(file, content: bytes) -> None:
    """Another file of the same name, size and time of change."""
    before = file.stat()
    assert len(content) == before.st_size
    (file.parent / "new").write_bytes(content)
    os.utime(file.parent / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(file.parent / "new", file)
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def bmp(seed: int) -> bytes:
    return image_bytes(seed, "BMP")  # all of one size


def test_an_image_replaced_under_the_same_name_size_and_time_is_noticed(model, tmp_path, monkeypatch):
    monkeypatch.setattr(metadata, "ROWS_PER_PART", 4)
    folder = write_folder(tmp_path / "d", 6)
    for i in range(6):
        (folder / f"{i}.png").write_bytes(bmp(i))
    data = settings(folder, tmp_path)
    first = cached(model, data, tmp_path)
    kept, before = first.rows([0]).mean, first.rows([5]).mean
    second_part = (first.folder / "latents" / "00001.arrow").stat().st_mtime_ns
    replace(folder / "0.png", bmp(0))
    assert cached(model, data, tmp_path).content == first.content
    assert (first.folder / "latents" / "00000.arrow").stat().st_mtime_ns < second_part  # compared, not encoded
    replace(folder / "5.png", bmp(3))
    again = cached(model, data, tmp_path)
    assert again.content != first.content and torch.equal(again.rows([0]).mean, kept)
    assert torch.equal(again.rows([5]).mean, again.rows([3]).mean) and not torch.equal(again.rows([5]).mean, before)
    with pytest.raises(UserError, match="was trained on other data"):
        check_data(tmp_path, State("run", 1, data=first.fingerprint, config={}, content=first.content), again.fingerprint,
                   again.content)


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_table_replaced_under_the_same_name_size_and_time_is_noticed(model, tmp_path, kind):
    file = tmp_path / f"p.{kind}"

    def write(seed: int) -> bytes:
        if kind == "tar":
            write_tar(file, [("0.jpg", bmp(seed)), ("0.txt", b"x")])
        else:
            write_parquet(file, [{"image": bmp(seed), "text": "x"}])
        return file.read_bytes()

    other, one = write(1), write(0)
    first = cached(model, settings(file, tmp_path), tmp_path)
    replace(file, other)
    again = cached(model, settings(file, tmp_path), tmp_path)
    assert again.content != first.content and not torch.equal(again.rows([0]).mean, first.rows([0]).mean)
    replace(file, one)
    assert cached(model, settings(file, tmp_path), tmp_path).content == first.content


def test_moved_data_that_change_later_leave_the_cache_that_they_shared(model, tmp_path):
    folder = write_folder(tmp_path / "d", 3)
    for i in range(3):
        (folder / f"{i}.png").write_bytes(bmp(i))
    first = cached(model, settings(folder, tmp_path), tmp_path)
    moved = settings(shutil.copytree(folder, tmp_path / "moved", copy_function=shutil.copyfile), tmp_path)
    assert cached(model, moved, tmp_path).folder == first.folder
    before = contents(first.folder)
    replace(tmp_path / "moved" / "1.png", bmp(9))
    other = cached(model, moved, tmp_path)
    assert other.folder != first.folder and other.content != first.content and contents(first.folder) == before
    replace(folder / "1.png", bmp(8))  # and the other way round
    moved_again = settings(shutil.copytree(folder, tmp_path / "again", copy_function=shutil.copyfile), tmp_path)
    shared = cached(model, settings(folder, tmp_path), tmp_path)
    assert cached(model, moved_again, tmp_path).folder == shared.folder
    replace(folder / "1.png", bmp(7))
    cached(model, settings(folder, tmp_path), tmp_path)  # in the folder that both used
    assert cached(model, moved_again, tmp_path).content == shared.content


def test_a_cache_that_may_only_be_read_is_used(model, tmp_path):
    folder = write_folder(tmp_path / "d", 3)
    first = cached(model, settings(folder, tmp_path), tmp_path)
    os.chmod(folder / "0.png", 0o600)
    places = [first.folder, first.folder / "latents", first.folder / "prompts"]
    for place in places:
        place.chmod(0o500)
    with powerless():
        assert cached(model, settings(folder, tmp_path), tmp_path).content == first.content
        (folder / "0.png").write_bytes(image_bytes(9))
        for place in (*reversed(places), first.folder.parent):
            place.chmod(0)
        with pytest.raises(UserError, match="cannot (read|write to) .*cache"):
            cached(model, settings(folder, tmp_path), tmp_path)
    for place in (first.folder.parent, *places):
        place.chmod(0o700)


def test_a_row_that_may_leave_its_folder_is_another_content(model, tmp_path):
    folder = write_folder(tmp_path / "d", 3, [{"file_name": "../0.png", "text": "x"}])
    shutil.copy(folder / "0.png", tmp_path)
    assert len(cached(model, settings(folder, tmp_path, max_skipped=0.5, split="all"), tmp_path)) == 3
    assert len(cached(model, settings(folder, tmp_path, allow_outside=True, split="all"), tmp_path)) == 4
