"""The real clips that generated ones are compared with."""

from pathlib import Path

from torch import Tensor

from seppo_fast import config
from seppo_fast.data.rows import BadRow
from seppo_fast.data.video.clips import clip
from seppo_fast.data.video.probe import probe
from seppo_fast.data.video.pyav import decode
from seppo_fast.errors import UserError


def read_clip(path: Path, frames: int, resolution: int) -> Tensor:
    """`frames` frames evenly over the whole clip, (F, 3, R, R) in [0, 1]: short side to `resolution`, center crop, as for training.

    A clip of fewer frames repeats some. PyAV decodes it on every machine, so that a score does not depend on a GPU's decoder.
    """
    data = config.Data(resolution=resolution, crop="center", flip=False, video=config.Video(frames=frames, choice="uniform"))
    try:
        pixels = decode(clip(str(path), path, probe(path), False, data, 0, 0))
    except (UserError, MemoryError):
        raise
    except BadRow as bad:
        raise UserError(f"the real clip {path} cannot be used: {bad}") from None
    except Exception as error:  # FFmpeg has many errors, and a file may be replaced between the two readings
        raise UserError(f"the real clip {path} cannot be decoded: {error}") from error
    return pixels.add_(1).div_(2)
