"""Which branches of the guidance each step of a sample predicts: guidance is not worth its price at every noise level."""

from collections.abc import Sequence
from typing import Literal

from seppo_fast.config import Sampler
from seppo_fast.errors import UserError
from seppo_fast.reference.guidance import Guidance

# "all" branches; the "prompt"'s alone, without guidance; or the prompt's, with the others as they were predicted last ("kept").
Call = Literal["all", "prompt", "kept"]


def calls_of(levels: Sequence[float], branches: int, settings: Sampler) -> tuple[Call, ...]:
    """The call of each step, at these noise levels (shares of the schedule, 1 is noise), of a guidance of so many branches.

    Guidance in a limited interval is from Kynkaanniemi et al. 2024. `UserError` where no step lies in it.
    """
    low, high = settings.guidance_interval
    calls: list[Call] = ["all"] * len(levels)
    if branches == 1:
        return tuple(calls)
    inside = [low <= level <= high for level in levels]
    if not any(inside):
        raise UserError(f"seppo.sampler.guidance_interval: none of the {len(levels)} steps lies in [{low:g}, {high:g}]; they are at"
                        f" {', '.join(f'{level:.3g}' for level in levels)}. Widen it, or set guidance_scale to 1")
    for number, guided in enumerate(inside):
        turn = sum(inside[:number]) % settings.unconditional_every
        calls[number] = "prompt" if not guided else "kept" if turn else "all"
    return tuple(calls)


def size_with(branches: int, size: int, before: int) -> int:
    """The batch size with so many branches whose batches have no more rows than `size` samples of `before` branches."""
    return min(size, max(1, size * before // branches))


def evaluations(calls: Sequence[Call], guidance: Guidance) -> int:
    """How often the network is evaluated for one sample."""
    return sum(len(guidance) if call == "all" else 1 for call in calls)
