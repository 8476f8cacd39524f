"""Vendi score (Friedman & Dieng 2023): the effective number of different images in a set, of all prompts or of one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from seppo_fast.evaluation.scores.clip import center_pixels, image_features, image_size, load_clip

Embedder = Callable[[Sequence[Image.Image]], Tensor]  # RGB images -> (N, D) fp32 on the CPU


@dataclass(frozen=True)
class SetScore:
    """A score of a set of images: each is embedded, and all embeddings together give one number.

    `within_prompts`: the set is the images of one prompt, so that each prompt has a value, and the score is their mean.
    """

    name: str
    label: str
    wants: Mapping[str, str]  # as a Score's
    load: Callable[[Mapping[str, Path], torch.device], Embedder]
    of: Callable[[Tensor], float]
    better: str = "higher"
    packages: tuple[str, ...] = ()
    within_prompts: bool = False


def load(parts: Mapping[str, Path], device: torch.device) -> Embedder:
    """CLIP's image embeddings, of length 1."""
    model = load_clip(parts["model"], device)
    return lambda images: image_features(model, center_pixels(images, image_size(model))).cpu()


def vendi(embeddings: Tensor) -> float:
    """exp(-sum l log l) over the eigenvalues l of K / N, K the cosines of (N, D) embeddings: 1 (all alike) to N; NaN if N is 0."""
    vectors = embeddings.double()
    vectors = vectors / vectors.norm(dim=-1, keepdim=True)
    if not len(vectors) or not vectors.isfinite().all():
        return float("nan")
    # X X^T and X^T X have the same eigenvalues except for zeros, which add nothing
    gram = vectors @ vectors.T if len(vectors) <= vectors.shape[1] else vectors.T @ vectors
    # rounding makes some of the zeros negative
    return float(torch.special.entr(torch.linalg.eigvalsh(gram / len(vectors)).clamp(min=0)).sum().exp())


VENDI = SetScore("vendi", "Vendi", {"model": "openai/clip-vit-large-patch14"}, load, vendi)
VENDI_PROMPT = SetScore("vendi_prompt", "Vendi within prompts", VENDI.wants, load, vendi, within_prompts=True)
