"""The targets of the measured throughput: met, missed or not measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.result_files import Row

Found = tuple[float, str] | None  # a value and its case; None where it was not measured


@dataclass(frozen=True)
class Target:
    """A bound on one number of a result."""

    name: str
    value: Callable[[Row], Found]
    at_least: float | None = None
    at_most: float | None = None

    def judged(self, result: Row) -> Row:
        """`met` is None where it was not measured."""
        found = self.value(result)
        row: Row = {"target": self.name, "bound": self.at_least if self.at_least is not None else self.at_most, "met": None}
        if found is None:
            return row
        value, where = found
        held = value >= self.at_least if self.at_least is not None else value <= self.at_most
        return row | {"value": round(value, 3), "where": where, "met": held}


def over_obvious(result: Row) -> Found:
    """The loop's pairs per second over the obvious trainer's."""
    loop = result.get("loop", {})
    if "ours_over_obvious" not in loop:
        return None
    return loop["ours_over_obvious"], f"{loop['case']['steps']} steps, batch {loop['case']['batch']}"


def two_ranks(result: Row) -> Found:
    """Pairs per second of two ranks on two cores over those of one on one."""
    ranks = result.get("ranks", {})
    return (ranks["two_over_one"], "quickstart") if "two_over_one" in ranks else None


def uneven_ranks(result: Row) -> Found:
    """0 where both ranks drew the same number of samples in every update."""
    ranks = result.get("ranks", {})
    return (float(not ranks["shared_evenly"]), "every update") if "shared_evenly" in ranks else None


def over_diffusers(result: Row) -> Found:
    """The worst ratio of the sampler to compiled diffusers at an equal batch."""
    rows = [row for row in result.get("sampler", {}).get("ratios", []) if "over_diffusers" in row]
    if not rows:
        return None
    worst = min(rows, key=lambda row: row["over_diffusers"])
    return worst["over_diffusers"], _point(worst)


def of_matmul(result: Row) -> Found:
    """The sampler's best share of the measured matrix-product rate."""
    rows = result.get("sampler", {}).get("ratios", [])
    if not rows:
        return None
    best = max(rows, key=lambda row: row["of_matmul"])
    return best["of_matmul"], _point(best)


def _point(row: Row) -> str:
    return f"{row['network']}, batch {row['batch']}, {row['steps']} steps"


def peak(way: str) -> Callable[[Row], Found]:
    """Gigabytes of a training step."""
    def value(result: Row) -> Found:
        rows = {row["way"]: row for row in result.get("training_memory", {}).get("rows", [])}
        return (rows[way]["measured_gb"], "SD-1.5, one GPU") if way in rows else None
    return value


def plan_error(result: Row) -> Found:
    """The largest difference of the plan's estimate from the measured peak, as a share of the peak."""
    rows = result.get("training_memory", {}).get("rows", [])
    if not rows:
        return None
    worst = max(rows, key=lambda row: abs(row["planned_over_measured"] - 1))
    return abs(worst["planned_over_measured"] - 1), worst["way"]


TARGETS = {
    "cpu": (
        Target("the loop at least 2x the obvious trainer", over_obvious, at_least=2.0),
        Target("two ranks on two cores at least 1.6x one rank on one core", two_ranks, at_least=1.6),
        Target("ranks share the sampling evenly (0: always)", uneven_ranks, at_most=0.0),
    ),
    "cuda": (
        Target("the loop at least 5x the obvious trainer, 50 steps", over_obvious, at_least=5.0),
        Target("the sampler at least 1.2x diffusers at its best, same batch", over_diffusers, at_least=1.2),
        Target("the sampler at least 50% of the matrix-product rate at its best batch", of_matmul, at_least=0.5),
        Target("training in less than 24 GB (ZeRO-2, local batch 1)", peak("full"), at_most=24.0),
        Target("training in less than 12 GB (gradient checkpointing, optimizer on the CPU)", peak("small"), at_most=12.0),
        Target("the plan's memory within 15% of the measured", plan_error, at_most=0.15),
    ),
}


def targets(result: Row, device: str) -> Sequence[Row]:
    """Each target of the device, judged."""
    return [target.judged(result) for target in TARGETS[device]]


def rates(result: Row) -> Row | None:
    """What `--dry-run --rates` reads: the shares of the matrix-product rate by batch; None before the sampler was measured.

    Training a pair is eight forwards of a sample: the policy's forward and backward on two, the reference's forward on two.
    """
    sampler, loop = result.get("sampler", {}), result.get("loop", {})
    if not sampler.get("ratios"):
        return None
    network, steps = sampler["ratios"][0]["network"], sampler["ratios"][0]["steps"]
    same = [row for row in sampler["ratios"] if (row["network"], row["steps"]) == (network, steps)]
    shares = sorted([row["batch"], row["of_matmul"]] for row in same)
    found: Row = {"device": result["machine"].get("gpu") or result["machine"]["cpu"], "matmul_tflops": sampler["matmul_tflops"],
                  "sampling_fraction": shares, "source": f"measured: benchmarks.throughput, {network}, commit {result['commit']}"}
    ours = [row for row in loop.get("rows", []) if row["trainer"] == "ours"]
    if ours:
        flops = 8 * sampler["flops"][network]["own"] * loop["case"]["batch"]
        share = flops / ours[-1]["training_s"] / (1e12 * sampler["matmul_tflops"])
        found["training_fraction"] = [[loop["case"]["micro"], round(share, 4)]]
    return found
