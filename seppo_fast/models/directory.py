"""A diffusers pipeline directory, read and checked before any weight is loaded."""

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import transformers
from diffusers import MotionAdapter

from seppo_fast.errors import UserError
from seppo_fast.models.files import Weights, check_folder, check_not_empty, find_weights, read_index, read_json
from seppo_fast.models.hub import download
from seppo_fast.models.labels import KEYS, Labels
from seppo_fast.models.values import check_values
from seppo_fast.opening import expanded
from seppo_fast.sections import Quantized

HERE = "."  # the component of a directory that holds only one
NONE = "none"  # a component's class where the pipeline goes without it
Components = Mapping[str, Collection[str]]  # each with the classes it may have (empty: whichever)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Directory:
    """A checked pipeline directory: `index` is model_index.json, `configs` and `weights` are by component."""

    path: Path
    index: dict[str, Any]
    configs: dict[str, dict[str, Any]]
    weights: dict[str, Weights]
    labels: Labels = KEYS
    quantize_text: Quantized | None = None  # how its text encoders' weights are stored once they are loaded

    @property
    def denoiser(self) -> str:
        """The component that denoises: "unet" or "transformer"."""
        return "transformer" if "transformer" in self.configs else "unet"


def kind_of(name: str) -> Any:
    """The class of a component by its name, of diffusers or transformers."""
    return getattr(diffusers, name, None) or getattr(transformers, name)


def is_hub_id(path: str) -> bool:
    """Whether `path` names a model on the hub: owner/name, and there is no local folder "owner"."""
    return bool(HUB_ID.fullmatch(path)) and not Path(path).exists() and not Path(path).parent.is_dir()


def locate(path: str, revision: str | None, variant: str | None, key: str = "path", labels: Labels = KEYS) -> Path:
    """The local directory of the setting `key`: `path` itself, or the snapshot of a hub id."""
    local, named = expanded(path), f"{getattr(labels, key)} {path!r}"
    kind, maker = (("diffusers pipeline", "StableDiffusionPipeline") if key == "path" else ("MotionAdapter", "MotionAdapter"))
    if local.is_dir():
        return local
    if local.exists():
        raise UserError(f"{named} is a file; a {kind} directory is needed. Convert a "
                        f"checkpoint with {maker}.from_single_file(FILE).save_pretrained(FOLDER).")
    if not is_hub_id(path):
        raise UserError(f"{named} does not exist: give a {kind} directory, or a hub id (owner/name).")
    return download(path, revision, variant, key, labels)


def read_directory(path: Path, variant: str | None, families: Mapping[str, Components], labels: Labels = KEYS) -> Directory:
    """Read the configurations and check that all the files that training needs are there and whole.

    `families` are the components of the pipelines that can be opened, by class.
    """
    if not os.path.lexists(path / "model_index.json"):
        hint = ""
        if (path / "run.json").is_file():
            hint = f" It is a run's folder: the trained model is in {path / 'final'}."
        elif (path / "config.json").is_file():
            hint = " It looks like one component of a pipeline: give its parent."
        raise UserError(f"{path} has no model_index.json, so it is no diffusers pipeline directory.{hint}")
    index = read_index(path / "model_index.json")
    family = families.get(str(index.get("_class_name")))
    if family is None:
        known = [name for name in families if "Pix2Pix" not in name]
        raise UserError(f"{path / 'model_index.json'}: _class_name is {index.get('_class_name')!r}; "
                        f"what can be trained is {', '.join(known[:-1])} and {known[-1]}.")
    configs, weights = {}, {}
    for component, allowed in family.items():
        folder = path / component
        value = index.get(component)
        name = value[1] if isinstance(value, list) else None
        if name is None and NONE in allowed:
            continue
        if name is None or allowed and name not in allowed:
            raise UserError(f"{path / 'model_index.json'}: {component} is {value!r}, where "
                            f"{' or '.join(allowed) or 'one'} is needed.")
        if not folder.is_dir():
            raise UserError(f"{folder} is missing, though model_index.json lists it. Fetch the whole model again.")
        if component == "scheduler":
            configs[component] = read_json(folder / "scheduler_config.json")
        elif component.startswith("tokenizer"):
            check_tokenizer(folder)
        else:
            configs[component] = read_json(folder / "config.json")
            check_not_quantized(folder / "config.json", configs[component])
            kind = kind_of(name)
            check_values(folder / "config.json", configs[component], getattr(kind, "config_class", kind))
            library = "transformers" if component.startswith("text") else "diffusers"
            weights[component] = find_weights(folder, library, variant, labels.variant)
    directory = Directory(path, index, configs, weights, labels)
    if variant is not None and weights[directory.denoiser].variant != variant:
        folder = path / directory.denoiser
        present = sorted(file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))
        raise UserError(f"{labels.variant} {variant!r}: {folder} has no such weights, but {', '.join(present)}.")
    return directory


def check_not_quantized(file: Path, config: Mapping[str, Any]) -> None:
    """Refuse a component whose files hold quantized weights."""
    settings = config.get("quantization_config")
    if settings is not None:
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        raise UserError(f"{file}: quantization_config says that these weights are quantized already{f' ({method})' * bool(method)}."
                        " They can neither be trained nor quantized twice: take the model that is not quantized;"
                        " seppo.model.quantize and seppo.model.quantize_text quantize it when it is loaded")


def read_adapter(path: Path, variant: str | None, labels: Labels = KEYS) -> Directory:
    """A motion adapter's directory: its configuration and weights are the component `HERE`."""
    if (path / "model_index.json").is_file():
        raise UserError(f"{labels.motion_adapter}: {path} is a whole pipeline; give an AnimateDiff pipeline as {labels.path}, with"
                        " no motion adapter beside it")
    config = read_json(path / "config.json")
    if config.get("_class_name") != "MotionAdapter":
        raise UserError(f"{labels.motion_adapter}: {path / 'config.json'} is of a {config.get('_class_name')!r}, where a"
                        " 'MotionAdapter' is needed")
    check_values(path / "config.json", config, MotionAdapter)
    return Directory(path, {}, {HERE: config}, {HERE: find_weights(path, "diffusers", variant, labels.variant)}, labels)


def check_tokenizer(folder: Path) -> None:
    """A tokenizer is a tokenizer.json, or as CLIP's a vocab.json with merges.txt, or as T5's a spiece.model."""
    check_folder(folder)
    alone = next((name for name in ("tokenizer.json", "spiece.model") if (folder / name).is_file()), None)
    names = (alone,) if alone else ("vocab.json", "merges.txt")
    for name in names:
        check_not_empty(folder / name)
        if name.endswith(".json"):
            read_json(folder / name)
