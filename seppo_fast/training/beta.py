"""Chooses beta where it is "auto": the logits of typical pairs then neither vanish nor saturate, whatever the model's errors are.

The logit is -beta / 2 times the margin (m_w - q_w) + s (m_l - q_l). Margins depend on model, data, learning rate and noise
process: a flow's error is another quantity than a DDPM's, for which the paper chose 2000.
"""

from dataclasses import dataclass
from statistics import median

import torch
from pydantic import ConfigDict
from torch import Tensor

FIRST = 2000.0  # the paper's, until a margin was seen
PRODUCT = 2.77  # of beta and the median |margin|: half of it, 1.39 = 2 log 2, is then the median |logit|
DECAY = 0.9  # about ten updates count: enough to average over timesteps, and fewer than an iteration, in which margins grow
TIE = 1e-6  # |margin| over the errors that it is made of: about ten units in the last place of an fp32 error
RANGE = torch.finfo(torch.float32)  # in which the loss computes


@dataclass(frozen=True)
class Margins:
    """The exponential running mean of the updates' median |margin|, `total / weight`; the weight corrects the first ones' bias.

    The median, because a few large margins would make the logits of all other pairs small.
    """

    total: float = 0.0
    weight: float = 0.0

    __pydantic_config__ = ConfigDict(extra="forbid")

    @property
    def beta(self) -> float:
        """The beta of the next update."""
        return PRODUCT * self.weight / self.total if self.weight else FIRST

    def after(self, table: Tensor) -> "Margins":
        """With an update's `(pairs, 6)` table of all ranks (`Objective`); pairs that are not finite are left out.

        An update whose pairs are ties says nothing, because policy and reference are still equal. Nor does one that would make
        beta 0 or infinite.
        """
        known = table[:, :5].double()  # without the logit: with a beta that is too large it overflows, and beta has to fall
        known = known[known.isfinite().all(dim=1)]
        errors, sign = known[:, :4], known[:, 4]
        margins = (errors[:, 0] - errors[:, 2] + sign * (errors[:, 1] - errors[:, 3])).abs()
        if not len(known) or not (typical := median(margins.tolist())) > TIE * median(errors.sum(dim=1).tolist()):
            return self
        new = Margins(DECAY * self.total + (1 - DECAY) * typical, DECAY * self.weight + (1 - DECAY))
        return new if RANGE.tiny < new.beta < RANGE.max else self
