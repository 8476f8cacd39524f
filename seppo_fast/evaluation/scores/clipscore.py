"""CLIP score (Hessel et al. 2021): how well the image fits its prompt."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from seppo_fast.evaluation.scores.base import Score, Scorer
from seppo_fast.evaluation.scores.clip import center_pixels, cosines, image_size, load_clip, load_tokenizer


def load(parts: Mapping[str, Path], device: torch.device) -> Scorer:
    """100 max(cosine, 0) for each image: torchmetrics' weight (the paper's is 2.5), and the prompt without the paper's prefix.

    A long prompt is cut as in the paper's code, which keeps the end token; torchmetrics drops that token.
    """
    model = load_clip(parts["model"], device)
    tokenizer = load_tokenizer(parts["model"], model)

    def score(images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        pixels = center_pixels(images, image_size(model))
        return (100 * cosines(model, tokenizer, pixels, prompts).clamp(min=0)).cpu()

    return score


CLIP_SCORE = Score("clipscore", "CLIP score", {"model": "openai/clip-vit-large-patch14"}, load)
