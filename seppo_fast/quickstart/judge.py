"""The judge: samples drawn by plain diffusers, scored by a classifier and a distance that saw only held-out digits."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from sklearn.svm import SVC
from torch import Tensor

from seppo_fast.quickstart.digits import CAPTIONS, RESOLUTION, Digits, degrade
from seppo_fast.seeds import generator, normal


@dataclass(frozen=True)
class Scores:
    """Shares of the samples that are read as the prompt's digit, and that are as close to a real digit as real digits are."""

    prompt_accuracy: float
    cleanliness: float
    samples: int


class Judge:
    """A support vector machine for the digit and a nearest-neighbour distance for the quality, on 8x8 grey pictures."""

    def __init__(self, held_out: Digits, others: Digits, seed: int = 0):
        """Learn from `held_out`; `others` calibrate the distance and give the judge's own `accuracy`."""
        # It also learns bad scans of the same digits: a bad scan of the right digit costs cleanliness, not accuracy.
        bad = degrade(held_out.pixels, generator(seed, "judge"))
        self.real = grey(held_out.pixels)
        self.classifier = SVC(C=10.0, gamma=0.05).fit(
            np.concatenate([self.real, grey(bad)]), np.tile(held_out.labels.numpy(), 2)
        )
        self.accuracy = float((self.read(others.pixels) == others.labels.numpy()).mean())
        self.threshold = float(np.quantile(self.distance(others.pixels), 0.95))

    def read(self, pixels: Tensor) -> np.ndarray:
        """The digit that it reads in each picture `(N, 3, 16, 16)` in [0, 1], `(N,)`."""
        return self.classifier.predict(grey(pixels))

    def distance(self, pixels: Tensor) -> np.ndarray:
        """Euclidean distance of each picture to the nearest held-out digit, `(N,)`."""
        return torch.cdist(torch.tensor(grey(pixels)), torch.tensor(self.real)).min(dim=1).values.numpy()

    def score(self, pixels: Tensor, labels: Sequence[int]) -> Scores:
        """Judge samples `(N, 3, 16, 16)` of the prompts `CAPTIONS[labels]`."""
        right = self.read(pixels) == np.asarray(labels)
        clean = self.distance(pixels) <= self.threshold
        return Scores(float(right.mean()), float(clean.mean()), len(labels))


def draw(
    folder: Path, labels: Sequence[int], seed: int, steps: int, guidance_scale: float, batch_size: int = 100,
    weights: Path | None = None,
) -> Tensor:
    """Samples `(N, 3, 16, 16)` in [0, 1] of a pipeline directory; the noise of sample i depends on (seed, i) alone.

    `weights`: a past policy's file, whose weights the UNet or the transformer gets.
    """
    pipeline = DiffusionPipeline.from_pretrained(folder)
    parts = pipeline.components
    if weights:
        denoiser = parts["unet" if "unet" in parts else "transformer"]
        denoiser.load_state_dict(dict(denoiser.named_buffers()) | load_file(weights))  # a policy's file has parameters alone
    # Without this, Stable Diffusion 3 gives T5 more tokens than its tokenizer's limit, and more than the model has learnt with.
    more = {"max_sequence_length": pipeline.tokenizer_3.model_max_length} if "tokenizer_3" in parts else {}
    pipeline.set_progress_bar_config(disable=True)
    latent_size = RESOLUTION // pipeline.vae_scale_factor
    shape = (pipeline.vae.config.latent_channels, latent_size, latent_size)
    pictures = []
    for start in range(0, len(labels), batch_size):
        rows = range(start, min(start + batch_size, len(labels)))
        pictures.append(pipeline(
            [CAPTIONS[labels[row]] for row in rows], height=RESOLUTION, width=RESOLUTION,
            latents=normal(shape, seed, "judge", rows), num_inference_steps=steps, guidance_scale=guidance_scale,
            output_type="np", **more,
        ).images)
    return torch.from_numpy(np.concatenate(pictures)).permute(0, 3, 1, 2)


def grey(pixels: Tensor) -> np.ndarray:
    """`(N, 3, 16, 16)` to `(N, 64)`: grey, in the resolution of the scans."""
    return F.avg_pool2d(pixels.float().mean(dim=1, keepdim=True), 2).flatten(1).numpy()
