"""The models that are compared: pipelines, LoRA weights on the first model, and models that improve another's samples."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from seppo_fast.data.metadata import stamp_of
from seppo_fast.errors import UserError
from seppo_fast.evaluation.adapters import read_adapter
from seppo_fast.models import Conditions, Denoiser, Labels, Model, open_improvement_model, open_model
from seppo_fast.models.files import read_json
from seppo_fast.models.trial import run_denoiser
from seppo_fast.models.vae_memory import PLAIN, VaeMemory, with_vae_memory
from seppo_fast.opening import expanded

FLAGS = Labels(path="the model", variant="--variant", motion_adapter="--motion-adapter", frames="--frames",
               needs_image="Say whose samples it is to improve: NAME=PATH@OTHER, where OTHER is the name of a model before it")
LORA = "pytorch_lora_weights.safetensors"
NAME = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.")


@dataclass(frozen=True)
class Candidate:
    """A model to compare. `given` is the path as the user gave it; `lora` is the LoRA file that is put on `model`, or None.

    `source` is the model whose samples this one improves; None where it draws from a prompt alone.
    """

    name: str
    given: str
    model: Model
    lora: Path | None
    source: "Candidate | None" = None

    @property
    def local(self) -> bool:
        """Whether it comes from files on this machine, whose content nothing can confirm."""
        path = self.given if self.source is None else self.given.removesuffix(f"@{self.source.name}")
        return self.lora is not None or expanded(path).exists()

    @property
    def turns(self) -> int:
        """How many improvements its samples have gone through."""
        return 0 if self.source is None else self.source.turns + 1

    def load_denoiser(self, dtype: torch.dtype) -> Denoiser:
        """The network from disk, on the CPU, for inference; adapters stay separate from the weights, as in training."""
        denoiser = self.model.load_denoiser(dtype)
        if self.lora is not None:
            read_adapter(self.lora, self.model).put_on(self.model.denoiser, denoiser)
            for name, weight in denoiser.named_parameters():  # not the others: a pipeline may keep some of them in fp32
                if ".lora_" in name:
                    weight.data = weight.data.to(dtype)
        return denoiser.eval().requires_grad_(False)

    def load_text(self, device: torch.device) -> Callable[[list[str]], Conditions]:
        """Prompts to conditions, by text encoders with the LoRA file's weights for them."""
        adapter = read_adapter(self.lora, self.model) if self.lora is not None else None
        return self.model.load_text(device, adapt=lambda part, encoder: adapter.put_on(part, encoder) if adapter else None)

    def fingerprint(self) -> str:
        """A digest of the files' names, sizes and times, to find out whether the samples in a folder are this model's."""
        directories = [self.model.directory, *filter(None, [getattr(self.model, "adapter", None)])]
        files = [file for directory in directories for weights in directory.weights.values() for file in weights.files]
        stamps = [[file.name, stamp_of(file)] for file in sorted({*files, *filter(None, [self.lora])})]
        made_of = [stamps, self.model.scheduler_config, *([] if self.source is None else [self.source.fingerprint()])]
        return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]


def open_candidates(given: Sequence[str], variant: str | None, motion_adapter: str | None, frames: int | None,
                    vae_memory: VaeMemory = PLAIN) -> list[Candidate]:
    """The models of arguments `NAME=PATH`, checked without loading weights.

    A LoRA is put on the first model, or on its own in `PIPELINE+LORA`. `PATH@OTHER` improves the samples of OTHER, a model
    before it.
    """
    found: list[Candidate] = []
    for argument in given:
        name, equals, path = argument.partition("=")
        if not equals or not path or not is_name(name):
            raise UserError(f"--models {argument}: NAME=PATH is needed, the name of letters, digits, '-', '_' and '.'")
        if any(name == other.name for other in found):
            raise UserError(f"--models {argument}: there are two models called {name!r}; give one another name")
        try:
            found.append(open_candidate(name, path, found, variant, motion_adapter, frames))
            with_vae_memory(found[-1].model, vae_memory, "--vae-tiling", "--vae-slicing")
        except UserError as error:
            raise UserError(f"--models {argument}: {error}") from error
    kinds = {candidate.model.video for candidate in found}
    if len(kinds) > 1:
        images, videos = ([c.name for c in found if c.model.video is video] for video in (False, True))
        raise UserError(f"--models: {', '.join(images)} make images and {', '.join(videos)} videos, which have no scores in common;"
                        " evaluate them apart")
    return found


def open_candidate(name: str, path: str, before: Sequence[Candidate], variant: str | None, motion_adapter: str | None,
                   frames: int | None) -> Candidate:
    """The model of `NAME=PATH`, given those before it."""
    place, source = improved_by(path, before)
    pipeline, lora = parts_of(place)
    if pipeline is None and source is not None:
        raise UserError(f"{place} holds LoRA weights, which go on the first model, and this is given no image that it could"
                        f" improve: say {name}=PIPELINE+{path}")
    if pipeline is None and not before:
        raise UserError(f"{path} holds LoRA weights, which go on the first model, and this is the first: put its base before it,"
                        f" or say {name}=PIPELINE+{path}")
    if pipeline is None:
        model = before[0].model
    elif source is not None:
        model = open_improvement_model(pipeline, variant=variant, labels=FLAGS)
    else:
        model = open_model(pipeline, variant=variant, motion_adapter=motion_adapter_for(pipeline, motion_adapter),
                           frames=frames or 1, labels=FLAGS)
    if lora is not None:
        read_adapter(lora, model).check(model)  # an error in it should not wait until the first model is drawn
    else:
        run_denoiser(model)
    return Candidate(name, path, model, lora, source)


def frames_of(candidates: Sequence[Candidate]) -> int:
    """How many frames their videos have where nobody says it; `UserError` where one of them cannot make so many."""
    frames = max(candidate.model.usual_frames for candidate in candidates)
    for candidate in candidates:
        candidate.model.check_frames(frames)
    return frames


def is_name(text: str) -> bool:
    """Whether a model may be called so."""
    return bool(text) and set(text) <= NAME


def improved_by(path: str, before: Sequence[Candidate]) -> tuple[str, Candidate | None]:
    """`PATH@OTHER` as the path and the model whose samples it improves; (`path`, None) where it is a path alone."""
    place, at, name = path.rpartition("@")
    if not at or not place or not is_name(name) or expanded(path).exists():
        return path, None
    source = next((candidate for candidate in before if candidate.name == name), None)
    if source is None:
        names = ", ".join(candidate.name for candidate in before) or "none"
        raise UserError(f"it is to improve the samples of {name!r}, and there is no model of that name before it (before it:"
                        f" {names})")
    if source.model.video:
        raise UserError(f"{name} makes videos, and an improvement model is one of images")
    inner, at, other = place.rpartition("@")
    if at and not expanded(place).exists() and (is_name(other) or expanded(other).exists()):
        raise UserError("there can be one @NAME. To improve samples twice, give the first improvement a name, too:"
                        f" once={other}@{name} twice={inner}@once")
    return place, source


def parts_of(path: str) -> tuple[str | None, Path | None]:
    """Pipeline and LoRA file of `PIPELINE`, `PIPELINE+LORA` or `LORA`."""
    if lora := lora_file(path):
        return None, lora
    pipeline, plus, rest = path.rpartition("+")
    if plus and not Path(path).exists():
        lora = lora_file(rest)
        if lora is None:
            raise UserError(f"{rest} is no LoRA (a .safetensors file, or a folder with {LORA})")
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
