"""An image as a condition besides the prompt, as in InstructPix2Pix: the first convolution gets twice the latent channels."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from seppo_fast.models.directory import Directory

IMAGE = "image_latents"  # the condition (B, C, h, w): the VAE posterior's mean, unscaled; zeros are "no image"
# a model's name -> its pipeline's class with an image condition
PIPELINES = {"sd": "StableDiffusionInstructPix2PixPipeline", "sdxl": "StableDiffusionXLInstructPix2PixPipeline"}
NOT_IN_XL = ("feature_extractor", "image_encoder")  # which StableDiffusionXLPipeline may have
SCALES = "is_cosxl_edit"  # SDXL's switch in model_index.json: the pipeline scales the image latents


def has_image_condition(directory: Directory) -> bool:
    """Whether a directory holds a pipeline whose network is given an image."""
    return directory.index.get("_class_name") in PIPELINES.values()


def with_image_condition(directory: Directory, name: str) -> Directory:
    """The directory of a text-to-image model, "sd" or "sdxl", changed to that of an InstructPix2Pix pipeline."""
    unet = directory.configs["unet"]
    index = {part: value for part, value in directory.index.items() if not (name == "sdxl" and part in NOT_IN_XL)}
    return replace(directory, index=index | {"_class_name": PIPELINES[name]},
                   configs=directory.configs | {"unet": unet | {"in_channels": 2 * unet.get("in_channels", 4)}})


@torch.no_grad()
def widen(unet: UNet2DConditionModel) -> None:
    """Double the first convolution's input channels with zero weights: the output stays the same, whatever the image."""
    conv = unet.conv_in
    conv.weight = nn.Parameter(torch.cat([conv.weight, torch.zeros_like(conv.weight)], dim=1))
    conv.in_channels *= 2
    unet.register_to_config(in_channels=conv.in_channels)


def sees_image(unet: nn.Module) -> bool:
    """Whether a network has input channels for an image beside those of the latents."""
    config: Any = unet.config
    return isinstance(unet, UNet2DConditionModel) and bool(config.in_channels == 2 * config.out_channels)


def network_input(latents: Tensor, conditions: Mapping[str, Tensor], scale: float = 1.0) -> Tensor:
    """Latents (B, C, h, w) followed by the image's, (B, 2C, h, w); unchanged where there is no image condition."""
    if IMAGE not in conditions:
        return latents
    image = conditions[IMAGE].to(latents.dtype)
    return torch.cat([latents, image if scale == 1 else image * scale], dim=1)
