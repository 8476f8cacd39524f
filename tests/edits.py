"""Calls of a tiny network that is given an image beside the prompt."""

import torch
from tiny import LATENTS


def call(model, unet, image=None, dtype=torch.float32):
    """The network's output for fixed latents and prompts, with an image where one is given."""
    g = torch.Generator().manual_seed(0)
    widths = {"prompt_embeds": (2, 77, 32)} if model.name == "sd" else {"prompt_embeds": (2, 77, 80), "pooled": (2, 40)}
    conditions = {key: torch.randn(shape, generator=g).to(dtype) for key, shape in widths.items()}
    latents = torch.randn(2, *LATENTS, generator=g).to(dtype)
    if image is not None:
        conditions["image_latents"] = image
    with torch.no_grad():
        return model.denoise(unet, latents, torch.tensor([5, 800]), conditions)


def images(seed=1):
    """Two images' latents, unscaled."""
    return 8 * torch.randn(2, *LATENTS, generator=torch.Generator().manual_seed(seed))
