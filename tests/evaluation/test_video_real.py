"""The real clips: which frames and which square of them, and what is said of a clip that cannot be used."""

import os

import numpy as np
import pytest
import torch
from data.video_files import pictures, write_video

from seppo_fast.errors import UserError
from seppo_fast.evaluation.files import clip_file
from seppo_fast.evaluation.video.real import read_clip


def greys(levels: range, height: int, width: int) -> np.ndarray:
    """Frames of one grey each, the left quarter black and the right quarter white."""
    frames = np.stack([np.full((height, width, 3), level, np.uint8) for level in levels])
    frames[:, :, :width // 4], frames[:, :, -(width // 4):] = 0, 255
    return frames


def test_frames_are_even_over_the_whole_clip_and_cut_to_the_middle_square(tmp_path):
    file = write_video(tmp_path / "a.mp4", greys(range(40, 200, 8), 32, 64), options={"crf": "1"})  # 20 frames, the ends cut off
    found = read_clip(file, 4, 16)
    assert found.shape == (4, 3, 16, 16) and found.dtype == torch.float32
    wanted = torch.tensor([40 + 8 * index for index in (0, 6, 13, 19)]) / 255
    torch.testing.assert_close(found[:, :, 4:12, 4:12], wanted.view(4, 1, 1, 1).expand(4, 3, 8, 8), rtol=0, atol=0.02)
    assert found[:, :, :, 2:-2].max() < 0.9 and found[:, :, :, 2:-2].min() > 0.1
    assert torch.equal(found, read_clip(file, 4, 16))


def test_the_square_is_the_middle_one_to_the_pixel_and_not_mirrored(tmp_path):
    levels = np.arange(40, 232, 4)  # one grey for each of 48 columns, of which 16 to 31 are the middle
    frames = np.broadcast_to(levels[None, None, :, None], (3, 16, 48, 3)).astype(np.uint8)
    for name in ("a.mp4", "b.mp4", "c.mp4"):  # a random crop or mirror would depend on the name
        found = read_clip(write_video(tmp_path / name, frames, options={"crf": "1"}), 2, 16)
        columns = found.mean((0, 1, 2)) * 255
        torch.testing.assert_close(columns, torch.tensor(levels[16:32], dtype=torch.float32), rtol=0, atol=1.9)


def test_a_short_clip_repeats_its_frames_in_order(tmp_path):
    file = write_video(tmp_path / "a.webm", pictures(3))
    found = read_clip(file, 5, 16)
    distinct = [int(torch.equal(one, other)) for one, other in zip(found, found[1:], strict=False)]
    assert distinct == [1, 0, 1, 0] and 0 <= found.min() and found.max() <= 1


def test_an_upright_clip_keeps_its_full_width(tmp_path):
    file = write_video(tmp_path / "a.mp4", greys(range(100, 110), 64, 32))
    found = read_clip(file, 2, 16)
    assert found[:, :, :, 1].max() < 0.1 and found[:, :, :, -2].min() > 0.9


def test_a_clip_that_cannot_be_used_is_named(tmp_path):
    good = write_video(tmp_path / "good.mp4", pictures(8)).read_bytes()
    cases = {"cut.mp4": good[:len(good) // 2], "empty.mp4": b"", "words.mp4": b"no video at all\n" * 99, "good.gif": good}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.mp4").mkdir()
    for name, why in {"cut.mp4": "truncated", "empty.mp4": "0 bytes", "words.mp4": "unreadable", "good.gif": "none of",
                      "missing.mp4": "no such video file", "folder.mp4": "cannot"}.items():
        with pytest.raises(UserError, match=why) as caught:
            read_clip(tmp_path / name, 4, 16)
        assert str(tmp_path / name) in str(caught.value), name


def test_a_clip_that_came_later_is_found(tmp_path):
    """A run may evaluate for days in a folder that is still being filled."""
    with pytest.raises(UserError, match="the real clip 'b'"):
        clip_file(tmp_path, "b")
    write_video(tmp_path / "b.webm", pictures(2, 16, 16))
    os.utime(tmp_path, ns=(0, tmp_path.stat().st_mtime_ns + 1))  # not within one tick of the file system's clock
    assert clip_file(tmp_path, "b") == tmp_path / "b.webm"
