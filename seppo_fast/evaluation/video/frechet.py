"""The Frechet distance between two sets of features (Heusel et al., 2017, Eq. 6), from sums that can be made in parts."""

from dataclasses import dataclass

import torch
from torch import Tensor

from seppo_fast.errors import UserError


@dataclass(frozen=True)
class Moments:
    """What the distance needs of M features: their number, sum (D,) and sum of outer products (D, D), fp64 on the CPU.

    Moments of batches and of ranks can be added: `Moments.of(some) + Moments.of(others)`.
    """

    count: int
    total: Tensor
    outer: Tensor

    @staticmethod
    def none(size: int) -> "Moments":
        """The moments of no features, of D = `size` numbers each."""
        return Moments(0, torch.zeros(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64))

    @staticmethod
    def of(features: Tensor) -> "Moments":
        """The moments of features (M, D)."""
        features = features.detach().cpu().double()
        return Moments(len(features), features.sum(0), features.T @ features)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance (over M - 1), as in numpy.cov, pytorch-fid and torchmetrics."""
        return (self.outer - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


def frechet(generated: Moments, real: Moments) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of the Gaussians with the sets' means and covariances.

    With no more features than dimensions the covariances are singular, but the distance is still defined. It is biased
    upwards, more with fewer features: compare only distances of equally many features. NaN where a feature is not finite.

    With C = L L^T the eigenvalues of C1 C2 are the squares of the singular values of L1^T L2. These are exact to fp64 also for
    singular covariances, where the usual roots of C1 C2 (scipy's sqrtm, torchmetrics' eigenvalues) keep half the digits.
    """
    if min(generated.count, real.count) < 2:
        raise UserError("a Frechet distance (FID, FVD) needs two or more features on each side, and has"
                        f" {generated.count} generated and {real.count} real: more clips are needed")
    difference, first, second = generated.mean - real.mean, generated.covariance, real.covariance
    if not (first.isfinite().all() and second.isfinite().all()):
        return float("nan")
    cross = torch.linalg.svdvals(_root(first).T @ _root(second)).sum()
    return float(difference @ difference + first.trace() + second.trace() - 2 * cross)


def _root(covariance: Tensor) -> Tensor:
    """L (D, rank) with covariance = L L^T, without directions that are zero up to rounding."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()
