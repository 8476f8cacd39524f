"""Data whose files were touched or moved are the same data; other content under the same times is not looked for."""

import os
import shutil

from data.data_files import cached, contents, image_bytes, pair, settings, write_folder, write_parquet

from seppo_fast.training.checkpoint import State, check_data


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
