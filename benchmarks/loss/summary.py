"""Ratios and targets, met or missed, from the measured times of the loss."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.result_files import Row

BASELINES = ("eager", "compile", "liger_style")
FUSED = ("native", "triton")  # the first that was measured is "fused" in the ratios


def row_of(labels: Row, implementation: str, times: Sequence[float], **more: object) -> Row:
    median = statistics.median(times)
    gb_s = {"gb_s": round(labels["floor_bytes"] / median / 1e3, 2)} if labels["what"] == "forward_backward" else {}
    p10 = statistics.quantiles(times, n=10, method="inclusive")[0]
    return labels | {"implementation": implementation, "median_us": round(median, 2), "p10_us": round(p10, 2),
                     "calls": len(times), **gb_s, **more}


def ratios(rows: Sequence[Row]) -> list[Row]:
    """For each case: each baseline's time over the fused loss's, the fused loss's over the copy's, and peak memory in gradients.

    Ratios are of medians, and with "_p10" of tenth percentiles, which are the better estimate on a machine that others use too.
    """
    cases: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("what", "shape", "pairs", "dtype"))
        cases.setdefault(key, {})[row["implementation"]] = row
    found = []
    for (what, shape, pairs, dtype), case in cases.items():
        name = next((name for name in FUSED if name in case), None)
        if name is None:
            continue
        fused = case[name]
        ratio: Row = {"what": what, "shape": shape, "pairs": pairs, "dtype": dtype, "fused": name, "fused_us": fused["median_us"]}
        for statistic, suffix in (("median_us", ""), ("p10_us", "_p10")):
            ratio |= {f"{other}_over_fused{suffix}": round(case[other][statistic] / fused[statistic], 2)
                      for other in BASELINES if other in case}
            if "copy" in case:
                ratio[f"fused_over_copy{suffix}"] = round(fused[statistic] / case["copy"][statistic], 2)
        ratio |= {f"{label}_gradients": case[other]["peak_gradients"]
                  for label, other in (("fused", name), *((other, other) for other in BASELINES))
                  if "peak_gradients" in case.get(other, {})}
        found.append(ratio)
    return found


@dataclass(frozen=True)
class Target:
    """A bound on one ratio, which has to hold in each of the cases."""

    name: str
    ratio: str
    cases: tuple[tuple[int, str], ...]  # (pairs, dtype)
    at_least: float | None = None
    at_most: float | None = None
    what: str = "forward_backward"
    shape: str = "sd15"

    def holds(self, value: float) -> bool:
        return value >= self.at_least if self.at_least is not None else value <= self.at_most


def _of(*pairs: int, dtypes: tuple[str, ...] = ("fp32", "bf16")) -> tuple[tuple[int, str], ...]:
    return tuple((n, dtype) for dtype in dtypes for n in pairs)


TARGETS = {
    "cpu": (
        Target("at least 5x faster than eager, 2 to 64 pairs", "eager_over_fused", _of(2, 4, 8, 16, 32, 64), at_least=5.0),
        Target("at least 2x faster than torch.compile, 2 to 64 pairs", "compile_over_fused", _of(2, 4, 8, 16, 32, 64),
               at_least=2.0),
        Target("at most 1.6x the copy of the same bytes, 32 and 64 pairs", "fused_over_copy", _of(32, 64), at_most=1.6),
        Target("host time at least 4x below eager's", "eager_over_fused", _of(1, 2, dtypes=("fp32",)), at_least=4.0, what="host",
               shape="tiny"),
    ),
    "cuda": (
        Target("at least 8x faster than eager, 1 to 8 pairs", "eager_over_fused", _of(1, 8), at_least=8.0),
        Target("at least 2x faster than torch.compile, 1 to 8 pairs", "compile_over_fused", _of(1, 8), at_least=2.0),
        Target("at least 90% of the copy's bandwidth, 1024 pairs", "fused_over_copy", _of(1024), at_most=1 / 0.9),
        Target("peak memory of one gradient, 256 pairs", "fused_gradients", _of(256), at_most=1.01),
    ),
}


def targets(found: Sequence[Row], device: str) -> list[Row]:
    """Each target with its worst ratio and the case of it. `met` is None where the target holds so far, but cases are missing."""
    return [_judged(target, found) for target in TARGETS[device]]


def _judged(target: Target, found: Sequence[Row]) -> Row:
    measured = {(row["pairs"], row["dtype"]): row for row in found
                if (row["what"], row["shape"]) == (target.what, target.shape) and target.ratio in row}
    missing = [case for case in target.cases if case not in measured]
    judged: Row = {"target": target.name, "ratio": target.ratio, "what": target.what, "shape": target.shape,
                   "bound": target.at_least if target.at_least is not None else target.at_most, "met": None}
    there = [case for case in target.cases if case in measured]
    if there:
        worst = (min if target.at_least is not None else max)(there, key=lambda case: measured[case][target.ratio])
        value = measured[worst][target.ratio]
        judged |= {"worst": value, "worst_p10": measured[worst].get(f"{target.ratio}_p10"), "where": _where(worst)}
        judged["met"] = False if not target.holds(value) else None if missing else True
        judged["missed_at"] = [_where(case) for case in there if not target.holds(measured[case][target.ratio])]
    return judged | {"not_measured": [_where(case) for case in missing]}


def _where(case: tuple[int, str]) -> str:
    pairs, dtype = case
    return f"{pairs} pair{'s' * (pairs != 1)} {dtype}"


def of_gpu_suite(suite: Row) -> list[Row]:
    """Ratios, as `ratios` gives them, from a GPU suite: over baselines with the host's time, over the copy on the device alone."""
    merged: dict[tuple, Row] = {}

    def ratio(row: Row) -> Row:
        key = (row["shape"], row["pairs"], row["dtype"])
        return merged.setdefault(key, {"what": "forward_backward", "shape": key[0], "pairs": key[1], "dtype": key[2]})

    for row in suite.get("baselines", {}).get("rows", []):
        fused = next(name for name in FUSED if name in row["us"])
        ratio(row).update({"fused": fused, "fused_us": row["us"][fused]}
                          | {f"{name}_over_fused": round(row["us"][name] / row["us"][fused], 2) for name in BASELINES})
    for row in suite.get("bandwidth", {}).get("rows", []):
        name = next(name for name in FUSED if f"{name}_us" in row)
        ratio(row).update(fused_over_copy=round(row[f"{name}_us"] / row["copy_us"], 3), device_us=row[f"{name}_us"])
    for row in suite.get("memory", {}).get("rows", []):
        if row["implementation"] in (*FUSED, *BASELINES):
            label = "fused" if row["implementation"] in FUSED else row["implementation"]
            ratio(row).setdefault(f"{label}_gradients", row["gradients"])  # native comes before triton
    return list(merged.values())
