"""The scores of generated clips against real ones (Table 3): LPIPS, SSIM and PSNR of pairs, FID and FVD of all clips.

A pair is a generated clip and the real clip of the same prompt, frame by frame. Clips go through the networks one at a time, so
that neither a clip's value nor the memory depends on the batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from seppo_fast.evaluation.video import i3d, inception, lpips

PairScorer = Callable[[Tensor, Tensor], Tensor]  # generated, real (N, F, 3, H, W) in [0, 1] -> (N,) fp32 on the CPU
Features = Callable[[Tensor], Tensor]  # clips (N, F, 3, H, W) in [0, 1] -> features (M, D) fp32 on the CPU


@dataclass(frozen=True)
class VideoScore:
    """A score of clips: its names, where its weights are published, and how they are loaded.

    With kind "sample", each pair has a value. With kind "set", all clips together have one: `frechet(generated, real)` of the
    `Moments` of their features, which are added over batches and ranks.
    """

    name: str  # what --scores says, and the column of scores.csv
    label: str  # the table's heading
    wants: Mapping[str, str]  # part -> the URL of its file, to be given by --weights
    load: Callable[[Mapping[str, Path], torch.device], PairScorer | Features]  # UserError names a file that does not fit
    kind: Literal["sample", "set"]
    better: str
    packages: tuple[str, ...] = ("av",)  # which decodes the real clips


def load_lpips(parts: Mapping[str, Path], device: torch.device) -> PairScorer:
    """LPIPS, the mean over frames."""
    network, linear = lpips.load(parts["model"], device)
    return each_pair(lambda generated, real: lpips.distance(network, linear, generated, real), device)


def load_ssim(parts: Mapping[str, Path], device: torch.device) -> PairScorer:
    """SSIM, the mean over frames; Gaussian windows of 11 pixels (Wang et al., 2004), each colour alone, mirrored borders."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    return each_pair(lambda generated, real: structural_similarity_index_measure(
        generated, real, data_range=1.0, reduction="none"), device)


def load_psnr(parts: Mapping[str, Path], device: torch.device) -> PairScorer:
    """PSNR in dB, the mean over frames; infinite where two frames are equal."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return each_pair(lambda generated, real: peak_signal_noise_ratio(
        generated, real, data_range=1.0, reduction="none", dim=(1, 2, 3)), device)


def load_fid(parts: Mapping[str, Path], device: torch.device) -> Features:
    """Features (N * F, 2048): one for each frame."""
    network = inception.load(parts["model"], device)
    return each_clip(lambda frames: network(inception.prepared(frames)), inception.FEATURES, device)


def load_fvd(parts: Mapping[str, Path], device: torch.device) -> Features:
    """Features (N, 400): one for each clip."""
    network = i3d.load(parts["model"], device)
    return each_clip(lambda frames: network(i3d.prepared(frames)), i3d.FEATURES, device)


def each_pair(values: PairScorer, device: torch.device) -> PairScorer:
    """A scorer of many pairs of clips: the mean over frames of `values`, a function of two clips' frames (F, 3, H, W) -> (F,)."""

    @torch.no_grad()
    def score(generated: Tensor, real: Tensor) -> Tensor:
        if generated.shape != real.shape:
            raise ValueError(f"clips to be compared have one shape, and these are {tuple(generated.shape)} and {tuple(real.shape)}")
        pairs = zip(generated, real, strict=True)
        means = [values(one.to(device).float(), other.to(device).float()).mean().cpu() for one, other in pairs]
        return torch.stack(means) if means else torch.empty(0)

    return score


def each_clip(features: Features, size: int, device: torch.device) -> Features:
    """The features of many clips, from `features`, a function of one clip's frames (F, 3, H, W) -> (M, D)."""

    @torch.no_grad()
    def score(clips: Tensor) -> Tensor:
        return torch.cat([torch.empty(0, size), *(features(frames.to(device).float()).cpu() for frames in clips)])

    return score


FID = VideoScore("fid", "FID", {"model": inception.SOURCE}, load_fid, "set", "lower")
LPIPS = VideoScore("lpips", "LPIPS", {"model": lpips.SOURCE}, load_lpips, "sample", "lower", ("av", "torchmetrics"))
SSIM = VideoScore("ssim", "SSIM", {}, load_ssim, "sample", "higher", ("av", "torchmetrics"))
PSNR = VideoScore("psnr", "PSNR", {}, load_psnr, "sample", "higher", ("av", "torchmetrics"))
FVD = VideoScore("fvd", "FVD", {"model": i3d.SOURCE}, load_fvd, "set", "lower")

VIDEO_SCORES = (FID, LPIPS, SSIM, PSNR, FVD)  # in the order of Table 3
