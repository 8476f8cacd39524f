"""Guidance as a weighted sum over branches: a branch is the network's output under some of the conditions."""

from collections.abc import Callable, Iterable
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


Branches = tuple[Branch, ...]


def classifier_free(scale: float, conditions: Iterable[str]) -> Branches:
    """`u + scale * (t - u)`, t with the prompt and u without."""
    return _needed(Branch(1 - scale, frozenset(conditions)), Branch(scale))


def guided(model: Model, scale: float, conditions: Iterable[str], label: str = "seppo.sampler.guidance_scale"
           ) -> tuple[Callable[..., Tensor], Branches]:
    """The model's `denoise` and the branches for a guidance scale, which a distilled network is given as an input.

    Policy and reference are trained with the same `denoise`. `label` is what messages call the scale.
    """
    denoise: Callable[..., Tensor] = model.denoise
    if model.embeds_guidance:
        return partial(denoise, guidance=scale), (Branch(1.0),)
    if not model.guidance and scale != 1:
        raise UserError(f"{label}: {scale:g} has no effect on {model.path}: it was distilled from a guided model and has no"
                        " guidance embedding (guidance_embeds); set it to 1")
    return denoise, classifier_free(scale, conditions)


def double(text_scale: float, image_scale: float, conditions: Iterable[str]) -> Branches:
    """`u + s_I (i - u) + s_T (t - i)`: t with image and prompt, i with the image alone, u with neither (Eq. 9)."""
    every = frozenset(conditions)
    return _needed(Branch(1 - image_scale, every), Branch(image_scale - text_scale, every - {IMAGE}), Branch(text_scale))


def _needed(*branches: Branch) -> Branches:
    """Without emptied ones that have no weight: at a scale of 1 there is nothing to subtract."""
    return tuple(branch for branch in branches if branch.weight != 0 or not branch.empty)
