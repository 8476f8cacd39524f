"""Vendi within a prompt, of digits."""

from collections.abc import Sequence

import torch
from sklearn.decomposition import PCA
from torch import Tensor

from seppo_fast.evaluation.scores.vendi import vendi
from seppo_fast.quickstart.digits import Digits
from seppo_fast.quickstart.judge import grey

FEATURES = 12  # principal components of real digits: most grain is outside of them


class Diversity:
    """Looks at pictures in the principal components of held-out digits."""

    def __init__(self, held_out: Digits) -> None:
        self.components = PCA(FEATURES, random_state=0).fit(grey(held_out.pixels))

    def within_prompts(self, pixels: Tensor, labels: Sequence[int]) -> float:
        """The mean over the prompts of how many different pictures, in effect, (N, 3, 16, 16) holds under one."""
        found, of = torch.tensor(self.components.transform(grey(pixels))), torch.tensor(labels)
        each = [vendi(found[of == label]) for label in sorted(set(labels))]
        return sum(each) / len(each)
