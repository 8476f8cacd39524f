"""Guidance as a weighted sum over branches: a branch is the network's output under some of the conditions."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from seppo_fast.errors import UserError
from seppo_fast.models import Model
from seppo_fast.models.pix2pix import IMAGE


@dataclass(frozen=True)
class Branch:
    """`weight` times the output, with the conditions in `empty` replaced by what they are for no prompt, or no image."""

    weight: float
    empty: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Guidance:
    """The sum over `branches`, of which the last has all conditions; then `rescale(sum, output of the last)`, if there is one."""

    branches: tuple[Branch, ...]
    rescale: Callable[[Tensor, Tensor], Tensor] | None = None

    def __len__(self) -> int:
        """How often the network is called for a sample's step."""
        return len(self.branches)

    def combined(self, outputs: Sequence[Tensor]) -> Tensor:
        """The guided output, fp32, of one output of each branch."""
        first, *others = [branch.weight * output for branch, output in zip(self.branches, outputs, strict=True)]
        guided = sum(others, first)
        return guided if self.rescale is None or not others else self.rescale(guided, outputs[-1])


def classifier_free(scale: float, conditions: Iterable[str], rescale: Callable[[Tensor, Tensor], Tensor] | None = None) -> Guidance:
    """`u + scale * (t - u)`, t with the prompt and u without."""
    return Guidance(_needed(Branch(1 - scale, frozenset(conditions)), Branch(scale)), rescale)


def guided(model: Model, scale: float, conditions: Iterable[str], label: str = "seppo.sampler.guidance_scale"
           ) -> tuple[Callable[..., Tensor], Guidance]:
    """The model's `denoise` and its guidance by a scale, which a distilled network is given as an input.

    Policy and reference are trained with the same `denoise`. `label` is what messages call the scale.
    """
    denoise: Callable[..., Tensor] = model.denoise
    if model.embeds_guidance:
        return partial(denoise, guidance=scale), Guidance((Branch(1.0),))
    if not model.guidance and scale != 1:
        raise UserError(f"{label}: {scale:g} has no effect on {model.path}: it was distilled from a guided model and has no"
                        " guidance embedding (guidance_embeds); set it to 1")
    return denoise, classifier_free(scale, conditions, model.rescale_guidance)


def double(text_scale: float, image_scale: float, conditions: Iterable[str]) -> Guidance:
    """`u + s_I (i - u) + s_T (t - i)`: t with image and prompt, i with the image alone, u with neither (Eq. 9)."""
    every = frozenset(conditions)
    return Guidance(_needed(Branch(1 - image_scale, every), Branch(image_scale - text_scale, every - {IMAGE}), Branch(text_scale)))


def _needed(*branches: Branch) -> tuple[Branch, ...]:
    """Without those that have no weight, but for the last: at a scale of 1 there is nothing to subtract."""
    return (*(branch for branch in branches[:-1] if branch.weight != 0), branches[-1])
