"""Clips through PyAV and torch: every codec that FFmpeg knows, on the CPU."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from seppo_fast.data.framing import Framing
from seppo_fast.data.images import on_white
from seppo_fast.data.video.clips import Clip, turned
from seppo_fast.data.video.probe import decoded, decoder_of, need_av, url_of

# swscale's plain conversion, to the bit that of DALI; its fast paths, PyAV's default, are off by up to 73 levels at coloured edges.
EXACT = "flags=bilinear+full_chroma_int+accurate_rnd"


@torch.no_grad()
def decode(clip: Clip) -> Tensor:
    """The clip's frames, (F, 3, R, R) fp32 in [-1, 1]; read from the file's beginning to the last frame that is wanted."""
    av = need_av()
    wanted, squares = set(clip.indices), {}
    with av.open(url_of(clip.file), metadata_errors="replace") as container:
        stream = container.streams[clip.facts.stream]
        graph = None
        for index, frame in enumerate(decoded(container, stream, decoder_of(av, stream))):
            if index in wanted:
                frame.colorspace, frame.color_range = clip.facts.colours
                graph = graph or to_rgb(av, frame, "rgba" if clip.facts.alpha else "rgb24")
                graph.push(frame)
                pixels = graph.pull().to_ndarray()
                if clip.facts.alpha:
                    pixels = np.array(on_white(Image.fromarray(pixels)))
                squares[index] = square(torch.from_numpy(pixels), clip.frame, clip.resolution)
                if len(squares) == len(wanted):
                    break
    if len(squares) < len(wanted):
        raise EOFError(f"it ends before its frame {max(wanted)}")
    return turned(torch.stack([squares[index] for index in clip.indices]).div_(127.5).sub_(1), clip)


def to_rgb(av: Any, frame: Any, form: str) -> Any:
    """A filter graph from frames like this one to packed RGB or RGBA."""
    graph = av.filter.Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    steps = [source, graph.add("scale", EXACT), graph.add("format", form), graph.add("buffersink")]
    for step, following in zip(steps, steps[1:], strict=False):
        step.link_to(following)
    graph.configure()
    return graph


def square(rgb: Tensor, frame: Framing, side: int) -> Tensor:
    """RGB (H, W, 3) uint8 -> the scaled square (3, side, side), whole grey levels as fp32."""
    pixels = shrunk(shrunk(rgb.permute(2, 0, 1).float(), frame.width, -1), frame.height, -2)
    pixels = pixels[:, frame.top:frame.top + side, frame.left:frame.left + side].round()
    return pixels.flip(-1) if frame.mirror else pixels


def shrunk(pixels: Tensor, length: int, axis: int) -> Tensor:
    """(3, H, W) scaled along one axis, bilinear and antialiased; beyond the border the outermost pixels go on, as in DALI.

    torch's own filter ends at the border instead, which changes the first and the last pixel.
    """
    before = pixels.shape[axis]
    if length == before:
        return pixels
    size = (length, pixels.shape[-1]) if axis == -2 else (pixels.shape[-2], length)
    scaled = interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]
    scale = before / length
    if scale > 1:
        reach = torch.arange(-int(scale) - 1, 2 * int(scale) + 2)
        weights = (1 - (reach + 0.5 - 0.5 * scale).abs() / scale).clamp(min=0)
        weights /= weights.sum()
        for place, taps in ((0, reach.clamp(0, before - 1)), (length - 1, (before - 1 - reach).clamp(0, before - 1))):
            edge = torch.tensordot(pixels.index_select(axis, taps), weights, dims=([axis % 3], [0]))
            scaled.select(axis, place).copy_(edge)
    return scaled
