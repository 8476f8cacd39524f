"""The families of models, by their pipelines' classes. A new one is its file, and a line here."""

from pathlib import Path

from seppo_fast.models.animatediff import AnimateDiff
from seppo_fast.models.contract import Model
from seppo_fast.models.directory import Components, Directory, read_directory
from seppo_fast.models.flux import Flux
from seppo_fast.models.flux2_klein import Flux2Klein
from seppo_fast.models.labels import KEYS, Labels
from seppo_fast.models.pix2pix import PIPELINES
from seppo_fast.models.qwen import QwenImage
from seppo_fast.models.sd import StableDiffusion
from seppo_fast.models.sd3 import StableDiffusion3
from seppo_fast.models.sdxl import StableDiffusionXL
from seppo_fast.models.wan import Wan

FAMILIES: dict[str, type[Model]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "AnimateDiffPipeline": AnimateDiff,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "WanPipeline": Wan,
    "Flux2KleinPipeline": Flux2Klein,
    "QwenImagePipeline": QwenImage,
}
# The same family, with an image as a condition besides the prompt.
EDITING: dict[str, type[Model]] = {PIPELINES["sd"]: StableDiffusion, PIPELINES["sdxl"]: StableDiffusionXL}
COMPONENTS: dict[str, Components] = {name: family.components for name, family in (FAMILIES | EDITING).items()}


def open_directory(path: Path, variant: str | None = None, labels: Labels = KEYS) -> Directory:
    """The directory of a pipeline of any family, checked."""
    return read_directory(path, variant, COMPONENTS, labels)
