"""Human Preference Score v2 and v2.1 (Wu et al. 2023): open_clip's ViT-H-14 tuned on rankings of HPD v2."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from seppo_fast.evaluation.scores.base import Score, Scorer
from seppo_fast.evaluation.scores.clip import cosines, image_size, load_open_clip, load_tokenizer, padded_pixels


def load(parts: Mapping[str, Path], device: torch.device) -> Scorer:
    """100 times the cosine, as in the paper's tables (27.20, where `hpsv2.score` gives 0.2720), in fp32."""
    model = load_open_clip(parts["model"], device)
    tokenizer = load_tokenizer(parts["tokenizer"], model)

    def score(images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        pixels = padded_pixels(images, image_size(model))
        return (100 * cosines(model, tokenizer, pixels, [cleaned(prompt) for prompt in prompts])).cpu()

    return score


def cleaned(prompt: str) -> str:
    """The prompt as open_clip's tokenizer cleans it, and transformers' does not: curly quotes, HTML entities, broken Unicode."""
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()


TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
HPS_V2 = Score("hpsv2", "HPS v2", {"model": "xswu/HPSv2/HPS_v2_compressed.pt", "tokenizer": TOKENIZER}, load,
               packages=("ftfy",))
HPS_V21 = Score("hpsv21", "HPS v2.1", {"model": "xswu/HPSv2/HPS_v2.1_compressed.pt", "tokenizer": TOKENIZER}, load,
                packages=("ftfy",))
