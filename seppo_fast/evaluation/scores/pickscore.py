"""PickScore (Kirstain et al. 2023): a CLIP-H/14 that was tuned on people's choices in Pick-a-Pic."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from seppo_fast.evaluation.scores.base import Score, Scorer
from seppo_fast.evaluation.scores.clip import center_pixels, cosines, image_size, load_clip, load_tokenizer


def load(parts: Mapping[str, Path], device: torch.device) -> Scorer:
    """Cosine times the learnt `logit_scale.exp()` (100), about 20 for good images; as the model card computes it, in fp32."""
    model = load_clip(parts["model"], device)
    tokenizer = load_tokenizer(parts["tokenizer"], model)

    def score(images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        pixels = center_pixels(images, image_size(model))
        return (model.logit_scale.exp() * cosines(model, tokenizer, pixels, prompts)).cpu()

    return score


# the model card takes tokenizer and preprocessing from the CLIP that PickScore was tuned from
PICKSCORE = Score("pickscore", "PickScore",
                  {"model": "yuvalkirstain/PickScore_v1", "tokenizer": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}, load)
