"""BLIP (Li et al. 2022) by transformers: an image encoder, and a text encoder that looks at the image; from the public files."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from seppo_fast.errors import UserError

HEAD = 64  # channels of an attention head in both encoders of every published BLIP; tensors' shapes do not tell it
# parts of transformers' names in the image encoder -> parts of the public files' (timm's) names; the text encoder's are the same
NAMES = (
    ("embeddings.class_embedding", "cls_token"), ("embeddings.position_embedding", "pos_embed"),
    ("embeddings.patch_embedding.", "patch_embed.proj."), ("post_layernorm.", "norm."), ("encoder.layers.", "blocks."),
    (".layer_norm1.", ".norm1."), (".layer_norm2.", ".norm2."), (".self_attn.qkv.", ".attn.qkv."),
    (".self_attn.projection.", ".attn.proj."),
)
UNUSED = ("vision_proj.", "text_proj.", "text_encoder.embeddings.position_ids")  # pre-training's projections; 0, 1, 2, ...


class Blip(nn.Module):
    """MED in its image-grounded mode: every layer of the text encoder attends to the text and then to the image."""

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig):
        super().__init__()
        self.visual_encoder = BlipVisionModel(vision)
        self.text_encoder = BlipTextModel(text, add_pooling_layer=False)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Normalised pixels (N, 3, S, S), tokens (N, T), their mask (N, T), 0 for padding -> the tokens' states (N, T, D)."""
        image = self.visual_encoder(pixels).last_hidden_state  # class token and patches, after the last LayerNorm
        return self.text_encoder(input_ids=ids, attention_mask=mask, encoder_hidden_states=image).last_hidden_state


def blip_configs(file: Path, state: Mapping[str, Any], prefix: str) -> tuple[BlipVisionConfig, BlipTextConfig]:
    """transformers' configurations for the BLIP in `file` whose names begin with `prefix`, with the sizes of its tensors."""
    vision, text = f"{prefix}visual_encoder.", f"{prefix}text_encoder."

    def size(name: str, axis: int) -> int:
        tensor = state.get(name)
        if not isinstance(tensor, Tensor) or tensor.ndim <= axis:
            raise UserError(f"{file} does not hold the weights of a BLIP: it has no usable {name}. "
                            "It is another model's file, or not the one published.")
        return tensor.shape[axis]

    def sizes(layers: str, up: str) -> dict[str, int]:
        hidden, width = (size(f"{layers}.0.{up}.weight", axis) for axis in (0, 1))
        if width == 0 or width % HEAD:
            raise UserError(f"{file} does not hold the weights of a published BLIP: the width of {layers}, {width}, is no multiple"
                            f" of {HEAD}. Give the file that was published.")
        return {"hidden_size": width, "intermediate_size": hidden, "num_attention_heads": width // HEAD,
                "num_hidden_layers": sum(name.startswith(layers) and name.endswith(f".{up}.weight") for name in state)}

    image, words = sizes(f"{vision}blocks", "mlp.fc1"), sizes(f"{text}encoder.layer", "intermediate.dense")
    patch, side = size(f"{vision}patch_embed.proj.weight", 3), math.isqrt(max(0, size(f"{vision}pos_embed", 1) - 1))
    return (
        BlipVisionConfig(**image, patch_size=patch, image_size=patch * side, layer_norm_eps=1e-6, hidden_act="gelu"),
        BlipTextConfig(**words, vocab_size=size(f"{text}embeddings.word_embeddings.weight", 0), layer_norm_eps=1e-12,
                       max_position_embeddings=size(f"{text}embeddings.position_embeddings.weight", 0),
                       encoder_hidden_size=image["hidden_size"], hidden_act="gelu"),
    )


def public_name(name: str) -> str:
    """The public files' name of a weight of `Blip`."""
    before, encoder, rest = name.partition("visual_encoder.")
    if not encoder:
        return name
    for ours, public in NAMES:
        rest = rest.replace(ours, public)
    return before + encoder + rest
