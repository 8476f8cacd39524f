"""Opening models. `contract.py` says what each offers the trainer; `families.py` lists them, one file per family."""

from dataclasses import replace

from seppo_fast import broken_xformers  # noqa: F401  before diffusers' models
from seppo_fast.errors import UserError
from seppo_fast.models.animatediff import AnimateDiff
from seppo_fast.models.common import alphas_cumprod
from seppo_fast.models.contract import Conditions, Denoiser, Model
from seppo_fast.models.directory import Directory, is_hub_id, locate, read_adapter
from seppo_fast.models.families import EDITING, FAMILIES, open_directory
from seppo_fast.models.labels import KEYS, Labels
from seppo_fast.models.pix2pix import with_image_condition
from seppo_fast.models.sd import StableDiffusion
from seppo_fast.models.sdxl import StableDiffusionXL
from seppo_fast.models.trial import make_networks
from seppo_fast.sections import Quantized

__all__ = ["AnimateDiff", "Conditions", "Denoiser", "Labels", "Model", "StableDiffusion", "StableDiffusionXL", "alphas_cumprod",
           "is_hub_id", "open_improvement_model", "open_model"]


def open_model(path: str, *, revision: str | None = None, variant: str | None = None, motion_adapter: str | None = None,
               frames: int = 1, image_condition: bool = False, quantize_text: Quantized | None = None, labels: Labels = KEYS
               ) -> Model:
    """The model in a diffusers pipeline directory or behind a hub id, checked as far as possible without loading weights.

    With a `motion_adapter` (a directory or hub id), Stable Diffusion becomes an AnimateDiff. A video model must have positions for
    `frames`. With an `image_condition`, Stable Diffusion and SDXL become InstructPix2Pix models that do not use the image yet; one
    that is such a model already stays as it is. `quantize_text` is how its text encoders' weights are stored. `labels` is what
    messages call these settings.
    """
    directory = open_directory(locate(str(path), revision, variant, labels=labels), variant, labels)
    family = directory.index["_class_name"]
    if not image_condition and family in EDITING:
        raise UserError(f"{labels.path}: {path} is a {family}: it changes a given image, and cannot draw from a prompt alone."
                        f" {labels.needs_image}")
    model = _open(replace(directory, quantize_text=quantize_text), path, variant, motion_adapter, frames, labels)
    make_networks(model)
    return add_image_condition(model) if image_condition else model


def open_improvement_model(path: str, *, revision: str | None = None, variant: str | None = None, labels: Labels = KEYS) -> Model:
    """The trained InstructPix2Pix model in a directory or behind a hub id: it makes winners from losers."""
    directory = open_directory(locate(str(path), revision, variant, labels=labels), variant, labels)
    family = directory.index["_class_name"]
    if family not in EDITING:
        raise UserError(f"{labels.path}: {path} is a {family}, which is given no image that it could improve. Give the final folder"
                        f' of a run with method "improvement", or another {" or ".join(EDITING)}')
    model = _open(directory, path, variant, None, 1, labels)
    make_networks(model)
    return model


def add_image_condition(model: Model) -> Model:
    """The same model with an image as a condition besides the prompt, which does not change its predictions yet."""
    if model.image_condition:
        return model
    if isinstance(model, AnimateDiff):
        raise UserError(f"{model.directory.labels.path} {model.path}: an improvement model is made of an image model, and not of a"
                        " video model: give a Stable Diffusion or SDXL pipeline, and no motion adapter")
    if not isinstance(model, StableDiffusion | StableDiffusionXL):
        raise UserError(f"{model.directory.labels.path} {model.path}: an improvement model is an InstructPix2Pix model, which is"
                        f" made of Stable Diffusion or SDXL, and not of a {model.directory.index.get('_class_name')}")
    return type(model)(with_image_condition(model.directory, model.name))


def _open(directory: Directory, path: str, variant: str | None, motion_adapter: str | None, frames: int, labels: Labels) -> Model:
    family = directory.index["_class_name"]
    if motion_adapter is not None and family != "StableDiffusionPipeline":
        has = ", and this has its motion modules already: leave it out" if family == "AnimateDiffPipeline" else ""
        raise UserError(f"{labels.motion_adapter}: {path} is a {family}; motion adapters go with Stable Diffusion 1.x{has}")
    if motion_adapter is not None:
        adapter = read_adapter(locate(str(motion_adapter), None, variant, "motion_adapter", labels), variant, labels)
        model: Model = AnimateDiff(directory, adapter)
    else:
        model = (FAMILIES | EDITING)[family](directory)
    model.check_frames(frames)
    return model
