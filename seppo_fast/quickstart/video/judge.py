"""The judge: plain diffusers draws samples; their movement is measured, and their likeness to clips of held-out digits."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AnimateDiffPipeline, DiffusionPipeline, WanPipeline
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance

from seppo_fast.quickstart.digits import Digits
from seppo_fast.quickstart.video.clips import CAPTIONS, DIRECTIONS, FRAMES, RESOLUTION, STEPS, TRAVEL, Clips, clips_of, random_clips
from seppo_fast.seeds import generator, normal

FEATURES = 64
HELD_OUT = 200  # digits, each in four directions: about twenty clips a caption
STILL = TRAVEL / 4  # pixels in a clip; a digit that travels less does not move


@dataclass(frozen=True)
class Scores:
    """Scores of a set of clips. Accuracy and `moving` are shares; SSIM and PSNR (dB) are means over the clips."""

    direction_accuracy: float
    moving: float
    frechet_distance: float
    ssim: float
    psnr: float
    samples: int


class Judge:
    """Scores by the centroid's direction, and by Frechet distance, SSIM and PSNR to clips of digits that no model saw.

    `accuracy` is the direction accuracy on those held-out clips. `real` are the scores of clean clips of the models' own digits,
    which a perfect model would reach.
    """

    def __init__(self, held_out: Digits, others: Digits, samples: int, seed: int = 0, frames: int = FRAMES):
        """`samples`: the number of clips in `real`. It should be the number judged: the Frechet distance depends on it."""
        random = generator(seed, "video judge")
        self.held_out = every_direction(Digits(held_out.pixels[:HELD_OUT], held_out.labels[:HELD_OUT]), frames)
        self.features = Features(seed, frames)
        self.accuracy = float((direction(self.held_out.pixels) == self.held_out.labels % len(DIRECTIONS)).float().mean())
        real = random_clips(others, samples, random, frames)
        self.real = self.score(real.pixels, real.labels.tolist())

    def score(self, pixels: Tensor, labels: Sequence[int]) -> Scores:
        """Judge clips `(N, F, 1, 32, 32)` in [0, 1] of the prompts `CAPTIONS[labels]`."""
        asked = torch.tensor(labels)
        found = direction(pixels)
        ssim, psnr = likeness(pixels, self.nearest(pixels, asked))
        return Scores(
            direction_accuracy=float((found == asked % len(DIRECTIONS)).float().mean()),
            moving=float((found >= 0).float().mean()), frechet_distance=self.distance(pixels), ssim=ssim, psnr=psnr,
            samples=len(labels),
        )

    def distance(self, pixels: Tensor) -> float:
        """Frechet distance of the features of clips `(N, F, 1, 32, 32)` to those of the held-out clips."""
        metric = FrechetInceptionDistance(self.features, input_img_size=tuple(pixels.shape[1:]))
        metric.update(self.held_out.pixels, real=True)
        metric.update(pixels, real=False)
        return float(metric.compute())

    def nearest(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """For each clip, the nearest held-out clip of its caption by squared error, in the same shape."""
        pairs = torch.empty_like(pixels)
        for label in labels.unique():
            candidates = self.held_out.pixels[self.held_out.labels == label]
            mine = labels == label
            pairs[mine] = candidates[torch.cdist(pixels[mine].flatten(1), candidates.flatten(1)).argmin(dim=1)]
        return pairs


class Features(nn.Module):
    """Features of clips: their frames and the differences of successive frames, both 8x8, projected on 64 seeded directions."""

    def __init__(self, seed: int, frames: int):
        super().__init__()
        length = (2 * frames - 1) * 64
        directions = torch.randn(length, FEATURES, generator=generator(seed, "features"))
        self.register_buffer("directions", directions / FEATURES**0.5)

    def forward(self, pixels: Tensor) -> Tensor:
        """`(N, F, 1, 32, 32)` to `(N, 64)`."""
        frames = F.avg_pool2d(pixels[:, :, 0].float(), RESOLUTION // 8)
        return torch.cat([frames, frames.diff(dim=1)], dim=1).flatten(1) @ self.directions


def every_direction(digits: Digits, frames: int) -> Clips:
    """Clips of each digit once in each direction, along the middle of the canvas."""
    count = len(DIRECTIONS)
    directions = torch.arange(count).repeat_interleave(len(digits))
    middle = torch.full((len(directions),), TRAVEL // 2)
    return clips_of(Digits(digits.pixels.repeat(count, 1, 1, 1), digits.labels.repeat(count)), directions, middle, frames)


def travel(pixels: Tensor) -> Tensor:
    """How far the bright pixels travel, `(N, 2)`: x and y in pixels from first to last frame, a least-squares fit to centroids.

    A pixel counts if it is brighter than its frame's median by at least a quarter of the largest such difference in the clip.
    """
    frames = pixels[:, :, 0].float()
    ink = (frames - frames.flatten(2).median(dim=2).values[..., None, None]).clamp(min=0)
    ink = torch.where(ink >= ink.amax(dim=(1, 2, 3), keepdim=True) / 4, ink, 0)
    mass = ink.sum(dim=(2, 3)).clamp(min=1e-6)
    place = torch.arange(RESOLUTION) - (RESOLUTION - 1) / 2  # from the middle, which is the centroid of a frame without ink
    centroid = torch.stack([(ink.sum(dim=2) * place).sum(dim=2), (ink.sum(dim=3) * place).sum(dim=2)], dim=2) / mass[..., None]
    time = torch.arange(pixels.shape[1]) - (pixels.shape[1] - 1) / 2
    return (time[:, None] * centroid).sum(dim=1) / time.square().sum() * (pixels.shape[1] - 1)


def direction(pixels: Tensor) -> Tensor:
    """The index in DIRECTIONS of each clip's movement, `(N,)`; -1 where it travels less than STILL pixels."""
    along = travel(pixels) @ STEPS.T.float()
    best = along.max(dim=1)
    return torch.where(best.values >= STILL, best.indices, -1)


