"""Learned perceptual image patch similarity (Zhang et al., 2018, Eq. 1), version 0.1 on AlexNet.

The learned weights of the channels are a file of torchmetrics. torchmetrics' own LPIPS takes AlexNet from torchvision, whose
wheels need one exact version of torch, so AlexNet's convolutions are written here, with torchvision's names.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seppo_fast.errors import UserError
from seppo_fast.evaluation.video.loading import load_network
from seppo_fast.evaluation.weights import read_tensors

SOURCE = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
LINEAR = "functional/image/lpips_models/alex.pth"  # in torchmetrics' folder
# Of ImageNet, for colours in [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# With fewer pixels, nothing is left for the second pooling.
SMALLEST = 31


class AlexNet(nn.Module):
    """Pictures (B, 3, H, W) -> the five maps after a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                maps.append(x)
        return maps


def distance(network: AlexNet, linear: Sequence[Tensor], one: Tensor, other: Tensor) -> Tensor:
    """Two batches of pictures (B, 3, H, W) in [0, 1] -> (B,): weighted squared differences of unit vectors, over all layers."""
    if min(one.shape[-2:]) < SMALLEST:
        raise UserError(f"LPIPS needs frames of at least {SMALLEST}x{SMALLEST} pixels, and these are"
                        f" {one.shape[-1]}x{one.shape[-2]}")
    layers = zip(network(scaled(one)), network(scaled(other)), linear, strict=True)
    return sum(F.conv2d((unit(left) - unit(right)).square(), weight).mean((1, 2, 3)) for left, right, weight in layers)


def scaled(pictures: Tensor) -> Tensor:
    """Pictures in [0, 1] as the network takes them."""
    shift, scale = (pictures.new_tensor(values).view(3, 1, 1) for values in (SHIFT, SCALE))
    return (pictures * 2 - 1 - shift) / scale


def unit(maps: Tensor) -> Tensor:
    """The maps with each point's vector scaled to length 1."""
    return maps / (maps.norm(dim=1, keepdim=True) + 1e-10)


def load(file: Path, device: torch.device) -> tuple[AlexNet, list[Tensor]]:
    """The network with the published weights, without its classifier, and the weights of its channels."""
    import torchmetrics

    learned = read_tensors(Path(torchmetrics.__file__).parent / LINEAR)
    linear = [learned[f"lin{layer}.model.1.weight"].to(device) for layer in range(5)]
    return load_network(AlexNet, file, "torchvision's AlexNet", device, unused=("classifier.",)), linear
