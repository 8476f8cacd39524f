"""How near a way's rollouts are to what the base draws in the paper's way: an energy distance of pictures."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.time_to_quality.rollouts import Rollouts, label_of
from benchmarks.time_to_quality.ways import PAPER, TASKS, Settings, drawn_like
from seppo_fast.quickstart.judge import grey

SAMPLES = 300


def distances(home: Path, seed: int, settings: Settings, samples: int = SAMPLES) -> dict[str, float]:
    """Of each way that draws, to the paper's samples from other noise. `paper`'s own is the floor: chance alone."""
    rollouts, numbers = Rollouts(home, seed, settings), range(samples)
    vae, labels, found = rollouts.model.load_vae(torch.device("cpu")), [*map(label_of, numbers)], {}

    @torch.no_grad()
    def pictures(way: str, purpose: str) -> Tensor:
        latents = rollouts.draw(rollouts.sampler(way), numbers, purpose)
        return torch.cat([rollouts.model.decode(vae, some) for some in latents.split(100)])

    policys, like = pictures(PAPER, "other noise"), drawn_like(TASKS[settings.task].ways)
    for way in dict.fromkeys(like.values()):
        found[way] = within_prompts(pictures(way, "initial noise"), policys, labels)
        print(way, found[way], flush=True)
    return {way: found[as_this] for way, as_this in like.items()}


def within_prompts(one: Tensor, other: Tensor, labels: Sequence[int]) -> float:
    """The mean over the prompts of the energy distance between pictures (N, 3, 16, 16) of the same prompts."""
    of = np.asarray(labels)
    one_grey, other_grey = (torch.from_numpy(grey(pixels)) for pixels in (one, other))
    return float(np.mean([energy(one_grey[of == label], other_grey[of == label]) for label in sorted(set(labels))]))


def energy(one: Tensor, other: Tensor) -> float:
    """The energy distance of the distributions behind (N, D) and (M, D) (Szekely and Rizzo 2013), estimated without bias: about
    zero where they are the same, and by chance below."""
    apart = partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")  # exactly 0 between a row and itself

    def within(rows: Tensor) -> Tensor:
        return apart(rows, rows).sum() / (len(rows) * (len(rows) - 1))

    return float(2 * apart(one, other).mean() - within(one) - within(other))
