"""LAION's aesthetic predictor: the rating, 1 to 10, of a linear head on the CLIP-L/14 image embedding."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from seppo_fast.evaluation.scores.base import Score, Scorer
from seppo_fast.evaluation.scores.clip import center_pixels, image_features, image_size, load_clip
from seppo_fast.evaluation.weights import check_fit, read_tensors


def load(parts: Mapping[str, Path], device: torch.device) -> Scorer:
    """The head on embeddings of length 1, without the prompt. As christophschuhmann/improved-aesthetic-predictor, in fp32."""
    clip = load_clip(parts["clip"], device)
    head = load_head(parts["model"], clip.config.projection_dim).to(device)

    @torch.inference_mode()
    def score(images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        # halves are rounded as in torchvision's CenterCrop, which OpenAI's `clip.load` uses
        pixels = center_pixels(images, image_size(clip), half=lambda margin: round(margin / 2))
        return head(image_features(clip, pixels)).squeeze(-1).cpu()

    return score


def load_head(file: Path, width: int) -> nn.Module:
    """`sac+logos+ava1-l14-linearMSE.pth` ("layers.0.weight" ...), or the older `sa_0_4_vit_l_14_linear.pth` ("weight", "bias")."""
    state = read_tensors(file)
    head = nn.Linear(width, 1) if "weight" in state else Layers(width)
    check_fit(file, head.state_dict(), state, f"an aesthetic head of {width} inputs")
    head.load_state_dict(state)
    return head.eval().requires_grad_(False)


class Layers(nn.Module):
    """Five linear layers in a row, as in the public file: no activations, and dropout (without weights) in training only."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64), nn.Dropout(0.1),
            nn.Linear(64, 16), nn.Linear(16, 1),
        )

    def forward(self, embeddings: Tensor) -> Tensor:
        """(N, D) -> (N, 1)."""
        return self.layers(embeddings)


# trl's mirror of sac+logos+ava1-l14-linearMSE.pth, which its author has on GitHub only
AESTHETIC = Score("aesthetic", "Aesthetic",
                  {"model": "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth", "clip": "openai/clip-vit-large-patch14"}, load)
