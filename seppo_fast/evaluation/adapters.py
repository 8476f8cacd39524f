"""LoRA files (diffusers' or kohya's names, text encoders, alphas): put on a model completely, or refused."""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import safe_open
from torch import Tensor, nn

from seppo_fast.errors import UserError, few
from seppo_fast.models import Model
from seppo_fast.models.common import empty_text_encoder
from seppo_fast.models.files import check_tensors
from seppo_fast.strict import parse_json

LORA = (".lora_A.", ".lora_B.", "_lora.down.", "_lora.up.", ".lora.down.", ".lora.up.", ".lora_linear_layer.")
UPS = (".lora_up.weight", ".lora_B.weight", "_lora.up.weight", ".lora.up.weight", ".lora_linear_layer.up.weight")
KOHYA, UP = "lora_", (".lora_up.weight", ".lora_B.weight", ".up.weight")


@dataclass(frozen=True)
class Adapter:
    """The tensors of a LoRA file by their diffusers names, with alphas multiplied in, and its metadata."""

    file: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any] | None

    def check(self, model: Model) -> None:
        """`UserError` unless each tensor has a place in the model, of which no weights are loaded."""
        empty = Adapter(self.file, {name: value.to("meta") for name, value in self.tensors.items()}, self.metadata)
        with torch.device("meta"):
            empty.put_on(model.denoiser, model.empty_denoiser())
            for part in model.text_encoders:
                if any(name.startswith(f"{part}.") for name in self.tensors):
                    empty.put_on(part, empty_text_encoder(model.directory, part))

    def put_on(self, part: str, module: nn.Module) -> None:
        """Put adapters beside the weights of `module`, the component `part`; `UserError` unless each tensor has a place."""
        own = {name: value for name, value in self.tensors.items() if name.startswith(f"{part}.")}
        if not own:
            return
        try:
            with quiet_diffusers():
                if not part.startswith("text_encoder"):
                    module.load_lora_adapter(own, prefix=part, metadata=self.metadata)
                else:
                    StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder(own, None, module, part, metadata=self.metadata)
        except Exception as error:  # loaders may raise anything; the file's names and shapes are the only input
            why = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])  # wrong shapes are on the second
            raise UserError(f"{self.file} does not fit the model's {part}: {why}") from error
        placed = sum(".lora_" in name for name, _ in module.named_parameters())
        if placed != len(own):
            raise UserError(f"{self.file} has {len(own)} LoRA tensors for the {part}, where this model's layers of these names have"
                            f" {placed}: it is another model's LoRA, or a part of one (it begins with {few(own)})")


def read_adapter(file: Path, model: Model) -> Adapter:
    """The LoRA in a safetensors file, for a model of this family; `UserError` where a part of it would not be used."""
    check_tensors(file)
    # names in other trainers' files are translated by the UNet's configuration
    known = {} if model.denoiser != "unet" else {
        "unet_config": FrozenDict({"layers_per_block": 2} | model.directory.configs["unet"])}
    raw, metadata = content_of(file)
    if scales := [name for name in raw if "dora_scale" in name or "magnitude_vector" in name]:
        raise UserError(f"{file} is a DoRA ({few(scales)}), whose scales diffusers leaves out; merge it into its model instead")
    if metadata and (alphas := [name for name in raw if name.endswith(".alpha")]):
        raise UserError(f"{file} says its alphas twice, in tensors ({few(alphas)}) and in metadata; remove one of them")
    try:
        raw = scaled(file, raw)
        before = strength(raw)
        with quiet_diffusers():
            found = model.lora_loader.lora_state_dict(dict(raw), **known)
            tensors = found[0] if isinstance(found, tuple) else found  # the rest are alphas, which are in the tensors
    except UserError:
        raise
    except Exception as error:  # names that kohya's conversion does not know, tensors that are not matrices
        raise UserError(f"{file} is no LoRA that diffusers reads: {str(error).strip().splitlines()[0]}") from error
    parts = [part for part in (model.denoiser, *model.text_encoders) if part in model.lora_loader._lora_loadable_modules]
    if strangers := [name for name in tensors if name.split(".")[0] not in parts or not any(kind in name for kind in LORA)]:
        raise UserError(f"{file} has tensors that are no LoRA of this model's {', '.join(parts)}: {few(strangers)}")
    if not any(name.startswith(f"{model.denoiser}.") for name in tensors):
        kind = "UNet" if model.denoiser == "unet" else model.denoiser
        raise UserError(f"{file} has no weights for a {kind} ({model.denoiser}.*)")
    if not math.isclose(strength(tensors), before, rel_tol=1e-6):
        raise UserError(f"{file} has tensors that diffusers leaves out, because they are of layers or text encoders that it puts no"
                        f" LoRA on (it begins with {few(raw)}); take one of the transformer and the CLIP text encoder alone")
    return Adapter(file, tensors, metadata)


def strength(tensors: Mapping[str, Tensor]) -> float:
    """The sum of squares of all up matrices, which a change of their names, or their parts, does not change."""
    return math.fsum(float(value.double().square().sum()) for name, value in tensors.items() if name.endswith(UP))


def content_of(file: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of a safetensors file, and the metadata of diffusers or PEFT about the adapter."""
    try:
        with safe_open(file, "pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}
            noted = (content.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY)
        metadata = parse_json(noted) if noted else None
    except Exception as error:
        raise UserError(f"{file} is no safetensors file that can be read: {error}") from error
    if not isinstance(metadata, dict | None):
        raise UserError(f"{file}: its metadata {LORA_ADAPTER_METADATA_KEY} are {noted[:60]!r}, where a JSON object is expected")
    if bad := [name for name, value in tensors.items() if not value.isfinite().all()]:
        raise UserError(f"{file} has tensors with NaN or infinity: {few(bad)}; train or fetch it again")
    if bad := [name for name, value in tensors.items() if value.numel() != 1 if name.endswith(".alpha")]:
        raise UserError(f"{file} has alphas that are no single numbers: {few(bad)}")
    return tensors, metadata


def scaled(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with alphas multiplied in: each layer's up matrix times alpha / rank. Loaders treat alphas differently."""
    alphas = {name.removesuffix(".alpha"): float(value) for name, value in tensors.items() if name.endswith(".alpha")}
    found = {}
    for name, value in tensors.items():
        layer = next((name.removesuffix(up) for up in UPS if name.endswith(up)), None)
        if not name.endswith(".alpha"):
            found[name] = value.float() * (alphas.pop(layer) / value.shape[1]) if layer in alphas else value
        if layer is not None and name.startswith(KOHYA):  # some of diffusers' conversions want an alpha
            found[f"{layer}.alpha"] = torch.tensor(float(value.shape[1]))
    if alphas:
        raise UserError(f"{file} has alphas of layers that it has no LoRA for: {few(alphas)}")
    return found


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """No warnings by diffusers: tensors that it would leave out are an error here, with the file's name."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
