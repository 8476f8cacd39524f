"""Inception, I3D and AlexNet: the published names load, and the networks compute what their authors' do."""

import math
from pathlib import Path

import pytest
import torch
from evaluation.video_networks import (
    alexnet_shapes,
    i3d_maps,
    i3d_shapes,
    inception_features,
    inception_shapes,
    random_weights,
    tensorflow_pads,
    write,
)
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from seppo_fast.errors import UserError
from seppo_fast.evaluation.video import i3d, inception, lpips

CPU = torch.device("cpu")
RANDOM = torch.Generator().manual_seed(1)


@pytest.fixture(scope="module")
def inception_weights() -> dict[str, Tensor]:
    return random_weights(inception_shapes())


@pytest.fixture(scope="module")
def i3d_weights() -> dict[str, Tensor]:
    return random_weights(i3d_shapes())


@pytest.fixture(scope="module")
def inception_network(inception_weights, tmp_path_factory) -> inception.Inception:
    return inception.load(write(inception_weights, tmp_path_factory.mktemp("inception") / "fid.pth"), CPU)


@pytest.fixture(scope="module")
def i3d_network(i3d_weights, tmp_path_factory) -> i3d.I3D:
    return i3d.load(write(i3d_weights, tmp_path_factory.mktemp("i3d") / "rgb_imagenet.pt", old=True), CPU)


def names_and_shapes(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in network.state_dict().items() if "num_batches" not in name}


def test_the_networks_have_the_published_names_and_shapes_and_no_others():
    with torch.device("meta"):
        networks = inception.Inception(), i3d.I3D(), lpips.AlexNet()
    for network, shapes, unused in zip(networks, (inception_shapes(), i3d_shapes(), alexnet_shapes()), ("fc.", "-", "classifier."),
                                       strict=True):
        assert names_and_shapes(network) == {name: shape for name, shape in shapes.items() if not name.startswith(unused)}
    # torchvision's Inception v3 has 23,834,568 without its second head, 2,049,000 of them in the classes; I3D, RGB: 12.7 million
    assert [sum(value.numel() for value in network.parameters()) for network in networks] == [21_785_568, 12_697_264, 2_469_696]


def test_a_published_file_loads_in_every_format_to_a_network_for_inference(i3d_weights, inception_network, i3d_network, tmp_path):
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in inception_network.parameters())
    assert not inception_network.training and not i3d_network.training
    counted = i3d_weights | {"Conv3d_1a_7x7.bn.num_batches_tracked": torch.tensor(7)}
    save_file(counted, tmp_path / "a.safetensors")
    halves = {name: value.half() if value.is_floating_point() else value for name, value in counted.items()}
    for file in (tmp_path / "a.safetensors", write(halves, tmp_path / "half.pt")):
        loaded = i3d.load(file, CPU)
        assert loaded.logits.conv3d.weight.dtype == torch.float32
        name = "Mixed_4e.b1b.conv3d.weight"
        torch.testing.assert_close(loaded.get_parameter(name), i3d_weights[name], rtol=1e-3, atol=1e-4)


def test_inception_computes_what_pytorch_fid_does(inception_weights, inception_network):
    for height, width in ((75, 75), (97, 119)):  # 299 would be slow; the blocks' borders are more of the picture here
        pictures = torch.rand(2, 3, height, width, generator=RANDOM) * 2 - 1
        wanted = inception_features(inception_weights, pictures)
        assert wanted.shape == (2, 2048) and 0.1 < wanted.std() < 100
        torch.testing.assert_close(inception_network(pictures), wanted, rtol=1e-3, atol=1e-4)


def test_inceptions_pictures_are_scaled_between_the_pixels_centres_and_not_smoothed():
    line = torch.rand(512, generator=RANDOM)
    pictures = inception.prepared(line.expand(1, 3, 100, 512))
    torch.testing.assert_close(pictures, (2 * between_centres(line, 299) - 1).expand(1, 3, 299, 299), rtol=0, atol=1e-4)


def between_centres(line: Tensor, count: int) -> Tensor:
    """A line of pixels at `count` points, linear between the centres of its pixels."""
    place = ((torch.arange(count, dtype=torch.float64) + 0.5) * len(line) / count - 0.5).clamp(0, len(line) - 1)
    left, share = place.long(), (place % 1).float()
    return line[left] * (1 - share) + line[(left + 1).clamp(max=len(line) - 1)] * share


@pytest.mark.parametrize(("side", "step"), [(7, 2), (3, 2), (3, 1), (2, 2), (1, 2), (1, 1)])
def test_i3d_pads_as_tensorflow_does(side, step):
    for size in range(1, 15):
        ramp = torch.arange(1.0, size + 1)
        padded = i3d.same(ramp.view(1, 1, 1, size, 1), (1, side, 1), (1, step, 1))
        before, after = tensorflow_pads(size, side, step)
        assert padded.flatten().tolist() == [0.0] * before + ramp.tolist() + [0.0] * after
        assert F.max_pool1d(padded.view(1, 1, -1), side, step).shape[-1] == math.ceil(size / step)


