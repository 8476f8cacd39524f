"""The demonstrations: clean clips with right captions, as VP9 files and a CSV of MagicTime's form."""

import csv
import shutil
from pathlib import Path

import av
import numpy as np

from seppo_fast.quickstart.video.clips import CAPTIONS, RESOLUTION, Clips

RATE = 8  # frames a second


def write_demonstrations(folder: Path, clips: Clips) -> Path:
    """`{videoid}.webm` for each clip, and the CSV that names them; `is_transmit` 0: the whole clip evenly. Returns the CSV."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    frames = (clips.pixels[:, :, 0] * 255).round().byte().numpy()
    rows = []
    for index, label in enumerate(clips.labels.tolist()):
        write_clip(folder / f"{index:04d}.webm", frames[index])
        rows.append((f"{index:04d}", CAPTIONS[label], 0))
    # Last, so that an incomplete folder is not a data set.
    path = folder / "demonstrations.csv"
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("videoid", "name", "is_transmit"), *rows])
    return path


def write_clip(path: Path, frames: np.ndarray) -> None:
    """One VP9 file of grey frames (F, H, W) uint8, nearly lossless, the same bytes each time."""
    # Without bitexact the file would contain a random number.
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        options = {"crf": "4", "b": "0", "deadline": "realtime", "cpu-used": "8"}
        stream = container.add_stream("libvpx-vp9", rate=RATE, options=options)
        stream.width = stream.height = RESOLUTION
        stream.pix_fmt = "yuv420p"
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="gray")))
        container.mux(stream.encode(None))
