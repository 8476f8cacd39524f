"""What is compared, written down before the reported run: each comparison is one interval over the seeds.

The judge's view of a pair is by how much the reference's sample is better than the policy's own from the same noise and prompt.
It is measured twice: by the log-probability of the prompt's digit, and by the distance to the nearest real held-out digit. The sign
says "the reference's sample is better" where it is +1 (m_w > q_w): the loser is then learnt towards. The main figure is the sign's
balanced accuracy over comparisons of pairs of one update, which have the same policy and reference; the area under the curve (AUC)
is the same for m_w - q_w, of which the sign is one threshold. A policy that becomes better in all respects would raise the figures
over all pairs without any sign telling about its own pair's loser.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.flipper.runs import DRAWS, METHODS, TIMES, WATCHED

MEASURES = {"prompt": "log-probability of the prompt's digit", "distance": "closeness to a real digit"}
ENDS = {"prompt_accuracy": "prompt accuracy", "cleanliness": "cleanliness"}
MANY = str(DRAWS[-1])
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """`values`: one for each seed, positive where the sentence holds, 0 where nothing differs. `decides`: the measure by
    which it decides the verdict on the flipper."""

    sentence: str
    values: Callable[[Result], list[float]]
    needs: tuple[str, ...] = (WATCHED,)
    decides: str | None = None


def runs_of(result: Result, method: str) -> list[Mapping[str, Any]]:
    """A method's runs, by seed."""
    return sorted((run for run in result["runs"] if run["method"] == method), key=lambda run: run["seed"])


def told(result: Result, measure: str, key: str, *place: str | int) -> list[float | None]:
    """A figure of telling.py for each seed, None where it has none, by its place: "all", or ("levels", 3), ("same", "64") ..."""
    found = []
    for run in runs_of(result, WATCHED):
        at = run["told"]["measures"][measure]
        for step in place:
            at = at[step]
        found.append(at[key])
    return found


def above_chance(measure: str, key: str, *place: str) -> Callable[[Result], list[float]]:
    """A share for which chance is one half, minus that."""
    return lambda result: [value - 0.5 for value in told(result, measure, key, *place) if value is not None]


def difference(measure: str, better: Sequence[str], worse: Sequence[str]) -> Callable[[Result], list[float]]:
    """Two figures' difference, paired by seed: each is a key and its place."""
    return lambda result: [a - b for a, b in zip(told(result, measure, *better), told(result, measure, *worse), strict=True)
                           if a is not None and b is not None]


def end(method: str, measure: str) -> Callable[[Result], list[float]]:
    """The last policy's measure minus that of the run with signs of one noise."""
    return lambda result: [a["points"][-1][measure] - b["points"][-1][measure]
                           for a, b in zip(runs_of(result, method), runs_of(result, WATCHED), strict=True)]


TELLS = tuple(comparison for measure, label in MEASURES.items() for comparison in (
    Comparison(f"the sign tells which sample is better, within an update ({label}): balanced accuracy above 50 %",
               above_chance(measure, "signed", "all"), decides=label),
    Comparison(f"m_w - q_w tells which sample is better, within an update ({label}): AUC above 50 %",
               above_chance(measure, "within", "all")),
    Comparison(f"m_w - q_w tells which sample is better, over all pairs ({label}): AUC above 50 %",
               above_chance(measure, "auc", "all")),
    Comparison(f"the sign tells which sample is better, over all pairs ({label}): balanced accuracy above 50 %",
               above_chance(measure, "balanced", "all")),
    Comparison(f"s = +1 finds better samples ({label}): precision above the share of better ones",
               difference(measure, ("precision", "all"), ("base", "all"))),
))
AVERAGES = tuple(comparison for measure, label in MEASURES.items() for comparison in (
    Comparison(f"the mean over {MANY} noises at the pair's timestep tells ({label}): AUC within an update above 50 %",
               above_chance(measure, "within", "same", MANY)),
    Comparison(f"the mean over {MANY} noises tells more than one noise does ({label}): AUC within an update",
               difference(measure, ("within", "same", MANY), ("within", "same", "1"))),
    Comparison(f"the mean over {TIMES} noises and timesteps tells ({label}): AUC within an update above 50 %",
               above_chance(measure, "within", "other", str(TIMES))),
    Comparison(f"the mean over {TIMES} noises and timesteps tells more than one noise does ({label}): AUC within an update",
               difference(measure, ("within", "other", str(TIMES)), ("within", "same", "1"))),
))
TRAINING = tuple(
    Comparison(f"signs of {noises} noises end better than signs of one: {label}", end(method, measure), (WATCHED, method))
    for method, noises in METHODS.items() if method != WATCHED for measure, label in ENDS.items())
COMPARISONS = (*TELLS, *AVERAGES, *TRAINING)
