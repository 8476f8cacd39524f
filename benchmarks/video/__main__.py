"""Decoded frames per second of DALI and PyAV: `python -m benchmarks.video --out benchmarks/results`.

Both give what the trainer takes: 16 frames of a clip at 256 pixels, scaled, cropped and normalised, on the CPU. A batch has one
clip for each thread. For each codec, size, number of threads and choice of frames the two take turns. Writes video_cpu.json. With
`--seconds 0.3` it took four and a half minutes on 2 cores.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from itertools import product
from pathlib import Path

import av
import numpy as np
import torch

from benchmarks.result_files import Row, about, one_row_a_line
from benchmarks.timing import alternated
from seppo_fast import config
from seppo_fast.data.video import dali, pyav
from seppo_fast.data.video.clips import Clip, clip
from seppo_fast.data.video.probe import probe

CODECS = {"vp9": ("libvpx-vp9", ".webm"), "vp8": ("libvpx", ".webm"), "mjpeg": ("mjpeg", ".mov"), "h264": ("libx264", ".mp4")}
SIZES = {"256x256": (256, 256), "640x360": (360, 640), "1280x720": (720, 1280)}
CHOICES = ("uniform", "window")
FRAMES, RESOLUTION, LENGTH = 16, 256, 96


def write(file: Path, codec: str, height: int, width: int) -> Path:
    """Write a clip of `LENGTH` frames: coloured waves with noise, which move across the picture."""
    y, x = (axis[..., None].astype(np.float32) / height for axis in np.mgrid[:height, :width])
    waves = 128 + 90 * np.sin(8 * x + np.arange(3, dtype=np.float32)) * np.cos(6 * y)
    picture = (waves + np.random.default_rng(0).normal(0, 4, (height, width, 1))).clip(0, 255).astype(np.uint8)
    options = {"deadline": "realtime", "cpu-used": "8"} if "vpx" in codec else {"preset": "veryfast"} if codec == "libx264" else {}
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=24, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.bit_rate = 4 * height * width
        for index in range(LENGTH):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, (index, 3 * index), (0, 1)), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 24)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file


def clips_of(file: Path, choice: str, count: int) -> list[Clip]:
    """A batch: the same file `count` times, each time with its own choice of frames."""
    data = config.Data(resolution=RESOLUTION, crop="random", video=config.Video(frames=FRAMES, choice=choice))
    facts = probe(file)
    return [clip(str(number), file, facts, False, data, 0, 0) for number in range(count)]


def measure(folder: Path, threads: int, seconds: float) -> Iterator[Row]:
    """A row for each codec, size and choice with `threads` threads."""
    pipeline = dali.Dali(RESOLUTION, threads, threads, torch.device("cpu"))
    with ThreadPoolExecutor(threads) as pool:
        for codec, size, choice in product(CODECS, SIZES, CHOICES):
            clips = clips_of(folder / f"{codec}_{size}{CODECS[codec][1]}", choice, threads)
            calls = {"dali": partial(pipeline.decode, clips), "pyav": lambda clips=clips: list(pool.map(pyav.decode, clips))}
            if pipeline.refuses(clips[0].facts):
                del calls["dali"]
            for call in calls.values():  # builds the pipeline and fills the caches
                call()
            times = alternated(calls, seconds, least=3)
            rates = {f"{name}_frames_per_s": round(FRAMES * threads / statistics.median(took), 1) for name, took in times.items()}
            row = {"codec": codec, "size": size, "choice": choice, "threads": threads, **rates}
            if "dali" in calls:
                row["dali_over_pyav"] = round(rates["dali_frames_per_s"] / rates["pyav_frames_per_s"], 3)
            yield row | {"calls": min(map(len, times.values()))}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.video", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each codec, size, choice and number of threads")
    given = parser.parse_args(argv)
    import nvidia.dali

    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # PyAV has one thread for each clip
    counts = sorted({1, 2, os.cpu_count() or 1})
    result = about("cpu", "av")
    result["versions"] |= {"dali": nvidia.dali.__version__}
    result["settings"] = {"frames": FRAMES, "resolution": RESOLUTION, "length": LENGTH, "seconds": given.seconds}
    with tempfile.TemporaryDirectory(prefix="seppo-video-") as name:
        folder = Path(name)
        for codec, size in product(CODECS, SIZES):
            write(folder / f"{codec}_{size}{CODECS[codec][1]}", CODECS[codec][0], *SIZES[size])
        rows: list[Row] = []
        for threads in counts:
            for row in measure(folder, threads, given.seconds):
                rows.append(row)
                print(row, flush=True)
                result["rows"] = rows
                result["load_average_at_end"] = round(os.getloadavg()[0], 2)
                (given.out / "video_cpu.json").write_text(one_row_a_line(result))


if __name__ == "__main__":
    main()
