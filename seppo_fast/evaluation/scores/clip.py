"""CLIP (Radford et al. 2021) by transformers: loading from either library's files, pixels, embeddings, cosines."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from seppo_fast.errors import UserError
from seppo_fast.evaluation.weights import check_fit, read_tensors
from seppo_fast.models.common import without_bars
from seppo_fast.models.files import find_weights, read_json
from seppo_fast.models.values import check_values

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
HEADS = 16  # of both towers of ViT-H-14 (1280 / 80 and 1024 / 64): the only size that tensors' shapes do not tell
# beginnings of open_clip's names -> beginnings of transformers' names
NAMES = (
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.conv1.", "vision_model.embeddings.patch_embedding."), ("visual.ln_pre.", "vision_model.pre_layrnorm."),
    ("visual.ln_post.", "vision_model.post_layernorm."), ("visual.proj", "visual_projection.weight"),
    ("transformer.resblocks.", "text_model.encoder.layers."), ("token_embedding.", "text_model.embeddings.token_embedding."),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"), ("ln_final.", "text_model.final_layer_norm."),
    ("text_projection", "text_projection.weight"),
)
BLOCK_NAMES = ((".ln_1.", ".layer_norm1."), (".ln_2.", ".layer_norm2."), (".mlp.c_fc.", ".mlp.fc1."), (".mlp.c_proj.", ".mlp.fc2."),
               (".attn.out_proj.", ".self_attn.out_proj."))


def load_clip(folder: Path, device: torch.device) -> CLIPModel:
    """The CLIP of a transformers folder (config.json, model.safetensors), fp32."""
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind != "clip":
        raise UserError(f"{folder / 'config.json'} describes a model of type {kind!r}; this score wants a CLIP.")
    for part, declared in (("text_config", CLIPTextConfig), ("vision_config", CLIPVisionConfig)):
        if isinstance(config.get(part), dict):
            check_values(folder / "config.json", config[part], declared)
    weights = find_weights(folder, "transformers", None)
    with _explained(folder / weights.entry):
        model, info = CLIPModel.from_pretrained(folder, use_safetensors=weights.safetensors, local_files_only=True,
                                                dtype=torch.float32, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if missing:  # transformers only warns, and leaves these at random
        raise UserError(f"{folder / weights.entry} lacks {len(missing)} weights that its config.json calls for, "
                        f"e.g. {', '.join(missing[:3])}: fetch the model again.")
    return model.to(device).eval().requires_grad_(False)


def load_open_clip(file: Path, device: torch.device) -> CLIPModel:
    """The ViT-H-14 of an open_clip checkpoint ("state_dict"), fp32, its sizes read from the tensors' shapes."""
    state = read_tensors(file).get("state_dict")
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f'{file} is no open_clip checkpoint: it has no "state_dict" of tensors. Give the file that was published.')
    try:
        config, renamed = open_clip_config(state), from_open_clip(state)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"{file} is no open_clip checkpoint of a vision transformer: it lacks {error}.") from error
    with torch.device("meta"):
        check_fit(file, CLIPModel(config).state_dict(), renamed, "open_clip's ViT-H-14")
    with _explained(file):
        model = CLIPModel.from_pretrained(None, config=config, state_dict=renamed, dtype=torch.float32)
    return model.to(device).eval().requires_grad_(False)