def likeness(pixels: Tensor, others: Tensor) -> tuple[float, float]:
    """SSIM (mean over frames) and PSNR in dB (of whole clips, their mean) of clips `(N, F, 1, 32, 32)` in [0, 1]."""
    ssim = structural_similarity_index_measure(pixels.flatten(0, 1), others.flatten(0, 1), data_range=1.0)
    psnr = peak_signal_noise_ratio(pixels, others, data_range=1.0, dim=(1, 2, 3, 4))
    return float(ssim), float(psnr)


def draw(
    base: Path, lora: Path | None, labels: Sequence[int], seed: int, steps: int, guidance_scale: float, frames: int = FRAMES,
    batch_size: int = 40,
) -> Tensor:
    """Samples `(N, F, 1, 32, 32)` in [0, 1], grey, of a pipeline directory and, where given, the LoRA weights in `lora`.

    The noise of sample i depends on (seed, i) alone.
    """
    pipeline = DiffusionPipeline.from_pretrained(base)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    pipeline.set_progress_bar_config(disable=True)
    shape, settings = call_of(pipeline, frames)
    clips = []
    for start in range(0, len(labels), batch_size):
        rows = range(start, min(start + batch_size, len(labels)))
        clips.append(pipeline(
            [CAPTIONS[labels[row]] for row in rows], num_frames=frames, height=RESOLUTION, width=RESOLUTION,
            latents=normal(shape, seed, "judge", rows), num_inference_steps=steps, guidance_scale=guidance_scale,
            output_type="np", **settings,
        ).frames)
    return torch.from_numpy(np.concatenate(clips)).mean(dim=-1)[:, :, None]


def call_of(pipeline: AnimateDiffPipeline | WanPipeline, frames: int) -> tuple[tuple[int, int, int, int], dict[str, int]]:
    """The shape of the latents of a clip of so many frames, and the settings that only this kind of pipeline has."""
    if isinstance(pipeline, AnimateDiffPipeline):
        side = RESOLUTION // pipeline.vae_scale_factor
        return (pipeline.unet.config.in_channels, frames, side, side), {"decode_chunk_size": 16 * frames}
    side = RESOLUTION // pipeline.vae_scale_factor_spatial
    shape = (pipeline.transformer.config.in_channels, (frames - 1) // pipeline.vae_scale_factor_temporal + 1, side, side)
    # Without this, it gives UMT5 512 tokens, and the model has learnt with fewer.
    return shape, {"max_sequence_length": pipeline.tokenizer.model_max_length}
