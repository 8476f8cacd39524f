"""Which frames of a clip the model sees."""

import torch

from seppo_fast.config import Video
from seppo_fast.seeds import generator


def chosen(length: int, video: Video, time_lapse: bool, seed: int, key: str, epoch: int) -> list[int]:
    """`video.frames` indices into `length` frames, sorted; they depend on (seed, key, epoch) alone.

    "dynamic" is MagicTime's `Dynamic Frames Extraction`: the whole clip of a time-lapse, a window of any other.
    """
    if length <= video.frames:
        return sorted((list(range(length)) * -(-video.frames // length))[:video.frames])
    if video.choice == "uniform" or (video.choice == "dynamic" and time_lapse):
        return evenly(length, video.frames)
    return window(length, video.frames, video.stride, generator(seed, "frames", key, epoch))


def evenly(length: int, n: int) -> list[int]:
    """The whole clip, both ends included; of one frame, the last."""
    interval = (length - 1) / max(n - 1, 1)
    return [*(round(i * interval) for i in range(n - 1)), length - 1]


def window(length: int, n: int, stride: int, random: torch.Generator) -> list[int]:
    """Frames `stride` apart from a random start; closer together where the clip is too short for that."""
    span = min(length, (n - 1) * stride + 1)
    start = int(torch.randint(0, length - span + 1, (), generator=random))
    # In whole numbers: what `int(numpy.linspace(start, start + span - 1, n))` means, without its rounding errors.
    return [start + i * (span - 1) // max(n - 1, 1) for i in range(n)]


def is_fixed(video: Video, all_time_lapse: bool) -> bool:
    """Whether every epoch sees the same frames."""
    return video.choice == "uniform" or (video.choice == "dynamic" and all_time_lapse)
