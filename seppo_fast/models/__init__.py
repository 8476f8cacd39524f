"""What a model must offer the trainer: encode, decode, denoise, prompts to conditions. One file per family."""

from seppo_fast import broken_xformers  # noqa: F401  before diffusers' models
from seppo_fast.errors import UserError
from seppo_fast.models.animatediff import AnimateDiff
from seppo_fast.models.common import Conditions, UNet, alphas_cumprod
from seppo_fast.models.directory import is_hub_id, locate, read_adapter, read_directory
from seppo_fast.models.labels import KEYS, Labels
from seppo_fast.models.sd import StableDiffusion
from seppo_fast.models.sdxl import StableDiffusionXL
from seppo_fast.models.trial import make_networks

__all__ = ["AnimateDiff", "Labels", "Conditions", "Model", "StableDiffusion", "StableDiffusionXL", "UNet", "alphas_cumprod",
           "is_hub_id", "open_model"]

Model = StableDiffusion | StableDiffusionXL | AnimateDiff


def open_model(path: str, *, revision: str | None = None, variant: str | None = None, motion_adapter: str | None = None,
               frames: int = 1, labels: Labels = KEYS) -> Model:
    """A diffusers pipeline directory, or a hub id, checked as far as that goes without loading weights.

    With a `motion_adapter`, a directory or hub id too, Stable Diffusion becomes an AnimateDiff. `frames` is what a video model
    must have positions for. `labels` is what messages call all these.
    """
    model = _open(path, revision, variant, motion_adapter, frames, labels)
    make_networks(model)
    return model


def _open(path: str, revision: str | None, variant: str | None, motion_adapter: str | None, frames: int, labels: Labels) -> Model:
    directory = read_directory(locate(str(path), revision, variant, labels=labels), variant, labels)
    family = directory.index["_class_name"]
    if motion_adapter is not None and family != "StableDiffusionPipeline":
        has = ", and this has its motion modules already: leave it out" if family == "AnimateDiffPipeline" else ""
        raise UserError(f"{labels.motion_adapter}: {path} is a {family}; motion adapters go with Stable Diffusion 1.x{has}")
    if family == "StableDiffusionXLPipeline":
        return StableDiffusionXL(directory)
    if motion_adapter is None and family == "StableDiffusionPipeline":
        return StableDiffusion(directory)
    adapter = None
    if motion_adapter is not None:
        adapter = read_adapter(locate(str(motion_adapter), None, variant, "motion_adapter", labels), variant, labels)
    model = AnimateDiff(directory, adapter)
    model.check_frames(frames)
    return model
