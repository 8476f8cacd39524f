"""Quality over what was spent: a seed's curve, from its base on."""

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

from benchmarks.time_to_quality.ways import BASE, DISTILLED, PAPER, TIMED

Result = Mapping[str, Any]
Point = Mapping[str, float]


def seeds_of(result: Result) -> list[int]:
    return sorted({run["seed"] for run in result["runs"]})


def run_of(result: Result, method: str, seed: int) -> Mapping[str, Any]:
    return next(run for run in result["runs"] if (run["method"], run["seed"]) == (method, seed))


def made(result: Result, method: str) -> bool:
    return any(run["method"] == method for run in result["runs"])


def curve(result: Result, way: str, seed: int, with_training: bool = False) -> list[Point]:
    """The base and the judged policies. `with_training`: the adapter's own training comes first.

    Seconds are the updates' times what one of the way takes in the timed run; without that there are none.
    """
    (base,), run, clock = run_of(result, BASE, seed)["points"], run_of(result, way, seed), timed(result)
    if not with_training:
        return [clocked(point, clock, way) for point in (base, *run["points"])]
    (first,) = run_of(result, DISTILLED, seed)["points"]
    before = {"flops": first["flops"], "seconds": clock["points"][0]["distillation_s"] if clock else 0.0}
    after = [clocked(point, clock, way) for point in (base, *run["points"])]
    return [clocked(base, clock, way), *({key: value + before.get(key, 0.0) for key, value in point.items()} for point in after)]


def clocked(point: Point, clock: Mapping[str, Any] | None, way: str) -> Point:
    """The point with what its updates take in the timed run in place of its run's own seconds, which other programs lengthened."""
    seconds = {"seconds": point["update"] * seconds_of_an_update(clock, way)} if clock else {}
    return {key: value for key, value in point.items() if key not in ("seconds", "sampling_s", "training_s")} | seconds


def timed(result: Result) -> Mapping[str, Any] | None:
    """The run that measured seconds, if it was made."""
    return next((run for run in result["runs"] if run["method"] == TIMED), None)


def seconds_of_an_update(clock: Mapping[str, Any], way: str) -> float:
    return sum(clock["updates"][way].values())


def units(result: Result) -> tuple[str, ...]:
    """What is spent: FLOPs, and seconds where they were measured."""
    return ("flops", "seconds") if timed(result) else ("flops",)


def end(points: Sequence[Point], measure: str) -> float:
    """Where a curve ends: the mean of its last two policies."""
    return (points[-1][measure] + points[-2][measure]) / 2


def at(points: Sequence[Point], spent: float, measure: str, unit: str = "flops") -> float:
    """The measure where so much was spent, between two policies on the line through them, and after the last as it was there."""
    for before, after in zip(points, points[1:], strict=False):
        if before[unit] <= spent < after[unit]:
            share = (spent - before[unit]) / (after[unit] - before[unit])
            return before[measure] + share * (after[measure] - before[measure])
    return points[-1][measure]


def until(points: Sequence[Point], target: float, measure: str, unit: str) -> float:
    """What was spent when the measure first reached the target, likewise; infinite where it never does."""
    if points[0][measure] >= target:
        return points[0][unit]
    for before, after in zip(points, points[1:], strict=False):
        if after[measure] >= target:
            share = (target - before[measure]) / (after[measure] - before[measure])
            return before[unit] + share * (after[unit] - before[unit])
    return inf


def ends(result: Result, way: str, measure: str) -> list[float]:
    """Where the seeds' curves end."""
    return [end(curve(result, way, seed), measure) for seed in seeds_of(result)]


def at_equal_flops(result: Result, way: str, measure: str, with_training: bool = False) -> list[float]:
    """The way minus `paper`, of each seed, where the way ends, or at half of the paper's FLOPs where it ends later."""
    differences = []
    for seed in seeds_of(result):
        own, paper = curve(result, way, seed, with_training), curve(result, PAPER, seed)
        spent = min(own[-1]["flops"], paper[-1]["flops"] / 2)
        differences.append(at(own, spent, measure) - at(paper, spent, measure))
    return differences


def shares_until(result: Result, way: str, measure: str, unit: str, with_training: bool = False) -> list[float]:
    """What each seed spent until it first had what `paper` ends with, as a share of all that `paper` spends."""
    found = []
    for seed in seeds_of(result):
        paper = curve(result, PAPER, seed)
        spent = until(curve(result, way, seed, with_training), end(paper, measure), measure, unit)
        found.append(spent / paper[-1][unit])
    return found


def totals(result: Result, way: str, unit: str, with_training: bool = False) -> list[float]:
    """All that each seed spent."""
    return [curve(result, way, seed, with_training)[-1][unit] for seed in seeds_of(result)]
