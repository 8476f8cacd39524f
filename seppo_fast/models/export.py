"""The trained policy in a form that plain diffusers loads: a whole pipeline directory, or LoRA weights."""

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from seppo_fast.config import Lora
from seppo_fast.disk import flush_tree, follow_umask
from seppo_fast.errors import UserError, few
from seppo_fast.models import Model
from seppo_fast.models.animatediff import AnimateDiff, motion_adapter
from seppo_fast.models.files import SMALL, entry_point, read_json, shards
from seppo_fast.models.lora import ADAPTER, choose_trained, lora_config, trainable_weights

TRAINED = ("unet", "transformer", "motion_adapter")


def save_pipeline(
    model: Model, trained: Mapping[str, Tensor], folder: Path, lora: Lora | None, card: str
) -> None:
    """Write all of `folder` or nothing: `pytorch_lora_weights.safetensors`, or the pipeline; `card` is README.md.

    `trained` are the weights that were trained: all of the denoiser's, an AnimateDiff's motion modules, or an adapter's. Of a
    model with an image condition it is always the pipeline: no LoRA file could bring its first convolution along.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in trained.items()}
    with replacing(Path(folder)) as temporary:
        if lora is not None and not model.image_condition:
            save_lora(model, weights, temporary, lora)
        else:
            copy_components(model, temporary)
            if isinstance(model, AnimateDiff):
                save_motion(model, weights, temporary)
            else:
                save_denoiser(model, weights if lora is None else merged(model, weights, lora), temporary / model.denoiser)
        (temporary / "README.md").write_text(card, encoding="utf-8")


def save_denoiser(model: Model, weights: Mapping[str, Tensor], folder: Path) -> None:
    """A network that holds these weights, in their own dtype; a missing or unknown name is an error."""
    with torch.device("meta"):
        denoiser = model.empty_denoiser()
    if kept := denoiser.state_dict().keys() - dict(denoiser.named_parameters()).keys():  # a table of positions, never trained
        source = model.load_denoiser(next(iter(weights.values())).dtype).state_dict()
        weights = {**weights, **{name: source[name] for name in kept}}
    denoiser.load_state_dict(dict(weights), strict=True, assign=True)
    denoiser.save_pretrained(folder, safe_serialization=True)


def merged(model: Model, weights: Mapping[str, Tensor], lora: Lora) -> dict[str, Tensor]:
    """The weights with the trained adapter's in them, in fp32: in half precision a small adapter would be rounded away."""
    denoiser = model.load_denoiser(torch.float32)
    choose_trained(denoiser, lora, seed=0)
    if trainable_weights(denoiser).keys() != weights.keys():
        raise ValueError(f"not the weights that are trained: {few(trainable_weights(denoiser).keys() ^ weights.keys())}")
    denoiser.load_state_dict(dict(weights), strict=False)
    denoiser.fuse_lora()
    denoiser.unload_lora()
    return dict(denoiser.state_dict())


def save_motion(model: AnimateDiff, weights: Mapping[str, Tensor], folder: Path) -> None:
    """The source's UNet with the trained motion modules, and these alone: an AnimateDiff pipeline has both."""
    unet = model.load_denoiser(next(iter(weights.values())).dtype)
    left = unet.load_state_dict(dict(weights), strict=False)
    if left.unexpected_keys:
        raise ValueError(f"the UNet has no {', '.join(left.unexpected_keys[:3])}")
    unet.save_pretrained(folder / "unet", safe_serialization=True)
    motion_adapter(unet).save_pretrained(folder / "motion_adapter", safe_serialization=True)
    if model.adapter is not None:  # not Stable Diffusion's, which was copied
        write_json(model.scheduler_config, folder / "scheduler" / "scheduler_config.json")


def save_lora(model: Model, weights: Mapping[str, Tensor], folder: Path, lora: Lora) -> None:
    """diffusers' own LoRA file. Its metadata carry alpha, without which loaders take alpha = rank."""
    layers = {name.replace(f".{ADAPTER}.", "."): tensor for name, tensor in weights.items()}
    # Only what a loader needs: it gives all of it to its own version's LoraConfig, which refuses unknown names.
    # No dropout: load_lora_weights leaves the layers it adds in training mode, so sampling would use the dropout.
    with torch.device("meta"):
        config = lora_config(model.empty_denoiser(), lora)
    targets = config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules)
    metadata = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": targets}
    model.lora_loader.save_lora_weights(folder, **{f"{model.denoiser}_lora_layers": layers,
                                                   f"{model.denoiser}_lora_adapter_metadata": metadata})
    sort_metadata(folder / "pytorch_lora_weights.safetensors")


def sort_metadata(path: Path) -> None:
    """Sort a file's metadata, so that equal runs write equal bytes: safetensors orders it differently at every call."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def copy_components(model: Model, folder: Path) -> None:
    """Every component but those that are trained, byte for byte, with one set of weights each, under the name loaded by default."""
    source, index = model.path, dict(model.directory.index)
    for component, files in copied(model).items():
        if files is not None:
            (folder / component).mkdir(parents=True)
            for file, name in files.items():
                shutil.copyfile(file, folder / component / name)
        else:  # an optional component (the safety checker) that the source does not have
            index[component] = [None, None]
            if component == "safety_checker":
                index["requires_safety_checker"] = False
    if index == read_json(source / "model_index.json"):
        shutil.copyfile(source / "model_index.json", folder / "model_index.json")
    else:
        write_json(index, folder / "model_index.json")


def write_json(value: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copied(model: Model) -> dict[str, dict[Path, str] | None]:
    """By component the files that are copied, and their new names; None for one that the source does not have."""
    files: dict[str, dict[Path, str] | None] = {}
    for component, value in model.directory.index.items():
        if component in TRAINED or not (isinstance(value, list) and value and value[0]):
            continue
        there = component in model.components or (model.path / component).is_dir()
        library = "diffusers" if value[0] == "diffusers" else "transformers"
        files[component] = copied_of(model.path / component, library, model, component) if there else None
    return files


def copied_bytes(model: Model) -> int:
    """The size of all that is copied."""
    return sum(file.stat().st_size for files in copied(model).values() for file in files or ())


def copied_of(source: Path, library: str, model: Model, component: str) -> dict[Path, str]:
    """The small files, and of the weights only the set that this run read, without its variant's name."""
    names = {path.name for path in source.iterdir() if path.is_file()}
    files = {source / name: name for name in sorted(names) if name.endswith(SMALL) and ".index." not in name}
    taken = model.directory.weights.get(component)
    found = entry_point(names, library, taken.variant if taken else model.directory.weights[model.denoiser].variant)
    if found is None:
        return files
    entry, variant, _ = found
    files[source / entry] = entry.replace(f".{variant}.", ".") if variant else entry
    return files | {source / name: name for name in (shards(source / entry) if entry.endswith(".json") else ())}


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary sibling that takes `folder`'s place once it is complete and on disk."""
    temporary, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        follow_umask(temporary.rglob("*.safetensors"))
        flush_tree(temporary)
        if folder.exists():  # a folder that is not empty cannot be replaced by a rename
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        put_back(folder, temporary, old)
        raise UserError(f"cannot write {folder}: {error}. Nothing there was changed; put this right (is the disk "
                        "full?) and resume the run.") from error
    except BaseException:
        put_back(folder, temporary, old)
        raise


def put_back(folder: Path, temporary: Path, old: Path) -> None:
    """The name of the folder that `replacing` moves aside."""
    if old.exists() and not folder.exists():
        os.replace(old, folder)
    shutil.rmtree(temporary, ignore_errors=True)
