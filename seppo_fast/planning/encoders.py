"""The memory of what makes latents and embeddings and is not trained: the VAE and the text encoders, in fp32 if not quantized."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from seppo_fast.config import Data, Seppo
from seppo_fast.data.fingerprint import latent_shape
from seppo_fast.models import Model
from seppo_fast.models.common import empty_text_encoder
from seppo_fast.planning.network_memory import inference
from seppo_fast.planning.quantized import as_quantized
from seppo_fast.sections import Quantized
from seppo_fast.training.samples import PROMPTS as GRID_PROMPTS


@dataclass(frozen=True)
class EncoderBytes:
    """Bytes of the weights, and of what is allocated beside them at the peak of each work."""

    vae: int
    encoding: int  # of a batch of images, or of a clip
    decoding: int  # of one sample: grids and evaluations decode one by one
    text: int
    embedding: int  # of one prompt
    looking: int  # of the prompts of a grid, or of an evaluation's batch, at once; of one where there is neither

    @property
    def before_training(self) -> int:
        """The most that is allocated until the latents are cached, and the prompts embedded or those of grids and evaluations."""
        return max(self.vae + self.encoding, self.text + self.looking)


def encoder_bytes(model: Model, settings: Seppo) -> EncoderBytes:
    """The bytes for a run's resolution, frames, batches and prompts."""
    grid = settings.samples.per_prompt * (len(settings.samples.prompts) or GRID_PROMPTS) if settings.samples.every else 0
    batch = settings.evaluation.batch_size if settings.evaluation.draws else 0
    vae, decoding = vae_bytes(model, latent_shape(model, settings.data))
    kind = settings.model.quantize_text
    text, embedding = text_bytes(model, 1, kind)
    looking = text_bytes(model, max(grid, batch), kind)[1] if max(grid, batch) > 1 else embedding
    return EncoderBytes(vae, encoding_bytes(model, settings.data), decoding, text, embedding, looking)


def vae_bytes(model: Model, shape: Sequence[int]) -> tuple[int, int]:
    """Of the VAE, and of decoding one sample with latents of `shape`."""
    with torch.device("meta"):
        vae, latents = model.empty_vae(), torch.empty(1, *shape)
    return weight_bytes(vae), inference(lambda: model.decode(vae, latents)).peak


def encoding_bytes(model: Model, data: Data) -> int:
    """Of encoding a batch of images, or a clip, whose pixels are on the device, too."""
    size = (1, data.video.frames) if model.video else (data.encode_batch_size,)
    with torch.device("meta"):
        vae, pixels = model.empty_vae(), torch.empty(*size, 3, data.resolution, data.resolution)
    return pixels.nbytes + inference(lambda: model.encode(vae, pixels, data.encode_batch_size)).peak


def text_bytes(model: Model, prompts: int, kind: Quantized | None = None) -> tuple[int, int]:
    """Of all text encoders, and of embedding so many prompts of full length at once, by one encoder after the other.

    `kind` is how their weights are quantized.
    """
    weights = peak = 0
    for part in model.text_encoders:
        with torch.device("meta"):
            encoder = empty_text_encoder(model.directory, part).eval()
        weights += weight_bytes(encoder) - (as_quantized(encoder, kind) if kind else 0)
        peak = max(peak, embedding_bytes(encoder, prompts, model.prompt_tokens[part]))
    return weights, peak


def embedding_bytes(encoder: nn.Module, prompts: int, tokens: int) -> int:
    """Of a text encoder at work, a language model without its head. Pipelines ask for all layers' outputs, or do without: this is
    the larger."""
    ids = torch.zeros(prompts, tokens, dtype=torch.long, device="meta")
    body = encoder.model if hasattr(encoder, "lm_head") else encoder
    return inference(lambda: body(input_ids=ids, output_hidden_states=True)).peak


def weight_bytes(network: nn.Module) -> int:
    """Of a network's weights and tables."""
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
