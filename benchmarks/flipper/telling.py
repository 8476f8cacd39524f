"""How well the winner's error tells which sample is better: precision, recall and areas under the curve of one seed's pairs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import balanced_accuracy_score, precision_score, recall_score, roc_auc_score

from benchmarks.flipper.views import Array, Views

TIMESTEPS = 1000


def told(views: Views, iterations: int, updates: int, draws: Sequence[int], levels: int) -> dict[str, Any]:
    """For each measure what the mean error tells: of all pairs, by noise level, by iteration, and by `draws` of the noise."""
    level = views.timestep * levels // TIMESTEPS
    several = ~np.isnan(views.same[-1])
    iteration = views.update // updates
    found: dict[str, Any] = {"pairs": len(views.sign), "averaged": int(several.sum()),
                             "aaf_rate": float((views.sign == -1).mean()),
                             "agreeing": {str(n): agreeing(views, n) for n in draws}, "measures": {}}
    for name, better in views.better.items():
        found["measures"][name] = {
            "all": telling(views.same[0], better, views.update),
            "levels": [telling(views.same[0], better, views.update, level == i) for i in range(levels)],
            "iterations": [telling(views.same[0], better, views.update, iteration == k) for k in range(iterations)],
            "same": {str(n): telling(views.same[:n].mean(0), better, views.update, several) for n in draws},
            "other": {str(n): telling(views.other[:n].mean(0), better, views.update, several) for n in draws
                      if n <= len(views.other)},
        }
    return found


def agreeing(views: Views, n: int) -> float:
    """The share of pairs whose sign over n noises is that over all of them."""
    same = views.same[:, ~np.isnan(views.same[-1])]
    return float(((same[:n].mean(0) > 0) == (same.mean(0) > 0)).mean())


def telling(excess: Array, better: Array, update: Array, where: Array | None = None) -> dict[str, float | None]:
    """What s = +1, a positive excess, tells of "the reference's sample is better", over the pairs `where`.

    A pair whose samples are equally good is left out. `auc`: the area under the curve of the excess; `balanced`, the balanced
    accuracy, is that of the sign. `within`, `signed`: the same if only pairs of one update are compared, which have the same policy
    and reference. None: there are no pairs of both kinds.
    """
    kept = (better != 0) & (where if where is not None else True)
    truth, score, groups = better[kept] > 0, excess[kept], update[kept]
    said = score > 0
    if not 0 < truth.sum() < len(truth):
        return dict.fromkeys(("base", "said", "precision", "recall", "balanced", "auc", "signed", "within"))
    return {"base": float(truth.mean()), "said": float(said.mean()),
            "precision": float(precision_score(truth, said)) if said.any() else None,
            "recall": float(recall_score(truth, said)), "balanced": float(balanced_accuracy_score(truth, said)),
            "auc": float(roc_auc_score(truth, score)), "signed": within(truth, said.astype(np.float64), groups),
            "within": within(truth, score, groups)}


def within(truth: Array, score: Array, groups: Array) -> float | None:
    """The area under the curve over the comparisons of pairs in one group."""
    right = compared = 0.0
    for group in np.unique(groups):
        here = groups == group
        count = float(truth[here].sum()) * float((~truth[here]).sum())
        if count:
            right += count * float(roc_auc_score(truth[here], score[here]))
            compared += count
    return right / compared if compared else None
