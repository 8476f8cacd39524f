"""ImageReward (Xu et al. 2023): a BLIP that reads the prompt while it looks at the image, and an MLP on its output."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig

from seppo_fast.errors import UserError
from seppo_fast.evaluation.scores.aesthetic import Layers
from seppo_fast.evaluation.scores.base import Score, Scorer
from seppo_fast.evaluation.scores.blip import UNUSED, Blip, blip_configs, public_name
from seppo_fast.evaluation.scores.clip import center_pixels
from seppo_fast.evaluation.weights import check_fit, read_tensors

TOKENIZER = "google-bert/bert-base-uncased"
TOKENS = 35  # of a prompt, with start and end; longer ones are cut
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the network's outputs on the authors' data
ADDED = {"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]}  # the last two rows of BLIP's embeddings


def load(parts: Mapping[str, Path], device: torch.device) -> Scorer:
    """The reward as `ImageReward.score` computes it, in fp32; on the authors' data it has mean 0 and standard deviation 1."""
    model = load_reward(parts["model"], device)
    vision, text = model.blip.visual_encoder.config, model.blip.text_encoder.config
    tokenizer = load_tokenizer(parts["tokenizer"], text.vocab_size)

    @torch.inference_mode()
    def score(images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        # halves are rounded as in torchvision's CenterCrop
        pixels = center_pixels(images, vision.image_size, half=lambda margin: round(margin / 2))
        words = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        return model(pixels.to(device), words.input_ids.to(device), words.attention_mask.to(device)).cpu()

    return score


class Reward(nn.Module):
    """The network of the public file, with the same names except those that `public_name` translates."""

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig):
        super().__init__()
        self.blip = Blip(vision, text)
        self.mlp = Layers(text.hidden_size)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Normalised pixels (N, 3, S, S), tokens (N, T) and their mask (N, T) -> rewards (N,)."""
        first = self.blip(pixels, ids, mask)[:, 0]
        return (self.mlp(first).squeeze(-1) - MEAN) / STD


def load_reward(file: Path, device: torch.device) -> Reward:
    """The network of `ImageReward.pt`, fp32."""
    unused = tuple(f"blip.{name}" for name in UNUSED)
    state = {name: value for name, value in read_tensors(file).items() if not str(name).startswith(unused)}
    configs = blip_configs(file, state, "blip.")
    with torch.device("meta"):
        model = Reward(*configs)
    wanted = model.state_dict()
    check_fit(file, {public_name(name): tensor for name, tensor in wanted.items()}, state, "ImageReward")
    model.load_state_dict({name: state[public_name(name)] for name in wanted}, assign=True)
    embeddings = model.blip.text_encoder.embeddings
    embeddings.position_ids = torch.arange(configs[1].max_position_embeddings)[None]  # not a weight, so still on the meta device
    return model.to(device, torch.float32).eval().requires_grad_(False)


def load_tokenizer(folder: Path, words: int) -> BertTokenizer:
    """bert-base-uncased's tokenizer with BLIP's two tokens, checked to have the model's vocabulary (an empty folder gives 5)."""
    try:
        tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers and its parsers may raise anything; the folder's files are the only input
        raise UserError(f"cannot load the tokenizer in {folder}: {(str(error).strip() or 'no message').splitlines()[0]}") from error
    tokenizer.add_special_tokens(ADDED)
    if len(tokenizer) != words:
        raise UserError(f"{folder} has no tokenizer that fits: its vocabulary has {len(tokenizer)} tokens (with BLIP's own two) and"
                        f" the model's {words}. Give the one published as {TOKENIZER} (tokenizer.json or vocab.txt).")
    return tokenizer


IMAGEREWARD = Score("imagereward", "ImageReward", {"model": "THUDM/ImageReward/ImageReward.pt", "tokenizer": TOKENIZER}, load)