def open_clip_config(state: Mapping[str, Tensor]) -> CLIPConfig:
    """transformers' configuration of a ViT by open_clip: LayerNorm's eps is 1e-5 and GELU is exact in both."""
    def tower(prefix: str) -> dict[str, Any]:
        width = state[f"{prefix}resblocks.0.ln_1.weight"].shape[0]
        if width % HEADS:
            raise ValueError(f"a width of {HEADS} heads (it is {width})")
        return {
            "hidden_size": width, "hidden_act": "gelu", "num_attention_heads": HEADS,
            "intermediate_size": state[f"{prefix}resblocks.0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": sum(name.startswith(prefix) and name.endswith(".ln_1.weight") for name in state),
        }

    patch = state["visual.conv1.weight"].shape[-1]
    side = math.isqrt(state["visual.positional_embedding"].shape[0] - 1)
    words, length = state["token_embedding.weight"].shape[0], state["positional_embedding"].shape[0]
    return CLIPConfig(
        vision_config=tower("visual.transformer.") | {"patch_size": patch, "image_size": patch * side},
        text_config=tower("transformer.") | {"vocab_size": words, "max_position_embeddings": length,
                                             "bos_token_id": words - 2, "eos_token_id": words - 1},
        projection_dim=state["text_projection"].shape[1],
    )


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An open_clip state with the names of transformers' CLIPModel: projections transposed; q, k and v separate."""
    renamed = {}
    for name, tensor in state.items():
        new = next((new + name.removeprefix(old) for old, new in NAMES if name.startswith(old)), name)
        for old, block in BLOCK_NAMES:
            new = new.replace(old, block)
        if name in ("visual.proj", "text_projection"):
            renamed[new] = tensor.T.contiguous()
        elif ".attn.in_proj_" in new:
            kind = new.rsplit("_", 1)[1]
            for part, chunk in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{new.split('.attn.')[0]}.self_attn.{part}_proj.{kind}"] = chunk.contiguous()
        else:
            renamed[new] = tensor
    return renamed


def load_tokenizer(folder: Path, model: CLIPModel) -> CLIPTokenizer:
    """CLIP's tokenizer, checked to have the model's vocabulary (an empty folder would give a tokenizer of two tokens)."""
    with _explained(folder):
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    words = model.config.text_config.vocab_size
    if len(tokenizer) != words:
        raise UserError(f"{folder} has no tokenizer that fits: its vocabulary has {len(tokenizer)} tokens and the model's {words}. "
                        "Give the tokenizer published with the model (tokenizer.json, or vocab.json and merges.txt).")
    return tokenizer


@torch.inference_mode()
def image_features(model: CLIPModel, pixels: Tensor) -> Tensor:
    """Normalised pixels (N, 3, S, S) -> embeddings (N, D) of length 1, fp32 on the model's device."""
    features = model.get_image_features(pixels.to(model.device)).pooler_output
    return features / features.norm(dim=-1, keepdim=True)


@torch.inference_mode()
def text_features(model: CLIPModel, tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Texts, cut at the model's context with the end token kept, -> embeddings (N, D) of length 1, fp32 on the model's device."""
    ids = tokenizer(list(texts), padding=True, truncation=True, max_length=model.config.text_config.max_position_embeddings,
                    return_tensors="pt").input_ids.to(model.device)
    # No mask: the attention is causal, and padding comes after the end token. The end token is found here, because the
    # configurations of old CLIPs name a wrong one (2), for which transformers takes the largest id instead.
    end = (ids == tokenizer.eos_token_id).int().argmax(dim=-1)
    hidden = model.text_model(input_ids=ids).last_hidden_state
    features = model.text_projection(hidden[torch.arange(len(ids), device=ids.device), end])
    return features / features.norm(dim=-1, keepdim=True)


def cosines(model: CLIPModel, tokenizer: CLIPTokenizer, pixels: Tensor, texts: Sequence[str]) -> Tensor:
    """Cosine of each image with its text, (N,) fp32 on the model's device."""
    return (image_features(model, pixels) * text_features(model, tokenizer, texts)).sum(dim=-1)


def image_size(model: CLIPModel) -> int:
    return model.config.vision_config.image_size


def center_pixels(images: Sequence[Image.Image], size: int, half: Callable[[int], int] = lambda margin: margin // 2) -> Tensor:
    """Short side to `size` (PIL's bicubic), center crop: (N, 3, S, S), normalised, as transformers' CLIPImageProcessor.

    Libraries differ in the `half` of an odd margin: torchvision's CenterCrop, and so OpenAI's `clip`, takes `round(margin / 2)`.
    """
    cropped = []
    for image in images:
        short = min(image.size)
        width, height = (int(size * side / short) for side in image.size)
        left, top = half(width - size), half(height - size)
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        cropped.append(_levels(resized.crop((left, top, left + size, top + size))))
    return (torch.stack(cropped) - MEAN) / STD


def padded_pixels(images: Sequence[Image.Image], size: int) -> Tensor:
    """Long side to `size` with a black border: (N, 3, S, S), normalised, as hpsv2's `ResizeMaxSize` after `ToTensor`.

    Bicubic with antialiasing, as torchvision does for tensors since 0.17; not clamped to [0, 1].
    """
    padded = []
    for image in images:
        scale = size / max(image.size)
        height, width = round(image.height * scale), round(image.width * scale)
        levels = _levels(image.convert("RGB"))[None]
        resized = F.interpolate(levels, (height, width), mode="bicubic", antialias=True, align_corners=False)[0]
        left, top = (size - width) // 2, (size - height) // 2
        padded.append(F.pad(resized, (left, size - width - left, top, size - height - top)))
    return (torch.stack(padded) - MEAN) / STD


def _levels(image: Image.Image) -> Tensor:
    """RGB -> (3, H, W) fp32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32).div(255)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn errors that transformers raises while it loads into a UserError that names the path; no progress bars."""
    try:
        with without_bars():
            yield
    except MemoryError:
        raise
    except Exception as error:  # libraries may raise anything about a damaged file
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"cannot load {path} ({type(error).__name__}: {reason or 'no message'}).") from error
