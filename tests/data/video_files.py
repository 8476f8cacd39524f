"""Videos of every kind, tiny, written by PyAV for the tests of the video section."""

import csv
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from seppo_fast import config
from seppo_fast.models import AnimateDiff, StableDiffusion
from seppo_fast.models.directory import Directory

VP9 = {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0"}
CODECS = {".webm": "libvpx-vp9", ".mp4": "libx264", ".mov": "mjpeg", ".mkv": "libx264"}


class VideoModel(AnimateDiff):
    """The tiny Stable Diffusion's VAE and text encoder, as AnimateDiff uses them, without its network."""

    components = StableDiffusion.components

    def __init__(self, directory: Directory) -> None:
        StableDiffusion.__init__(self, directory)


def pictures(count: int, height: int = 24, width: int = 32, seed: int = 0) -> np.ndarray:
    """Frames (F, H, W, 3) uint8 of moving coloured waves, each a little brighter than the one before."""
    phase = np.random.default_rng(seed).uniform(0, 6, 3)
    y, x = (axis[..., None] / 8 for axis in np.mgrid[:height, :width])
    colour = np.arange(3)
    waves = [np.sin(x * (1 + colour) / 2 + phase + 0.2 * i) * np.cos(y + colour) for i in range(count)]
    return np.stack([60 + 4 * (i % 30) + 50 * wave for i, wave in enumerate(waves)]).clip(0, 255).astype(np.uint8)


def write_video(file: Path, frames: np.ndarray, codec: str | None = None, *, times: list[int] | None = None, rotation: int = 0,
                mirrored: bool = False, pixel: str | None = None, audio: bool = False, colours: tuple[int, int] | None = None,
                format: str | None = None, gop: int = 10, options: dict[str, str] | None = None, form: str | None = None,
                signal: tuple[int, int] | None = None, encoder: dict[str, str] | None = None,
                marks: dict[str, str] | None = None) -> Path:
    """Encodes frames (of RGB or RGBA) at 10 a second, or at `times` in milliseconds.

    `colours` are FFmpeg's (matrix, range), `signal` its (primaries, transfer), `form` the pixel format, `encoder` options of the
    codec, `marks` the stream's metadata.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    codec = codec or CODECS[file.suffix]
    form = form or ("yuvj420p" if codec == "mjpeg" else "yuv420p")
    space, range_ = colours or (None, None)
    with av.open(str(file), "w", format=format, options=options or {}) as container:
        usual = VP9 if "vpx" in codec else {"preset": "ultrafast"} if "x264" in codec else {}
        stream = container.add_stream(codec, rate=10, options={**usual, **(encoder or {})})
        stream.metadata.update(marks or {})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], form
        context = stream.codec_context
        context.gop_size, context.time_base = gop, Fraction(1, 1000)
        if pixel:
            context.sample_aspect_ratio = Fraction(pixel)
        if colours:
            context.colorspace, context.color_range = colours
        if signal:
            context.color_primaries, context.color_trc = signal
        if mirrored:
            stream.set_display_matrix([-(1 << 16), 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30])
        elif rotation:
            stream.set_display_rotation(rotation)
        sound = container.add_stream("libopus" if file.suffix in (".webm", ".mkv") else "aac", rate=48000) if audio else None
        for index, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24" if picture.shape[-1] == 3 else "rgba")
            frame = frame.reformat(format=form, dst_colorspace=space, dst_color_range=range_)
            frame.pts, frame.time_base = times[index] if times else 100 * index, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 48000), np.float32), format="fltp", layout="mono")
            silence.rate, silence.pts = 48000, 0
            container.mux([*sound.encode(silence), *sound.encode(None)])
    return file


def write_csv(file: Path, rows: list[tuple], columns: tuple[str, ...] = ("videoid", "name", "is_transmit")) -> Path:
    """A CSV as AnimateDiff and MagicTime have them."""
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows([columns, *rows])
    return file


def video_settings(source: object, folder: Path, video: dict[str, Any] | None = None, **more: object) -> config.Data:
    """`config.Data` for 4 frames of 16x16, with the cache in `folder`/cache."""
    return config.Data(**{"source": str(source), "resolution": 16, "flip": False, "cache_dir": str(folder / "cache"),
                          "encode_batch_size": 3, "workers": 2, "cache_dtype": "float32",
                          "video": config.Video(**{"frames": 4, "stride": 2, **(video or {})}), **more})
