"""Clips through NVIDIA DALI: decoding, resize, crop, mirror and normalisation in one pipeline, on a GPU or on the CPU."""

import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seppo_fast.data.video import pyav
from seppo_fast.data.video.clips import Clip, turned
from seppo_fast.data.video.probe import Facts
from seppo_fast.data.video.trial import USUAL, size_class, trial_clip

CODECS = {"cpu": {"vp8", "vp9", "mjpeg"}, "gpu": {"vp8", "vp9", "mjpeg", "h264", "hevc", "av1", "mpeg4", "mpeg2video"}}
BT601 = {2, 5, 6}  # FFmpeg's numbers: not said, BT.470, SMPTE 170M
RGB, FULL_RANGE = 0, 2
# Stands where a file has fewer frames than it was asked for, which DALI does not tell otherwise.
MISSING = (255, 0, 255)
LEVEL = 1 / 127.5
TRIAL_SIDE, TRIAL_LEVELS = 16, 4


def is_installed() -> bool:
    """Whether DALI can be imported."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        return False
    return True


class Dali:
    """A pipeline, built at its first use and again after a file that broke it. For one thread at a time."""

    def __init__(self, resolution: int, at_once: int, threads: int, device: torch.device) -> None:
        self.resolution, self.at_once, self.threads, self.device = resolution, at_once, threads, device
        self.kind = "gpu" if device.type == "cuda" else "cpu"
        self.pipeline: Any = None

    def refuses(self, facts: Facts) -> str | None:
        """Why DALI cannot decode such a video here, or would show it in wrong colours; the same for all of its kind."""
        if facts.codec not in CODECS[self.kind]:
            return "DALI decodes VP8, VP9 and MJPEG without a GPU" if self.kind == "cpu" else "DALI does not decode it"
        matrix, range_ = facts.colours
        if matrix not in BT601 and matrix != RGB:
            return "its colours are not those of BT.601, for which DALI takes all"
        if range_ == FULL_RANGE and matrix != RGB and not facts.format.startswith("yuvj"):
            return "its colours are of full range, for which DALI does not look"
        if facts.alpha:
            return "it is transparent in parts, which DALI does not put on white"
        if not facts.alone or facts.cut:
            return "it has several video streams, or an edit list, of which DALI tells nothing"
        return tried(self.device, facts.codec, facts.format, size_class(facts))

    def decode(self, clips: Sequence[Clip]) -> list[Tensor | None]:
        """The clips' frames, (F, 3, R, R) fp32 in [-1, 1] on the CPU; None for a clip that DALI cannot decode after all."""
        if len(clips) > self.at_once:
            return [*self.decode(clips[:self.at_once]), *self.decode(clips[self.at_once:])]
        try:
            found = self.run(clips)
        except (RuntimeError, OSError):  # one file ends the pipeline and takes its whole batch with it
            self.pipeline = None
            return [None] if len(clips) == 1 else [each for clip in clips for each in self.decode([clip])]
        return [turned(pixels, clip) if is_whole(pixels, clip) else None for pixels, clip in zip(found, clips, strict=True)]

    def run(self, clips: Sequence[Clip]) -> list[Tensor]:
        """One batch, in the stored orientation."""
        self.pipeline = self.pipeline or self.build()
        side = self.resolution
        columns = {
            "file": [np.fromfile(clip.file, np.uint8) for clip in clips],
            "frames": [np.array(clip.indices, np.int32) for clip in clips],
            "size": [np.array((clip.frame.height, clip.frame.width), np.float32) for clip in clips],
            "left": [np.array(share(clip.frame.left, clip.frame.width - side), np.float32) for clip in clips],
            "top": [np.array(share(clip.frame.top, clip.frame.height - side), np.float32) for clip in clips],
            "mirror": [np.array(clip.frame.mirror, np.int32) for clip in clips],
        }
        for name, values in columns.items():
            self.pipeline.feed_input(name, values)
        output, = self.pipeline.run()
        output = output.as_cpu()
        return [torch.from_numpy(np.array(output.at(row))) for row in range(len(clips))]

    def build(self) -> Any:
        """The pipeline. It works in step with its caller: what is decoded ahead, and how much, is for `prefetcher.py` to say."""
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline

        pipeline = Pipeline(batch_size=self.at_once, num_threads=self.threads, prefetch_queue_depth=1, exec_async=False,
                            exec_pipelined=False, device_id=self.device.index or 0 if self.kind == "gpu" else None)
        with pipeline:
            file, frames = (fn.external_source(name=name, ndim=1, dtype=dtype)
                            for name, dtype in (("file", types.UINT8), ("frames", types.INT32)))
            size = fn.external_source(name="size", ndim=1, dtype=types.FLOAT)
            left, top = (fn.external_source(name=name, ndim=0, dtype=types.FLOAT) for name in ("left", "top"))
            mirror = fn.external_source(name="mirror", ndim=0, dtype=types.INT32)
            video = fn.decoders.video(file, device="mixed" if self.kind == "gpu" else "cpu", frames=frames, fill_value=MISSING)
            video = fn.resize(video, size=size, interp_type=types.INTERP_LINEAR, antialias=True, dtype=types.UINT8)
            video = fn.crop_mirror_normalize(video, crop=(self.resolution, self.resolution), crop_pos_x=left, crop_pos_y=top,
                                             mirror=mirror, mean=[127.5] * 3, std=[127.5] * 3, output_layout="FCHW",
                                             dtype=types.FLOAT)
            pipeline.set_outputs(video)
        pipeline.build()
        return pipeline


@cache
def tried(device: torch.device, codec: str, form: str, size: tuple[int, int]) -> str | None:
    """Why DALI does not decode this kind of video on this device: asked once in a process, with a clip that is made for it.

    So one file of a kind that the hardware lacks does not end a pipeline after the other, and no file decides for the next one.
    """
    kind = f"{codec} in {form}" + (f" of {size[0]}x{size[1]}" if size != (USUAL, USUAL) else "")
    with tempfile.TemporaryDirectory(prefix="seppo_fast_") as folder:
        try:
            clip = trial_clip(Path(folder), codec, form, size, TRIAL_SIDE)
        except Exception as error:  # FFmpeg's many
            return f"no clip of {kind} could be made here to try DALI with ({error})"
        if clip.facts.format != form:
            return f"no clip of {kind} could be made here to try DALI with (it became {clip.facts.format})"
        found, = Dali(TRIAL_SIDE, 1, 1, device).decode([clip])
        if found is None:
            return f"DALI does not decode {kind} here"
        if float((found - pyav.decode(clip)).abs().mean()) > TRIAL_LEVELS * LEVEL:
            return f"DALI shows {kind} in other colours"
    return None


def share(offset: int, spare: int) -> float:
    """Where a crop begins, in [0, 1] of the room that there is."""
    return offset / spare if spare else 0.0


def is_whole(pixels: Tensor, clip: Clip) -> bool:
    """Whether all frames came, none of them filled in. On a GPU, 255 is normalised to 1.0000001."""
    fill = torch.tensor(MISSING).mul(LEVEL).sub(1).view(3, 1, 1)
    filled = ((pixels - fill).abs() < LEVEL / 2).flatten(1).all(1)
    return len(pixels) == len(clip.indices) and not bool(filled.any())
