"""DALI and PyAV give the same frames, and these are what the file shows."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from data.video_files import pictures, video_settings, write_video
from PIL import Image
from torch import Tensor

from seppo_fast.data.images import prepare
from seppo_fast.data.rows import BadRow
from seppo_fast.data.video import dali, pyav
from seppo_fast.data.video.clips import Clip, clip
from seppo_fast.data.video.decoder import Decoder
from seppo_fast.data.video.probe import probe
from seppo_fast.errors import UserError
from seppo_fast.seeds import generator

needs_dali = pytest.mark.skipif(not dali.is_installed(), reason="DALI is not installed")
LEVEL = 1 / 127.5


def clip_of(file: Path, key: str = "k", epoch: int = 0, video: dict | None = None, **more: object) -> Clip:
    data = video_settings(file, file.parent, video, **{"crop": "random", "flip": True, **more})
    return clip(key, file, probe(file), False, data, 0, epoch)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A clip of 12 frames in every way that both decoders know."""
    folder, frames = tmp_path_factory.mktemp("clips"), pictures(12, 60, 84)
    write = {"vp9.webm": {}, "vp8.webm": {"codec": "libvpx"}, "mjpeg.mkv": {"codec": "mjpeg"}, "vp9.mp4": {"codec": "libvpx-vp9"},
             "turned.mp4": {"codec": "libvpx-vp9", "rotation": 90}, "down.mp4": {"codec": "libvpx-vp9", "rotation": -90},
             "mirror.mp4": {"codec": "libvpx-vp9", "mirrored": True}, "sound.webm": {"audio": True},
             "uneven.webm": {"times": [0, 5, 300, 310, 320, 900, 901, 1500, 2000, 2010, 2020, 3000]}}
    made = {name: write_video(folder / name, frames, **options) for name, options in write.items()}
    made["odd.webm"] = write_video(folder / "odd.webm", pictures(12, 37, 53))
    made["one.webm"] = write_video(folder / "one.webm", frames[:1])
    made["short.webm"] = write_video(folder / "short.webm", frames[:3])
    return made


@pytest.fixture(scope="module")
def pipeline() -> dali.Dali:
    return dali.Dali(16, at_once=4, threads=1, device=torch.device("cpu"))


@needs_dali
def test_the_two_decoders_agree(files, pipeline):
    clips = [clip_of(file, key=str(i)) for i, file in enumerate(files.values()) for _ in range(2)]
    assert not any(pipeline.refuses(each.facts) for each in clips)
    assert {each.frame.mirror for each in clips} == {False, True} and {each.quarters for each in clips} >= {0, 1, 3}
    for name, each, by_dali in zip((name for name in files for _ in range(2)), clips, pipeline.decode(clips), strict=True):
        by_pyav = pyav.decode(each)
        assert by_dali.shape == by_pyav.shape == (4, 3, 16, 16) and by_dali.dtype == by_pyav.dtype == torch.float32
        difference = (by_dali - by_pyav).abs()
        assert difference.max() <= 2.01 * LEVEL and difference.mean() <= 0.1 * LEVEL, name


@needs_dali
@pytest.mark.parametrize("resolution", [16, 56, 88])
def test_they_agree_at_every_scale(files, resolution):
    clips = [clip_of(files[name], resolution=resolution) for name in ("vp9.webm", "turned.mp4")]
    found = dali.Dali(resolution, 2, 1, torch.device("cpu")).decode(clips)
    for each, by_dali in zip(clips, found, strict=True):
        assert (pyav.decode(each) - by_dali).abs().max() <= 2.01 * LEVEL


@needs_dali
def test_a_clip_does_not_depend_on_its_company(files, pipeline):
    clips = [clip_of(file) for file in files.values()]
    together = pipeline.decode(clips)
    for each, frames in zip(reversed(clips), reversed(together), strict=True):
        assert torch.equal(pipeline.decode([each])[0], frames)


@needs_dali
def test_what_dali_does_not_say_is_found(files, pipeline, tmp_path):
    good = clip_of(files["vp9.webm"])
    past_the_end = replace(good, indices=[0, 5, 11, 12])
    h264 = clip_of(write_video(tmp_path / "a.mp4", pictures(5)))
    assert "VP8, VP9 and MJPEG" in pipeline.refuses(h264.facts)
    found = pipeline.decode([good, past_the_end, h264, good])  # the third ends the pipeline for all of them
    assert found[1] is None and found[2] is None
    assert torch.equal(found[0], found[3]) and found[0].std() > 0.1


def shown(pixels: np.ndarray, each: Clip, data_seed: int = 0) -> Tensor:
    """The frames (F, H, W, 3), upright, as the image section prepares them."""
    prepared = [prepare(Image.fromarray(picture), each.resolution, "random", True, generator(data_seed, "prepare", each.key, 0))
                for picture in pixels[each.indices]]
    return torch.stack(prepared)


@pytest.mark.parametrize(("name", "upright"), [
    ("plain.mp4", lambda x: x), ("left.mp4", partial(np.rot90, axes=(1, 2))),
    ("over.mp4", partial(np.rot90, k=2, axes=(1, 2))), ("right.mp4", partial(np.rot90, k=3, axes=(1, 2))),
    ("mirror.mp4", lambda x: x[:, :, ::-1])])
