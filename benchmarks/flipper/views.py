"""The judge's view of watched pairs: is the reference's sample better than the policy's own from the same noise and prompt?"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from torch import Tensor

from seppo_fast.models import open_model
from seppo_fast.quickstart.digits import degrade, split_digits
from seppo_fast.quickstart.judge import Judge, grey
from seppo_fast.seeds import generator

Array = NDArray[np.float64]
LEAST = 1e-9  # of a probability, before its logarithm is taken


@dataclass(frozen=True)
class Views:
    """Of N pairs. `better`: for each measure, the value of the reference's sample minus that of the policy's own. Draws that were
    not made are NaN."""

    same: Array  # (draws, N) as in watching.py
    other: Array
    sign: Array  # (N,)
    timestep: Array
    update: Array
    drawer: Array
    better: dict[str, Array]


class Measures:
    """Two values of a sample, larger is better: the log-probability of the prompt's digit, and minus the distance to a real digit.

    The quickstart's judge reads and measures. Its classifier has no probabilities; they are calibrated on digits that it has not
    learnt from, sound and degraded.
    """

    def __init__(self, seed: int) -> None:
        digits, held_out = split_digits(seed)
        self.judge = Judge(held_out, digits, seed)
        scans = torch.cat([digits.pixels, degrade(digits.pixels, generator(seed, "calibration"))])
        self.chances = CalibratedClassifierCV(FrozenEstimator(self.judge.classifier)).fit(grey(scans),
                                                                                        digits.labels.repeat(2).numpy())

    def __call__(self, pixels: Tensor, labels: Tensor) -> dict[str, Array]:
        """Both values of samples (N, 3, 16, 16) with the prompts' digits (N,)."""
        chance = self.chances.predict_proba(grey(pixels))[np.arange(len(labels)), labels.numpy()]
        return {"prompt": np.log(np.maximum(chance, LEAST)), "distance": -self.judge.distance(pixels).astype(np.float64)}


def read_views(folder: Path, updates: Sequence[int], base: Path, seed: int) -> Views:
    """The pairs of these updates, judged."""
    files = [load_file(folder / f"update_{update:08d}.safetensors") for update in updates]
    joined = {name: torch.cat([file[name] for file in files]) for name in files[0] if name not in ("same", "other")}
    model, measures = open_model(str(base)), Measures(seed)
    vae = model.load_vae(torch.device("cpu"))
    with torch.no_grad():
        reference, own = (measures(model.decode(vae, joined[name]), joined["label"]) for name in ("reference", "own"))

    def numbers(name: str) -> Array:
        return joined[name].double().numpy()

    def draws(name: str) -> Array:
        most = max(len(file[name]) for file in files)
        return np.concatenate([np.pad(file[name].double().numpy(), ((0, most - len(file[name])), (0, 0)), constant_values=np.nan)
                               for file in files], axis=1)

    return Views(draws("same"), draws("other"), numbers("sign"), numbers("timestep"),
                 np.repeat(np.array(updates, dtype=np.float64), [file["sign"].numel() for file in files]), numbers("drawer"),
                 {name: reference[name] - own[name] for name in reference})
