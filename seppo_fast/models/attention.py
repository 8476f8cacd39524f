"""Which attention kernel the UNets use: PyTorch's or xformers', as chosen or as measured."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from diffusers.models.attention_processor import Attention, AttentionProcessor, AttnProcessor2_0, XFormersAttnProcessor
from diffusers.utils import is_xformers_available

from seppo_fast.errors import UserError
from seppo_fast.models.animatediff import MOTION
from seppo_fast.models.common import UNet

KERNELS = ("xformers", "sdpa")  # where ranks choose differently the later one is taken, which works everywhere
TOKENS = 77  # of a prompt


class Layer(NamedTuple):
    """A kind of attention layer; `sequences` of `tokens` each are what it makes of a sample's latents."""

    heads: int
    channels: int
    prompt: int | None  # its channels, where the layer attends to it
    tokens: int
    sequences: int


def choose_attention(unets: Sequence[UNet], choice: Literal["auto", "sdpa", "xformers"], latents: tuple[int, ...],
                     dtype: torch.dtype, device: torch.device, say: Callable[[str], None] = print,
                     agree: Callable[[int], int] = lambda index: index) -> str:
    """Give all `unets` the same attention kernel and return its name; "auto" measures for `latents` in `dtype`.

    `latents` are (h, w), or (F, h, w) of videos. Ranks may measure differently: `agree` makes the largest of the indices into
    KERNELS that each has chosen everyone's.
    """
    missing = _missing(device)
    if choice == "xformers" and missing:
        raise UserError(f"seppo.model.attention: \"xformers\" does not work here: {missing}; use \"auto\" or \"sdpa\"")
    why = "as configured"
    if choice == "auto":
        choice, why = ("sdpa", missing) if missing else _faster(unets[0], latents, dtype, device)
        choice = KERNELS[agree(KERNELS.index(choice))]
    if choice == "xformers":
        for unet in unets:
            unet.enable_xformers_memory_efficient_attention()
    say(f"attention: {choice} ({why})")
    return choice


def _missing(device: torch.device) -> str | None:
    """What keeps xformers from being used on `device`."""
    if device.type != "cuda":
        return f"xformers has kernels for GPUs only, and this runs on {device.type}"
    if not is_xformers_available():
        return "xformers is not installed (pip install xformers, of the version made for this PyTorch)"
    try:
        from xformers.ops import memory_efficient_attention

        query = torch.zeros(1, 2, 40, device=device)
        memory_efficient_attention(query, query, query)
    except Exception as error:  # a build for another PyTorch or GPU raises what it likes
        return f"xformers fails ({type(error).__name__}: {str(error).splitlines()[0]})"
    return None


def _faster(unet: UNet, latents: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
    seconds = {name: _seconds(processor, layers(unet, latents), dtype, device)
               for name, processor in zip(KERNELS, (XFormersAttnProcessor(), AttnProcessor2_0()), strict=True)}
    best = min(seconds, key=seconds.get)
    return best, "measured: " + ", ".join(f"{name} {1000 * value:.2f} ms" for name, value in seconds.items())


def layers(unet: UNet, latents: tuple[int, ...]) -> Counter[Layer]:
    """How often each kind of attention layer occurs in `unet`, for latents of (h, w), or of (F, h, w) where it has motion modules.

    These attend along the frames, for every place; all others within a frame.
    """
    found: Counter[Layer] = Counter()
    deepest = len(unet.down_blocks) - 1
    frames = latents[0] if len(latents) == 3 else 1
    for name, module in unet.named_modules():
        if not isinstance(module, Attention):
            continue
        place, index = name.split(".")[:2]
        level = {"down_blocks": lambda i: i, "up_blocks": lambda i: deepest - i}.get(place, lambda i: deepest)(
            int(index) if index.isdecimal() else 0)
        height, width = (-(-side // 2**level) for side in latents[-2:])
        prompt = module.cross_attention_dim if module.is_cross_attention else None
        tokens, sequences = (frames, height * width) if MOTION in name else (height * width, frames)
        found[Layer(module.heads, module.query_dim, prompt, tokens, sequences)] += 1
    return found


@torch.no_grad()
def _seconds(processor: AttentionProcessor, kinds: Counter[Layer], dtype: torch.dtype, device: torch.device, batch: int = 8,
             runs: int = 10) -> float:
    """Device seconds of all attention layers of one forward of `batch` samples."""
    total = 0.0
    for (heads, channels, prompt, tokens, sequences), count in kinds.items():
        layer = Attention(channels, prompt, heads, channels // heads, processor=processor).to(device, dtype)
        hidden = torch.randn(batch * sequences, tokens, channels, device=device, dtype=dtype)
        given = None if prompt is None else torch.randn(batch * sequences, TOKENS, prompt, device=device, dtype=dtype)
        for _ in range(3):
            layer(hidden, given)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(runs):
            layer(hidden, given)
        end.record()
        end.synchronize()
        total += count * start.elapsed_time(end) / 1000 / runs
    return total
