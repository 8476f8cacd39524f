"""What the cache holds, in which order, and when it is made anew."""

import io
import json
import shutil

import pytest
import torch
from data.data_files import (
    cached,
    contents,
    image_bytes,
    listed,
    pair,
    samples,
    settings,
    write_folder,
    write_parquet,
    write_tar,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import tiny_sd, tiny_sdxl

from seppo_fast.data.images import load_rgb, prepare
from seppo_fast.data.skips import tell_truncated
from seppo_fast.errors import UserError
from seppo_fast.models import open_model
from seppo_fast.models.tokens import token_counter
from seppo_fast.seeds import generator


def direct(model, files: list[bytes], crop="center", flip=False, keys=None, seed=0):
    """Posterior mean and std without the cache."""
    drawn = [generator(seed, "prepare", key) for key in keys or map(str, range(len(files)))]
    pixels = [prepare(load_rgb(file), 16, crop, flip, random) for file, random in zip(files, drawn, strict=True)]
    return model.encode(model.load_vae("cpu"), torch.stack(pixels))


def test_rows_are_the_encoded_images_in_order(model, tmp_path):
    folder = write_folder(tmp_path / "d", 10)
    cache = cached(model, settings(folder, tmp_path, cache_dtype="float32"), tmp_path)
    assert len(cache) == 10 and cache.shape == (4, 8, 8) and cache.ties == 0 and listed(tmp_path) == []
    rows = cache.rows([7, 0, 7])
    mean, std = direct(model, [image_bytes(7), image_bytes(0), image_bytes(7)])
    torch.testing.assert_close(rows.mean, mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(rows.std, std, rtol=0, atol=1e-5)
    assert rows.mean.shape == (3, 4, 8, 8) and rows.mean.dtype == torch.float32 and rows.loser_mean is None
    assert rows.keys == ["metadata.jsonl:8", "metadata.jsonl:1", "metadata.jsonl:8"]
    assert rows.captions == ["caption 0", "caption 0", "caption 0"] and rows.prompts == [1, 1, 1]


def test_half_precision_is_close_and_comes_out_as_fp32(model, tmp_path):
    cache = cached(model, settings(write_folder(tmp_path / "d", 3), tmp_path), tmp_path)
    mean, _ = direct(model, [image_bytes(i) for i in range(3)])
    rows = cache.rows(range(3))
    assert rows.mean.dtype == torch.float32
    torch.testing.assert_close(rows.mean, mean, rtol=2e-3, atol=2e-3)


def test_prompts_are_encoded_once_and_the_first_is_empty(model, tmp_path):
    cache = cached(model, settings(write_folder(tmp_path / "d", 30), tmp_path, cache_dtype="float32"), tmp_path)
    assert cache.prompts.texts.to_pylist() == ["", *(f"caption {i}" for i in range(7))]
    rows = cache.rows(range(30))
    assert rows.prompts == [1 + i % 7 for i in range(30)]
    found = cache.embeddings([3, 0, 3])
    wanted = model.load_text("cpu")(["caption 2", "", "caption 2"])
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        torch.testing.assert_close(found[name], values, rtol=0, atol=1e-5)


def test_more_prompts_than_a_shard_holds(model, tmp_path):
    members = samples(300)
    for name, number in (("a", 1), ("b", 2)):
        write_tar(tmp_path / "t" / f"{name}.tar", members[300 * (number - 1):300 * number])
    cache = cached(model, settings(tmp_path / "t", tmp_path, encode_batch_size=64), tmp_path)
    assert len(cache.prompts.texts) == 301 and len(list((cache.folder / "prompts").glob("*.arrow"))) == 2
    wanted = model.load_text("cpu")(["caption 0", "caption 299", ""])["prompt_embeds"]
    torch.testing.assert_close(cache.embeddings([1, 300, 0])["prompt_embeds"], wanted, rtol=2e-3, atol=2e-3)


def test_sdxl_has_pooled_embeddings(tmp_path):
    model = open_model(str(tiny_sdxl(tmp_path / "xl")))
    cache = cached(model, settings(write_folder(tmp_path / "d", 2), tmp_path, cache_dtype="float32"), tmp_path)
    wanted = model.load_text("cpu")(["caption 1", ""])
    found = cache.embeddings([2, 0])
    assert set(found) == {"prompt_embeds", "pooled"}
    for name, values in wanted.items():
        torch.testing.assert_close(found[name], values, rtol=0, atol=1e-5)


def test_pairs_keep_winner_and_loser(model, tmp_path):
    rows = [pair(i, [1.0, 0.0, 0.5][i % 3]) for i in range(9)]
    data = settings(write_parquet(tmp_path / "p.parquet", rows, group=4), tmp_path, cache_dtype="float32")
    cache = cached(model, data, tmp_path, needs_loser=True)
    assert len(cache) == 6 and cache.ties == 3 and listed(tmp_path) == []
    found = cache.rows([0, 1])
    for got, files in ((found.mean, (0, 3)), (found.loser_mean, (1, 2))):
        torch.testing.assert_close(got, direct(model, [image_bytes(i) for i in files])[0], rtol=0, atol=1e-5)
    assert found.keys == ["p.parquet:0", "p.parquet:1"] and found.loser_std.shape == (2, 4, 8, 8)
    assert cached(model, data, tmp_path).folder != cache.folder


def test_crop_and_flip_depend_on_seed_and_row_alone(model, tmp_path):
    folder = write_folder(tmp_path / "d", 12)
    for i in range(12):
        (folder / f"{i}.png").write_bytes(image_bytes(i, width=30))
    data = settings(folder, tmp_path, crop="random", flip=True, cache_dtype="float32")
    cache = cached(model, data, tmp_path)
    mean, _ = direct(model, [image_bytes(i, width=30) for i in range(12)], "random", True,
                     [f"metadata.jsonl:{i + 1}" for i in range(12)])
    torch.testing.assert_close(cache.rows(range(12)).mean, mean, rtol=0, atol=1e-5)
    other = cached(model, data, tmp_path, seed=1)
    assert other.folder != cache.folder and not torch.equal(other.rows(range(12)).mean, cache.rows(range(12)).mean)


@pytest.mark.slow
def test_another_setting_gets_another_folder_and_the_same_one_the_same(model, tmp_path):
    folder = write_folder(tmp_path / "d", 3)
    base = settings(folder, tmp_path)
    first = cached(model, base, tmp_path).folder
    before = contents(first)
    for change in ({"crop": "random"}, {"flip": True}, {"cache_dtype": "float32"}, {"resolution": 24}):
        assert cached(model, base.model_copy(update=change), tmp_path).folder != first
    for change in ({"workers": 3}, {"posterior": "mean"}, {"max_skipped": 0.5}):
        assert cached(model, base.model_copy(update=change), tmp_path).folder == first
    assert cached(model, base, tmp_path, seed=5).folder == first  # nothing is drawn here
    assert contents(first) == before
    (folder / "0.png").write_bytes(image_bytes(7))
    assert cached(model, base, tmp_path).folder != first


def test_a_model_with_other_weights_gets_another_folder(model, tmp_path, sd):
    data = settings(write_folder(tmp_path / "d", 2), tmp_path)
    first = cached(model, data, tmp_path).folder
    shutil.copytree(sd, tmp_path / "unet")
    shutil.copytree(sd, tmp_path / "vae")
    for component in ("unet", "vae"):
        file = tmp_path / component / component / "diffusion_pytorch_model.safetensors"
        save_file({name: values + 1 for name, values in load_file(file).items()}, file, {"format": "pt"})
    assert cached(open_model(str(tmp_path / "unet")), data, tmp_path).folder == first
    assert cached(open_model(str(tmp_path / "vae")), data, tmp_path).folder != first


def test_bad_images_are_skipped_listed_and_listed_again_from_the_cache(model, tmp_path):
    bad = [{"file_name": name, "text": "x"} for name in ("empty.png", "cut.png", "none.png")]
    folder = write_folder(tmp_path / "d", 97, bad)
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.png").write_bytes(image_bytes(0, "PNG", 90, 90)[:9000])
    cache = cached(model, settings(folder, tmp_path), tmp_path)
    said = listed(tmp_path)
    assert len(cache) == 97 and [row["key"] for row in said] == [f"metadata.jsonl:{i}" for i in (98, 99, 100)]
    for row, reason in zip(said, ("0 bytes", "truncated", "no such image file"), strict=True):
        assert reason in row["reason"]
    (tmp_path / "run" / "skipped.jsonl").unlink()
    cached(model, settings(folder, tmp_path), tmp_path)
    assert listed(tmp_path) == said
    with pytest.raises(UserError, match=r"3 of 100 rows \(3.0%\) cannot be used; seppo.data.max_skipped allows 2.0%"):
        cached(model, settings(folder, tmp_path, max_skipped=0.02), tmp_path)


def test_too_many_bad_rows_stop_a_large_source_before_its_end(model, tmp_path):
    folder = write_folder(tmp_path / "d", 5, [{"file_name": "none.png", "text": "x"}] * 1500)
    with pytest.raises(UserError, match="so far cannot be used, so the rest was not read") as caught:
        cached(model, settings(folder, tmp_path), tmp_path)
    assert "metadata.jsonl:6: no such image file" in str(caught.value)
    assert 75 < len(listed(tmp_path)) < 200


def test_ties_do_not_count_as_bad_rows_and_nothing_left_is_an_error(model, tmp_path):
    ties = write_parquet(tmp_path / "a.parquet", [pair(0, 0.5)] * 3)
    with pytest.raises(UserError, match="a.parquet: nothing is left: of 3 rows 3 are ties and 0 cannot be used"):
        cached(model, settings(ties, tmp_path), tmp_path)
    mixed = write_parquet(tmp_path / "b.parquet", [pair(0, 0.5)] * 8 + [pair(1, 1.0), pair(2, 1.0) | {"jpg_0": b""}])
    with pytest.raises(UserError, match=r"1 of 2 rows \(50.0%\)"):
        cached(model, settings(mixed, tmp_path), tmp_path)
    assert len(cached(model, settings(mixed, tmp_path, max_skipped=0.5), tmp_path)) == 1


def test_latents_that_are_not_finite_are_skipped(tmp_path, sd):
    shutil.copytree(sd, tmp_path / "sd")
    file = tmp_path / "sd" / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["quant_conv.bias"][0] = 1e6  # beyond fp16
    save_file(weights, file, {"format": "pt"})
    model = open_model(str(tmp_path / "sd"))
    folder = write_folder(tmp_path / "d", 2)
    with pytest.raises(UserError, match="its latents are not finite in float16"):
        cached(model, settings(folder, tmp_path), tmp_path)
    assert len(cached(model, settings(folder, tmp_path, cache_dtype="float32"), tmp_path)) == 2


@pytest.mark.slow
def test_a_torn_shard_is_made_again_and_the_others_are_not(model, tmp_path):
    folder = write_folder(tmp_path / "d", 600)
    data = settings(folder, tmp_path, encode_batch_size=64)
    cache = cached(model, data, tmp_path)
    whole, shards = contents(cache.folder), sorted((cache.folder / "latents").glob("*.arrow"))
    times = [shard.stat().st_mtime_ns for shard in shards]
    shards[1].write_bytes(shards[1].read_bytes()[:1000])
    (cache.folder / "prompts" / "00000.json").write_text("{torn")
    again = cached(model, data, tmp_path)
    assert contents(again.folder) == whole
    assert [shard.stat().st_mtime_ns == time for shard, time in zip(shards, times, strict=True)] == [True, False, True]


def test_a_part_without_a_usable_row(model, tmp_path):
    rows = [pair(i, 0.5 if i < 2 else 1.0) for i in range(4)]
    cache = cached(model, settings(write_parquet(tmp_path / "p.parquet", rows, group=2), tmp_path), tmp_path)
    assert cache.rows(range(len(cache))).keys == ["p.parquet:2", "p.parquet:3"]


def test_resolution_must_suit_the_vae(model, tmp_path):
    data = settings(write_folder(tmp_path / "d", 1), tmp_path).model_copy(update={"resolution": 17})
    with pytest.raises(UserError, match="data.resolution=17 is no multiple of 2"):
        cached(model, data, tmp_path)


def test_a_cache_folder_that_cannot_be_made(model, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="cannot write to .*cache.*data.cache_dir"):
        cached(model, settings(write_folder(tmp_path / "d", 1), tmp_path), tmp_path)


def test_pictures_of_all_modes_go_through(model, tmp_path):
    folder = write_folder(tmp_path / "d", 4)
    for i, mode in enumerate(("L", "P", "CMYK", "RGBA")):
        stream = io.BytesIO()
        Image.new("RGB", (20, 30), (9, 99, 200)).convert(mode).save(stream, "TIFF" if mode == "CMYK" else "PNG")
        (folder / f"{i}.png").write_bytes(stream.getvalue())
    assert len(cached(model, settings(folder, tmp_path), tmp_path)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("family", [tiny_sd, tiny_sdxl])
def test_captions_beyond_the_text_encoder_are_counted_and_listed(family, tmp_path):
    model = open_model(str(family(tmp_path / "model")))
    count, limit = token_counter(model)
    word = "a cat "
    fits = word * ((limit - 2) // (count([word])[0] - 2))
    while count([fits])[0] > limit:
        fits = fits[:-1]
    long = fits + " a cat" * 3
    assert count([fits])[0] <= limit < count([long])[0]
    folder = write_folder(tmp_path / "d", 0, images=1, bad=[])
    (folder / "0.png").write_bytes(image_bytes(0))
    (folder / "metadata.jsonl").write_text("".join(json.dumps({"file_name": "0.png", "text": text}) + "\n"
                                                   for text in ("a cat", fits, long, long)))
    for _ in range(2):  # the second time nothing is encoded
        cache = cached(model, settings(folder, tmp_path), tmp_path)
        said = []
        tell_truncated(cache.texts.stamps, cache.prompts, tmp_path, said.append)
        assert (tmp_path / "truncated.jsonl").read_bytes() == (tmp_path / "run" / "truncated.jsonl").read_bytes()
        assert said[0].startswith(f"captions: of 3 different ones 1 is longer than the {limit} tokens that the text encoder sees")
        rows = [json.loads(line) for line in (tmp_path / "run" / "truncated.jsonl").read_text().splitlines()]
        assert rows == [{"caption": long, "tokens": count([long])[0], "seen": limit}]
        embedding = model.load_text("cpu")([long, long + " a dog"])["prompt_embeds"]
        assert torch.equal(*embedding), "what comes after is not seen"
    cached(model, settings(write_folder(tmp_path / "short", 2), tmp_path), tmp_path)
    assert not (tmp_path / "run" / "truncated.jsonl").exists()
