"""A tiny clip of a kind of video, made to find out whether DALI decodes that kind here."""

import os
from fractions import Fraction
from pathlib import Path

import numpy as np

from seppo_fast import config
from seppo_fast.data.video.clips import Clip, clip
from seppo_fast.data.video.probe import Facts, need_av, probe

ENCODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9", "h264": "libx264", "hevc": "libx265", "av1": "libsvtav1"}
X265 = "log-level=none:pools=none:frame-threads=1:bframes=0"  # with threads of its own it loses a frame's time under load
OPTIONS = {"libvpx": {"deadline": "realtime", "cpu-used": "8"}, "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
           "libx264": {"preset": "ultrafast"}, "libx265": {"preset": "ultrafast", "x265-params": X265},
           "libsvtav1": {"preset": "12"}}
FRAMES = 2
USUAL, LEAST, MOST = 256, 144, 4096  # a decoder that takes one size between the latter two takes all


def size_class(facts: Facts) -> tuple[int, int]:
    """(width, height) to try for a video: its own where decoders have limits, else one for all."""
    sides = facts.width, facts.height
    return sides if min(sides) < LEAST or max(sides) > MOST else (USUAL, USUAL)


def trial_clip(folder: Path, codec: str, form: str, size: tuple[int, int], resolution: int) -> Clip:
    """A clip of this codec, pixel format and size (even numbers, at least), written into `folder`; raises what FFmpeg does."""
    av = need_av()
    os.environ.setdefault("SVT_LOG", "1")  # or its encoder talks
    name = ENCODERS.get(codec, codec)
    file = folder / ("trial.webm" if codec in ("vp8", "vp9") else "trial.mp4")
    width, height = (side + side % 2 for side in size)
    with av.open(str(file), "w") as container:
        stream = container.add_stream(name, rate=10, options=OPTIONS.get(name, {}))
        stream.width, stream.height, stream.pix_fmt = width, height, form
        for index in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(colours(width, height, index), format="rgb24").reformat(format=form)
            frame.pts, frame.time_base = index, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    data = config.Data(resolution=resolution, crop="center", flip=False, video=config.Video(frames=FRAMES, choice="uniform"))
    return clip("trial", file, probe(file), False, data, 0, 0)


def colours(width: int, height: int, index: int) -> np.ndarray:
    """A smooth picture (H, W, 3) uint8 of many colours, brighter with `index`."""
    x, y = np.linspace(0, 200, width, dtype=np.uint8)[None], np.linspace(0, 200, height, dtype=np.uint8)[:, None]
    return np.stack(np.broadcast_arrays(x, y, 200 - x // 2 - y // 2), -1) + np.uint8(10 * index)