def test_i3d_pads_each_axis_for_itself():
    padded = i3d.same(torch.ones(1, 1, 9, 10, 11), (7, 3, 2), (2, 2, 1))
    assert padded.shape == (1, 1, 15, 11, 12)  # 3 + 3, 0 + 1, 0 + 1
    assert padded[0, 0, :, 0, 0].tolist() == [0.0] * 3 + [1.0] * 9 + [0.0] * 3
    assert padded[0, 0, 5, :, 0].tolist() == [1.0] * 10 + [0.0] and padded[0, 0, 5, 0].tolist() == [1.0] * 11 + [0.0]


@pytest.mark.parametrize("size", [(9, 32, 47), (16, 33, 64)])
def test_i3d_computes_what_deepminds_does(i3d_weights, i3d_network, size):
    clip = torch.rand(1, 3, *size, generator=RANDOM) * 2 - 1
    wanted = i3d_maps(i3d_weights, clip)
    assert wanted.shape == (1, 1024, *(math.ceil(side / by) for side, by in zip(size, (8, 32, 32), strict=True)))
    assert wanted.std() > 0.1
    torch.testing.assert_close(i3d_network.maps(clip), wanted, rtol=1e-3, atol=1e-3)


def test_i3ds_features_are_the_400_logits_averaged(i3d_weights, i3d_network, monkeypatch):
    maps = torch.rand(2, 1024, 4, 7, 7, generator=RANDOM)  # as of 32 frames of 224
    monkeypatch.setattr(i3d_network, "maps", lambda clip: clip)
    windows = torch.stack([maps[:, :, start:start + 2].flatten(2).mean(2) for start in range(3)])
    logits = windows @ i3d_weights["logits.conv3d.weight"].view(400, 1024).T + i3d_weights["logits.conv3d.bias"]
    torch.testing.assert_close(i3d_network(maps), logits.mean(0))


def test_i3d_takes_clips_of_224_and_needs_nine_frames():
    lines = torch.rand(9, 3, 1, 56, generator=RANDOM)
    frames = lines.expand(9, 3, 40, 56)
    clip = i3d.prepared(frames)
    assert clip.shape == (1, 3, 9, 224, 224)
    for frame, colour in ((0, 0), (8, 0), (3, 2)):
        wanted = 2 * between_centres(lines[frame, colour, 0], 224) - 1
        torch.testing.assert_close(clip[0, colour, frame], wanted.expand(224, 224), rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="FVD needs clips of 9 or more frames, and these have 8"):
        i3d.prepared(frames[:8])


def test_a_file_that_is_not_the_published_one_is_refused_by_name(tmp_path):
    fits = {name: torch.zeros(1).expand(shape) for name, shape in i3d_shapes().items()}  # of no size on the disk
    contents = {"empty": b"", "words": b"not found\n" * 50}
    for old in (False, True):
        whole = write(fits, tmp_path / "whole.pt", old).read_bytes()
        contents |= {f"half_{old}": whole[:len(whole) // 2], f"most_{old}": whole[:-1]}
    for name, content in contents.items():
        (tmp_path / f"{name}.pt").write_bytes(content)
        refused(tmp_path / f"{name}.pt")
    other = {name: torch.zeros(1).expand(shape) for name, shape in inception_shapes().items()}
    assert "Conv3d_1a_7x7" in refused(write(other, tmp_path / "other.pt"))
    fewer = {name: value for name, value in fits.items() if name != "Mixed_4d.b2b.bn.running_var"}
    assert "Mixed_4d.b2b.bn.running_var" in refused(write(fewer, tmp_path / "fewer.pt"))
    assert "Mixed_6a.extra" in refused(write(fits | {"Mixed_6a.extra": torch.ones(1)}, tmp_path / "more.pt"))
    charades = fits | {"logits.conv3d.weight": torch.zeros(1).expand(157, 1024, 1, 1, 1)}
    message = refused(write(charades, tmp_path / "charades.pt"))
    for fact in ("logits.conv3d.weight", "(157, 1024, 1, 1, 1)", "(400, 1024, 1, 1, 1)", "I3D"):
        assert fact in message
    refused(write([torch.ones(1)], tmp_path / "list.pt"))
    refused(write({0: torch.ones(1)}, tmp_path / "numbers.pt"))


def refused(file: Path) -> str:
    with pytest.raises(UserError) as caught:
        i3d.load(file, CPU)
    assert str(file) in str(caught.value)
    return str(caught.value)
