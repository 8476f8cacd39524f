"""The judge: how degraded samples are, whether they show the prompt's digit, how near real digits they are, how they differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from sklearn.decomposition import PCA
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.neural_network import MLPRegressor
from sklearn.svm import SVC
from torch import Tensor

from seppo_fast.evaluation.scores.vendi import vendi
from seppo_fast.quickstart.digits import CAPTIONS, Digits
from seppo_fast.quickstart.improvement.pairs import degrade_to
from seppo_fast.quickstart.judge import grey
from seppo_fast.seeds import generator, normal

COPIES = 5  # of each held-out digit, each at a level of its own
FEATURES = 12  # principal components of the held-out digits


@dataclass(frozen=True)
class Scores:
    """Means over the samples: level of degradation, share that is read as the prompt's digit, distance to the nearest real
    digit; and Vendi within a prompt, the mean over the prompts."""

    level: float
    prompt_accuracy: float
    distance: float
    vendi: float
    samples: int


class Judge:
    """Reads level and digit of a picture and restores it, all learnt from held-out digits that were degraded to known levels."""

    def __init__(self, held_out: Digits, seed: int = 0) -> None:
        random = generator(seed, "improvement judge")
        pixels, labels = held_out.pixels.repeat(COPIES, 1, 1, 1), held_out.labels.repeat(COPIES).numpy()
        levels = torch.rand(len(pixels), generator=random)
        bad = grey(degrade_to(pixels, levels, random))
        self.real = grey(held_out.pixels)
        self.features = PCA(FEATURES, random_state=0).fit(self.real)
        # Levels show in how the pixels are distributed, wherever they are: order makes the regressor blind to the digit.
        self.levels = HistGradientBoostingRegressor(random_state=0).fit(np.sort(bad, axis=1), levels.numpy())
        self.classifier = SVC(C=10.0, gamma=0.05).fit(np.concatenate([self.real, bad]),
                                                     np.concatenate([held_out.labels.numpy(), labels]))
        self.restorer = MLPRegressor(hidden_layer_sizes=(128,), learning_rate_init=3e-3, early_stopping=True, tol=1e-3,
                                     random_state=0).fit(bad, grey(pixels))

    def level(self, pixels: Tensor) -> np.ndarray:
        """The level of degradation that is read in each picture `(N, 3, 16, 16)` in [0, 1], `(N,)`."""
        return self.levels.predict(np.sort(grey(pixels), axis=1))

    def distance(self, pixels: Tensor) -> np.ndarray:
        """Euclidean distance of each picture to the nearest held-out digit, `(N,)`."""
        return torch.cdist(torch.tensor(grey(pixels)), torch.tensor(self.real)).min(dim=1).values.numpy()

    def diversity(self, pixels: Tensor, labels: Sequence[int]) -> float:
        """Vendi within a prompt, of restored pictures in a few components: grain alone hardly makes a picture another."""
        found = torch.tensor(self.features.transform(self.restorer.predict(grey(pixels))))
        of = torch.tensor(labels)
        return float(np.mean([vendi(found[of == label]) for label in sorted(set(labels))]))

    def score(self, pixels: Tensor, labels: Sequence[int]) -> Scores:
        """Judge samples `(N, 3, 16, 16)` of the prompts `CAPTIONS[labels]`."""
        right = self.classifier.predict(grey(pixels)) == np.asarray(labels)
        return Scores(float(self.level(pixels).mean()), float(right.mean()), float(self.distance(pixels).mean()),
                      self.diversity(pixels, labels), len(labels))


def improve(folder: Path, pictures: Tensor, labels: Sequence[int], seed: int, steps: int, guidance_scale: float,
            image_guidance_scale: float, batch_size: int = 100) -> Tensor:
    """Pictures `(N, 3, 16, 16)` in [0, 1] as an InstructPix2Pix directory makes them of `pictures` under their own prompts."""
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    side = pictures.shape[-1] // pipeline.vae_scale_factor
    shape = (pipeline.vae.config.latent_channels, side, side)
    made = []
    for start in range(0, len(labels), batch_size):
        rows = range(start, min(start + batch_size, len(labels)))
        made.append(pipeline(
            [CAPTIONS[labels[row]] for row in rows], image=pictures[start : rows.stop], num_inference_steps=steps,
            latents=normal(shape, seed, "improvement judge", rows), guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale, output_type="pt",
        ).images)
    return torch.cat(made)