def test_rotation_crop_and_mirror_are_those_of_the_upright_picture(name, upright, tmp_path):
    rotation = {"left.mp4": 90, "over.mp4": 180, "right.mp4": -90}.get(name, 0)
    frames = pictures(8, 40, 64)
    file = write_video(tmp_path / name, frames, "libvpx-vp9", rotation=rotation, mirrored=name == "mirror.mp4")
    seen = set()
    for key in "abcdef":
        each = clip_of(file, key)
        seen.add((each.frame.mirror, each.frame.left, each.frame.top))
        difference = (pyav.decode(each) - shown(np.ascontiguousarray(upright(frames)), each)).abs()
        assert difference.mean() < 4 * LEVEL and difference.max() < 30 * LEVEL, key  # the codec's loss
    assert len(seen) > 3


def test_pixels_that_are_not_square_are_stretched(tmp_path):
    frames = pictures(5, 32, 32)
    each = clip_of(write_video(tmp_path / "a.mp4", frames, pixel="2/1"), crop="center", flip=False)
    assert (each.frame.width, each.frame.height, each.frame.left, each.frame.top) == (32, 16, 8, 0)
    wide = np.stack([np.asarray(Image.fromarray(picture).resize((64, 32), Image.Resampling.BILINEAR)) for picture in frames])
    expected = torch.stack([prepare(Image.fromarray(picture), 16, "center", False, generator(0)) for picture in wide[each.indices]])
    assert (pyav.decode(each) - expected).abs().mean() < 4 * LEVEL


def test_colours_are_those_of_their_matrix(tmp_path):
    frames = pictures(5)
    for name, colours in (("a.webm", (1, 1)), ("b.webm", (5, 2)), ("c.webm", (5, 1))):
        each = clip_of(write_video(tmp_path / name, frames, colours=colours))
        assert each.facts.colours == colours
        assert (pyav.decode(each) - shown(frames, each)).abs().mean() < 3 * LEVEL, name
        refuses = dali.Dali(16, 1, 1, torch.device("cpu")).refuses(each.facts)
        assert (refuses is None) == (name == "c.webm")


def test_a_very_long_picture_is_no_clip(tmp_path):
    with pytest.raises(BadRow, match="more than 64 times as long as wide"):
        clip_of(write_video(tmp_path / "a.mp4", pictures(1, 2, 136)))


@needs_dali
def test_each_codec_is_told_once(files, tmp_path):
    h264, tagged = write_video(tmp_path / "a.mp4", pictures(5)), write_video(tmp_path / "b.webm", pictures(5), colours=(1, 1))
    clips = [clip_of(file) for file in (h264, files["vp9.webm"], tagged, h264, files["vp8.webm"])]
    for choice, expected in (("auto", 2), ("dali", 2), ("pyav", 3)):
        said: list[str] = []
        decoder = Decoder(video_settings("unused", tmp_path, {"decoder": choice}), "cpu", said.append)
        for frames, each in zip(decoder(clips), clips, strict=True):
            assert (frames - pyav.decode(each)).abs().max() <= 2.01 * LEVEL
        decoder(clips)
        decoder.close()
        assert len(said) == expected and said[0].startswith("videos: h264 is decoded by PyAV on the CPU: "), said


@needs_dali
def test_a_file_that_dali_gives_up_goes_through_pyav_and_changes_no_other(files, pipeline, tmp_path):
    h264 = clip_of(write_video(tmp_path / "a.mp4", pictures(5)))
    mistaken = replace(h264, facts=replace(h264.facts, codec="vp9"))  # only the decoder can tell
    good = clip_of(files["vp9.webm"])
    said: list[str] = []
    decoder = Decoder(video_settings("unused", tmp_path), "cpu", said.append)
    for _ in range(2):
        found = decoder([good, mistaken, good])
        assert torch.equal(found[1], pyav.decode(h264))
        assert torch.equal(found[0], found[2]) and torch.equal(found[0], pipeline.decode([good])[0])
    decoder.close()
    assert said == ["videos: vp9 is decoded by PyAV on the CPU: DALI could not decode a.mp4 (yuv420p)"]


def test_without_dali(files, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # what an import of a missing module finds
    with pytest.raises(UserError, match="DALI is not installed here"):
        Decoder(video_settings("unused", tmp_path, {"decoder": "dali"}), "cpu", print)
    said: list[str] = []
    decoder = Decoder(video_settings("unused", tmp_path), "cpu", said.append)
    each = clip_of(files["vp9.webm"])
    assert torch.equal(decoder([each])[0], pyav.decode(each))
    assert said == ["videos: vp9 is decoded by PyAV on the CPU: DALI is not installed"]
    decoder.close()


def test_a_file_that_changed_is_named(tmp_path):
    each = clip_of(write_video(tmp_path / "a.webm", pictures(5)), key="clips.csv:7")
    decoder = Decoder(video_settings("unused", tmp_path), "cpu", lambda line: None)
    write_video(tmp_path / "a.webm", pictures(6))
    changed = decoder([each])[0]
    (tmp_path / "a.webm").unlink()
    for found in (changed, decoder([each])[0]):
        assert isinstance(found, UserError) and f"clips.csv:7: {tmp_path / 'a.webm'} was deleted or changed" in str(found)
    decoder.close()
