"""The models that are compared: pipeline directories, hub ids, and LoRA weights, which are put on the first model."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from seppo_fast.data.metadata import stamp_of
from seppo_fast.errors import UserError
from seppo_fast.evaluation.adapters import read_adapter
from seppo_fast.models import Conditions, Labels, Model, UNet, open_model
from seppo_fast.models.files import read_json
from seppo_fast.models.trial import run_unet
from seppo_fast.opening import expanded

FLAGS = Labels(path="the model", variant="--variant", motion_adapter="--motion-adapter", frames="--frames")
LORA = "pytorch_lora_weights.safetensors"
NAME = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.")


@dataclass(frozen=True)
class Candidate:
    """A model to compare. `given` is the path as the user gave it; `lora` is the LoRA file that is put on `model`, or None."""

    name: str
    given: str
    model: Model
    lora: Path | None

    @property
    def local(self) -> bool:
        """Whether it comes from files on this machine, whose content nothing can confirm."""
        return self.lora is not None or expanded(self.given).exists()

    def load_unet(self, dtype: torch.dtype) -> UNet:
        """The network from disk, on the CPU, for inference; adapters stay separate from the weights, as in training."""
        unet = self.model.load_unet(dtype)
        if self.lora is not None:
            read_adapter(self.lora, self.model).put_on("unet", unet)
            unet.to(dtype)
        return unet.eval().requires_grad_(False)

    def load_text(self, device: torch.device) -> Callable[[list[str]], Conditions]:
        """Prompts to conditions, by text encoders with the LoRA file's weights for them."""
        adapter = read_adapter(self.lora, self.model) if self.lora is not None else None
        return self.model.load_text(device, adapt=lambda part, encoder: adapter.put_on(part, encoder) if adapter else None)

    def fingerprint(self) -> str:
        """A digest of the files' names, sizes and times, to find out whether the samples in a folder are this model's."""
        directories = [self.model.directory, *filter(None, [getattr(self.model, "adapter", None)])]
        files = [file for directory in directories for weights in directory.weights.values() for file in weights.files]
        stamps = [[file.name, stamp_of(file)] for file in sorted({*files, *filter(None, [self.lora])})]
        return hashlib.sha256(json.dumps([stamps, self.model.scheduler_config], sort_keys=True).encode()).hexdigest()[:16]


def open_candidates(given: Sequence[str], variant: str | None, motion_adapter: str | None, frames: int) -> list[Candidate]:
    """The models of arguments `NAME=PATH`, checked without loading weights. A LoRA is put on the first model, or on its own
    in `PIPELINE+LORA`."""
    found: list[Candidate] = []
    for argument in given:
        name, equals, path = argument.partition("=")
        if not equals or not name or not path or not set(name) <= NAME:
            raise UserError(f"--models {argument}: NAME=PATH is needed, the name of letters, digits, '-', '_' and '.'")
        if any(name == other.name for other in found):
            raise UserError(f"--models {argument}: there are two models called {name!r}; give one another name")
        pipeline, lora = parts_of(path)
        if pipeline is None and not found:
            raise UserError(f"--models {argument}: {path} holds LoRA weights, which go on the first model, and this is the first:"
                            f" put its base before it, or say {name}=PIPELINE+{path}")
        try:
            model = found[0].model if pipeline is None else open_model(
                pipeline, variant=variant, motion_adapter=motion_adapter_for(pipeline, motion_adapter), frames=frames, labels=FLAGS)
            if lora is not None:
                read_adapter(lora, model)  # an error in it should not wait until the first model is drawn
            else:
                run_unet(model)
        except UserError as error:
            raise UserError(f"--models {argument}: {error}") from error
        found.append(Candidate(name, path, model, lora))
    kinds = {candidate.model.video for candidate in found}
    if len(kinds) > 1:
        images, videos = ([c.name for c in found if c.model.video is video] for video in (False, True))
        raise UserError(f"--models: {', '.join(images)} make images and {', '.join(videos)} videos, which have no scores in common;"
                        " evaluate them apart")
    return found


def parts_of(path: str) -> tuple[str | None, Path | None]:
    """Pipeline and LoRA file of `PIPELINE`, `PIPELINE+LORA` or `LORA`."""
    if lora := lora_file(path):
        return None, lora
    pipeline, plus, rest = path.rpartition("+")
    if plus and not Path(path).exists():
        lora = lora_file(rest)
        if lora is None:
            raise UserError(f"--models ...={path}: {rest} is no LoRA (a .safetensors file, or a folder with {LORA})")
        return pipeline, lora
    return path, None


def lora_file(path: str) -> Path | None:
    """The LoRA file in a folder, or the file itself; None where it is something else."""
    place = expanded(path)
    if place.is_dir() and (place / LORA).is_file() and not (place / "model_index.json").exists():
        return place / LORA
    return place if place.is_file() and place.suffix == ".safetensors" else None


def motion_adapter_for(pipeline: str, motion_adapter: str | None) -> str | None:
    """The motion adapter, unless the pipeline is an AnimateDiff, which has its own."""
    index = expanded(pipeline) / "model_index.json"
    own = index.is_file() and read_json(index).get("_class_name") == "AnimateDiffPipeline"
    return None if own else motion_adapter
