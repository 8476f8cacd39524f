"""What a model must offer the trainer: encode, decode, denoise, prompts to conditions. One file per family."""

from seppo_fast.models.common import Conditions, alphas_cumprod
from seppo_fast.models.directory import is_hub_id, locate, read_directory
from seppo_fast.models.sd import StableDiffusion
from seppo_fast.models.sdxl import StableDiffusionXL

__all__ = ["Conditions", "StableDiffusion", "StableDiffusionXL", "alphas_cumprod", "is_hub_id",
           "open_model"]


def open_model(
    path: str, *, revision: str | None = None, variant: str | None = None
) -> StableDiffusion | StableDiffusionXL:
    """A diffusers pipeline directory, or a hub id, checked as far as that goes without loading weights."""
    directory = read_directory(locate(str(path), revision, variant), variant)
    xl = directory.index["_class_name"] == "StableDiffusionXLPipeline"
    return StableDiffusionXL(directory) if xl else StableDiffusion(directory)
