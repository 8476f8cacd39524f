"""The Inception v3 of FID (Szegedy et al., 2015; Heusel et al., 2017) to its last pooling, with the names of its PyTorch file.

The file is the TensorFlow network of 2015-12-05, as converted by github.com/mseitzer/pytorch-fid. It differs from torchvision's in
its weights, in average pools that leave out the padding, and in a maximum where the last block ought to have an average.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seppo_fast.evaluation.video.loading import load_network

SOURCE = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
FEATURES, SIDE = 2048, 299


class Conv(NamedTuple):
    """A convolution of a block: its public name, channels, kernel and stride; with stride 2 it has no padding."""

    name: str
    channels: int
    kernel: int | tuple[int, int] = 1
    stride: int = 1


Pool = Callable[[Tensor], Tensor]
Step = Conv | tuple[Conv, Conv] | Pool  # two convolutions take the same input, and their channels are concatenated


class Unit(nn.Module):
    """Convolution, batch normalisation, ReLU."""

    def __init__(self, before: int, channels: int, kernel: int | tuple[int, int], stride: int = 1, padding: str = "same") -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """Parallel branches, each a sequence of steps."""

    def __init__(self, before: int, *branches: Sequence[Step]) -> None:
        super().__init__()
        self.branches = [self.built(before, branch) for branch in branches]

    def built(self, channels: int, branch: Sequence[Step]) -> list[list[Pool]]:
        """Run the steps one after another, and the convolutions of a step in parallel."""
        steps: list[list[Pool]] = []
        for step in branch:
            if not isinstance(step, tuple):
                steps.append([step])
                continue
            convs = (step,) if isinstance(step, Conv) else step
            for conv in convs:
                self.add_module(conv.name, Unit(channels, *conv[1:], padding="same" if conv.stride == 1 else "valid"))
            steps.append([getattr(self, conv.name) for conv in convs])
            channels = sum(conv.channels for conv in convs)
        return steps

    def forward(self, x: Tensor) -> Tensor:
        ends = []
        for steps in self.branches:
            end = x
            for parts in steps:
                end = torch.cat([part(end) for part in parts], 1)
            ends.append(end)
        return torch.cat(ends, 1)


def average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def largest(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def halved(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2)


def at_35(before: int, pooled: int) -> Block:
    """A block on 35 x 35 points (for pictures of 299)."""
    return Block(before, [Conv("branch1x1", 64)],
                 [Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, 5)],
                 [Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, 3), Conv("branch3x3dbl_3", 96, 3)],
                 [average, Conv("branch_pool", pooled)])


def at_17(inner: int) -> Block:
    """A block on 17 x 17 points."""
    row, column = (1, 7), (7, 1)
    return Block(768, [Conv("branch1x1", 192)],
                 [Conv("branch7x7_1", inner), Conv("branch7x7_2", inner, row), Conv("branch7x7_3", 192, column)],
                 [Conv("branch7x7dbl_1", inner), Conv("branch7x7dbl_2", inner, column), Conv("branch7x7dbl_3", inner, row),
                  Conv("branch7x7dbl_4", inner, column), Conv("branch7x7dbl_5", 192, row)],
                 [average, Conv("branch_pool", 192)])


def at_8(before: int, pool: Pool) -> Block:
    """A block on 8 x 8 points."""
    row, column = (1, 3), (3, 1)
    return Block(before, [Conv("branch1x1", 320)],
                 [Conv("branch3x3_1", 384), (Conv("branch3x3_2a", 384, row), Conv("branch3x3_2b", 384, column))],
                 [Conv("branch3x3dbl_1", 448), Conv("branch3x3dbl_2", 384, 3),
                  (Conv("branch3x3dbl_3a", 384, row), Conv("branch3x3dbl_3b", 384, column))],
                 [pool, Conv("branch_pool", 192)])


class Inception(nn.Module):
    """Pictures (B, 3, 299, 299) in [-1, 1] -> features (B, 2048), the mean of the last block over its points."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, stride=2, padding="valid")
        self.Conv2d_2a_3x3 = Unit(32, 32, 3, padding="valid")
        self.Conv2d_2b_3x3 = Unit(32, 64, 3)
        self.Conv2d_3b_1x1 = Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3, padding="valid")
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = at_35(192, 32), at_35(256, 64), at_35(288, 64)
        self.Mixed_6a = Block(288, [Conv("branch3x3", 384, 3, 2)],
                              [Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, 3), Conv("branch3x3dbl_3", 96, 3, 2)],
                              [halved])
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = at_17(128), at_17(160), at_17(160), at_17(192)
        self.Mixed_7a = Block(768, [Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, 3, 2)],
                              [Conv("branch7x7x3_1", 192), Conv("branch7x7x3_2", 192, (1, 7)), Conv("branch7x7x3_3", 192, (7, 1)),
                               Conv("branch7x7x3_4", 192, 3, 2)],
                              [halved])
        self.Mixed_7b, self.Mixed_7c = at_8(1280, average), at_8(2048, largest)

    def forward(self, x: Tensor) -> Tensor:
        x = halved(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = halved(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))


def prepared(frames: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] as the network takes them: scaled as in pytorch-fid, bilinear without antialiasing."""
    return F.interpolate(frames, (SIDE, SIDE), mode="bilinear", align_corners=False) * 2 - 1


def load(file: Path, device: torch.device) -> Inception:
    """The network with the published weights; its 1008 classes are left out."""
    return load_network(Inception, file, "FID's Inception v3", device, unused=("fc.",))
