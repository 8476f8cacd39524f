"""Which attention kernel the denoisers use: PyTorch's or xformers', as configured or as measured."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, XFormersAttnProcessor
from diffusers.utils import is_xformers_available
from torch import Tensor

from seppo_fast import broken_xformers
from seppo_fast.errors import UserError, reason
from seppo_fast.models.animatediff import MOTION
from seppo_fast.models.contract import Denoiser, UNet
from seppo_fast.models.launches import Launches, set_processors

PROCESSORS = {"xformers": XFormersAttnProcessor, "sdpa": AttnProcessor2_0}
KERNELS = tuple(PROCESSORS)  # where ranks choose differently they take the later one, which works everywhere
TOKENS = 77  # of a prompt


class Layer(NamedTuple):
    """A kind of attention layer. It makes `sequences` of `tokens` each from a sample's latents."""

    heads: int
    channels: int
    prompt: int | None  # the prompt's channels, where the layer attends to the prompt
    tokens: int
    sequences: int


def choose_attention(denoisers: Sequence[Denoiser], choice: Literal["auto", "sdpa", "xformers"], latents: tuple[int, ...],
                     dtype: torch.dtype, device: torch.device, say: Callable[[str], None] = print,
                     agree: Callable[[int], int] = lambda index: index) -> str:
    """Give all `denoisers` the same attention kernel and return its name; "auto" measures for `latents` in `dtype`.

    `latents` are (h, w), or (F, h, w) of videos. Ranks may measure differently, so `agree` returns the largest of their indices
    into KERNELS. Transformers have PyTorch's kernel.
    """
    unets = [denoiser for denoiser in denoisers if isinstance(denoiser, UNet)]
    if not unets:
        say("attention: sdpa (the one that transformers have here)")
        return "sdpa"
    kinds = layers(unets[0], latents)
    missing = None if choice == "sdpa" else _missing(device, dtype, kinds)
    if choice == "xformers" and missing:
        raise UserError(f"seppo.model.attention: \"xformers\" does not work here: {missing}; use \"auto\" or \"sdpa\"")
    why = "as configured"
    if choice == "auto":
        choice, why = ("sdpa", missing) if missing else _faster(kinds, dtype, device)
        choice = KERNELS[agree(KERNELS.index(choice))]
    if device.type == "cuda":  # elsewhere kernels have no grid, and PyTorch's processors are already set
        for unet in unets:
            set_processors(unet, PROCESSORS[choice])
    say(f"attention: {choice} ({why})")
    return choice


def _missing(device: torch.device, dtype: torch.dtype, kinds: Iterable[Layer]) -> str | None:
    """Why xformers cannot be used on `device` for such layers in `dtype`, forward and backward; None where it can."""
    if broken_xformers.WHY:
        return broken_xformers.WHY
    if device.type != "cuda":
        return f"xformers has kernels for GPUs only, and this runs on {device.type}"
    if not is_xformers_available():
        return "xformers is not installed (pip install xformers, of the version made for this PyTorch)"
    for layer in kinds:  # xformers chooses a kernel by dtype and channels a head, and not every build has all of them
        try:
            attend, hidden, given = _alone(layer, XFormersAttnProcessor(), 1, dtype, device)
            attend(hidden.requires_grad_(), given).sum().backward()
        except Exception as error:  # a build for another PyTorch or GPU may raise anything
            return f"xformers fails ({reason(error)}) for {layer.tokens} tokens of {layer.heads} heads in {dtype}"
    return None


def _faster(kinds: Counter[Layer], dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
    """The kernel whose layers take less time, and both times; a kernel that fails is not taken."""
    seconds, notes = {}, []
    for name, processor in PROCESSORS.items():
        try:
            seconds[name] = _seconds(processor, kinds, dtype, device)
            notes.append(f"{name} {1000 * seconds[name]:.2f} ms")
        except Exception as error:  # what a kernel raises depends on who made it
            notes.append(f"{name} fails ({reason(error)})")
    if not seconds:
        raise UserError(f"seppo.model.attention: no kernel works here for these layers in {dtype}: {'; '.join(notes)}")
    return min(seconds, key=seconds.get), "measured: " + ", ".join(notes)


def layers(unet: UNet, latents: tuple[int, ...]) -> Counter[Layer]:
    """How often each kind of attention layer occurs in `unet`, for latents of (h, w), or of (F, h, w) where it has motion modules.

    Motion modules attend along the frames, at each place of the latents; all other layers attend within a frame.
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
def _seconds(processor: type[AttnProcessor2_0] | type[XFormersAttnProcessor], kinds: Counter[Layer], dtype: torch.dtype,
             device: torch.device, batch: int = 8, runs: int = 10) -> float:
    """Device seconds of all attention layers in one forward of `batch` samples, with the processors that will run."""
    total = 0.0
    for layer, count in kinds.items():
        attend, *given = _alone(layer, Launches(processor()), batch * layer.sequences, dtype, device)
        for _ in range(3):
            attend(*given)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(runs):
            attend(*given)
        end.record()
        end.synchronize()
        total += count * start.elapsed_time(end) / 1000 / runs
    return total


def _alone(layer: Layer, processor: XFormersAttnProcessor | Launches, rows: int, dtype: torch.dtype, device: torch.device
           ) -> tuple[Attention, Tensor, Tensor | None]:
    """A layer of that kind with random weights, and random inputs for it."""
    attend = Attention(layer.channels, layer.prompt, layer.heads, dim_head=layer.channels // layer.heads, processor=processor)
    hidden = torch.randn(rows, layer.tokens, layer.channels, device=device, dtype=dtype)
    given = None if layer.prompt is None else torch.randn(rows, TOKENS, layer.prompt, device=device, dtype=dtype)
    return attend.to(device, dtype), hidden, given
