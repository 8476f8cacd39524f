"""Parts of both quickstarts' base models: a tiny text encoder, a training loop, a folder that is made once."""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, AutoencoderKLWan, DiffusionPipeline
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

RECORD = "made_of.json"


def make_once(folder: Path, recipe: Any, code: Iterable[str], train: Callable[[Any], DiffusionPipeline]) -> bool:
    """Save the pipeline that `train(recipe)` returns, unless `folder` holds it already; True when it was made.

    `recipe` is a dataclass; `code` are the files of this package that decide the result.
    """
    record = json.dumps(_made_of(recipe, code), indent=2) + "\n"
    if (folder / RECORD).is_file() and (folder / RECORD).read_text() == record:
        return False
    pipeline = train(recipe)
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    pipeline.save_pretrained(unfinished, safe_serialization=True)
    (unfinished / RECORD).write_text(record)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return True


def _made_of(recipe: Any, code: Iterable[str]) -> dict[str, object]:
    """The recipe, hashes of the code and versions of the libraries: together they decide the base's bytes."""
    here = Path(__file__).parent
    return {
        "recipe": asdict(recipe),
        "code": {name: hashlib.sha256((here / name).read_bytes()).hexdigest() for name in code},
        "versions": {module.__name__: module.__version__ for module in (torch, diffusers, transformers)},
    }


Text = TypeVar("Text", CLIPTextModel, CLIPTextModelWithProjection)


def new_text_encoder(tokenizer: CLIPTokenizer, kind: type[Text] = CLIPTextModel) -> Text:
    """A CLIP text model of two layers and width 32, for the tokenizer's number of tokens."""
    return kind(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        projection_dim=32, max_position_embeddings=tokenizer.model_max_length, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))


def token_ids(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Token ids `(len(captions), tokens)`, as many as the tokenizer gives at most."""
    return tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt").input_ids


def vae_loss(vae: AutoencoderKL | AutoencoderKLWan, pixels: Tensor, random: torch.Generator, kl_weight: float) -> Tensor:
    """Reconstruction and a weak pull to the normal distribution, as in latent diffusion; pixels in [-1, 1]."""
    posterior = vae.encode(pixels).latent_dist
    restored = vae.decode(posterior.sample(random)).sample
    return F.mse_loss(restored, pixels) + kl_weight * posterior.kl().mean() / posterior.mean[0].numel()


def fit(weights: list[torch.nn.Parameter], loss: Callable[[], Tensor], steps: int, lr: float, name: str) -> None:
    """Train with AdamW; after a short warm-up the rate falls to zero along a cosine."""
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.1)
    progress = tqdm(range(steps), desc=name, file=sys.stdout, mininterval=2)
    for step in progress:
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{value.item():.4f}")
