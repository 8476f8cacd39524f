"""How long a run takes on known devices: its FLOPs divided by the part of a device's matrix rate that such work reaches."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, ValidationError

from seppo_fast.config import METHODS, Sampler
from seppo_fast.configfile import Batch, Config, explain_all
from seppo_fast.data.fingerprint import latent_shape
from seppo_fast.errors import UserError
from seppo_fast.models.schedules import is_flow
from seppo_fast.opening import read_text
from seppo_fast.planning.communication import Cluster
from seppo_fast.planning.cost import Cost, Model
from seppo_fast.reference.calls import calls_of, evaluations
from seppo_fast.reference.guidance import guided
from seppo_fast.reference.solver import rollout_table
from seppo_fast.strict import parse_json
from seppo_fast.training.held_out import DRAWS

SHIPPED = Path(__file__).parent / "rates.json"
UNITS = {"hours": 1.0, "minutes": 1 / 60, "seconds": 1 / 3600}  # in hours
YEAR = 24 * 365
SHOWN = 0.01  # smaller figures are shown as "<0.01"
GPUS = (1, 2, 4, 8)
STEPS = (50, 25, 20)
BATCHES = (1, 4, 16)
Share = Annotated[float, Field(gt=0, le=1)]
Shares = Share | list[tuple[Annotated[int, Field(gt=0)], Share]] | None


class Rate(BaseModel):
    """A device's speed. Fractions are of `matmul_tflops`: one, or one a batch size (samples; pairs in training); null: unknown."""

    device: str
    matmul_tflops: Annotated[float, Field(gt=0)]
    sampling_fraction: Shares = None
    training_fraction: Shares = None
    source: str
    cluster: Cluster | None = None
    """How such devices are joined."""


@dataclass(frozen=True)
class Work:
    """A run of `pairs` on `gpus`: FLOPs of a pair for sampling and training, and the batch sizes of both."""

    pairs: int
    gpus: int
    sampling: float
    training: float
    sampler_batch: int
    micro: int


def load_rates(path: str | None) -> list[Rate]:
    """The shipped rates; before them the one in `path`, a result of `python -m benchmarks.throughput`."""
    shipped = [Rate(device=device, **rate) for device, rate in json.loads(SHIPPED.read_text()).items()]
    if path is None:
        return shipped
    try:
        raw = parse_json(read_text(Path(path)))
    except (UserError, ValueError) as error:
        raise UserError(f"--rates {path}: cannot be read: {error}") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("rates"), dict):
        raise UserError(f'--rates {path}: no section "rates" in it; such files are written by `python -m benchmarks.throughput`')
    try:
        own = Rate.model_validate(raw["rates"])
    except ValidationError as error:
        raise UserError("\n  ".join([f"--rates {path}:", *explain_all(error, Rate, "rates")])) from None
    replaced = [rate for rate in shipped if own.device.startswith(rate.device)]
    if own.cluster is None and replaced:
        own = own.model_copy(update={"cluster": replaced[0].cluster})
    return [own, *(rate for rate in shipped if rate not in replaced)]


def fraction(shares: Shares, batch: int) -> float:
    """The share at a batch size: interpolated between the nearest ones, and beyond the first and the last the same as there."""
    if not isinstance(shares, list):
        return shares
    points = sorted(shares)
    for (low, before), (high, after) in pairwise(points):
        if low <= batch <= high:
            return before + (after - before) * (batch - low) / (high - low)
    return points[0][1] if batch < points[0][0] else points[-1][1]


def hours(rate: Rate, work: Work) -> tuple[float, float]:
    """Hours of sampling and of training; training takes sampling's fraction where its own is not known."""
    each = work.pairs / work.gpus / (rate.matmul_tflops * 1e12) / 3600
    learned = fraction(rate.training_fraction or rate.sampling_fraction, work.micro)
    return each * work.sampling / fraction(rate.sampling_fraction, work.sampler_batch), each * work.training / learned


def work_of(config: Config, batch: Batch, cost: Cost, held_out: int = 0) -> Work:
    """The work of a run, as configured. The reference scores pairs in training, or where its samples are made.

    The cost of measuring on `held_out` demonstrations is spread over the pairs.
    """
    ours = config.seppo
    size = BATCHES[-1] if ours.sampler.batch_size == "auto" else ours.sampler.batch_size
    work = Work(pairs=ours.updates * batch.size, gpus=batch.world, sampling=cost.sampling,
                training=cost.training + cost.scoring, sampler_batch=size, micro=batch.micro)
    if held_out:
        once, each = held_out_flops(config, cost, held_out)
        evaluations = 1 + ours.updates // ours.evaluation.every
        work = replace(work, sampling=work.sampling + once / work.pairs, training=work.training + evaluations * each / work.pairs)
    return rollout(work, cost) if ours.reference_score == "rollout" else work


def held_out_flops(config: Config, cost: Cost, count: int) -> tuple[float, float]:
    """FLOPs of the initial model's samples for `count` held-out demonstrations, made once, and of one evaluation of a policy."""
    halves = 2 if config.seppo.flipper else 1
    return count * cost.sample, count * DRAWS * halves * cost.forward


def rollout(work: Work, cost: Cost) -> Work:
    """The same work with the reference's scores computed in the sampler's batches."""
    return replace(work, sampling=work.sampling + cost.scoring, training=work.training - cost.scoring)


def time_plan(config: Config, batch: Batch, cost: Cost, model: Model, rates: Sequence[Rate], here: str = "", held_out: int = 0
              ) -> str:
    """Hours on every known device, and how other settings change them: on `here` if its rate is known, else on the first device."""
    work, known, filled = work_of(config, batch, cost, held_out), known_rate(rates), whole(rates)
    lines = [f"time for {work.pairs} pairs = {config.seppo.iterations} iterations x {work.pairs // config.seppo.iterations} on"
             f" {work.gpus} GPU{'s' * (work.gpus > 1)}, by FLOPs alone: no communication, data, checkpoints, warm-up"]
    for rate, complete in zip(rates, filled, strict=True):
        sampling, training = hours(complete, work)
        shares = [fraction(complete.sampling_fraction, work.sampler_batch),
                  fraction(complete.training_fraction or complete.sampling_fraction, work.micro)]
        assumed = "" if rate.sampling_fraction is not None else f", assumed: that of {known.device}"
        sampled = f" sampling {shares[0]:.0%} of it ({work.sampler_batch} at a time{assumed});" if work.sampling else ""
        trained = "" if rate.training_fraction is not None else ", assumed: sampling's at this batch"
        lines += [
            f"  {rate.device}{' (this machine)' * _is(rate, here)}: {duration(sampling + training)} = {duration(sampling)}"
            f" sampling + {duration(training)} training",
            f"    {rate.matmul_tflops:g} TFLOP/s;{sampled} training {shares[1]:.0%} of it ({work.micro}"
            f" pair{'s' * (work.micro > 1)} at a time{trained})",
            f"    {rate.source}",
        ]
    return "\n".join([*lines, *_changes(config, cost, model, work, planned_with(rates, here))])


def known_rate(rates: Sequence[Rate]) -> Rate:
    """A rate whose sampling is known, for those of which it is not: a shipped one, for own rates come first."""
    return next(rate for rate in reversed(rates) if rate.sampling_fraction is not None)


def whole(rates: Sequence[Rate]) -> list[Rate]:
    """The rates, with a share of sampling where it is not known."""
    share = known_rate(rates).sampling_fraction
    return [rate if rate.sampling_fraction is not None else rate.model_copy(update={"sampling_fraction": share}) for rate in rates]


def planned_with(rates: Sequence[Rate], here: str) -> Rate:
    """The rate of other settings' hours, without gaps: that of `here` if it is known, else the first one."""
    filled = whole(rates)
    return next((rate for rate in filled if _is(rate, here)), filled[0])


def duration(hours: float) -> str:
    """A time in its usual unit."""
    if hours >= 2 * YEAR:
        return f"{hours / YEAR:,.0f} years"
    if hours >= 48:
        return f"{hours / 24:.3g} days"
    unit, size = next(((name, size) for name, size in UNITS.items() if hours >= size), (None, 1.0))
    return f"{hours / size:.3g} {unit}" if unit else "less than a second" if hours else "0 seconds"


def calls_with(settings: Sampler, model: Model, latents: Sequence[int]) -> int:
    """How often the network is evaluated for one sample that is drawn so."""
    _, guidance = guided(model, settings.guidance_scale, ())
    return evaluations(calls_of(rollout_table(model, settings, latents).levels, len(guidance), settings), guidance)


def _is(rate: Rate, here: str) -> bool:
    return here.startswith(rate.device)


def _changes(config: Config, cost: Cost, model: Model, work: Work, rate: Rate) -> list[str]:
    """A table of total hours: a row for each setting that can be changed, a column for each number of GPUs."""
    ours = config.seppo
    rows = {"as configured": work}
    if METHODS[ours.method].draws:
        latents = latent_shape(model, ours.data)
        calls = calls_with(ours.sampler, model, latents)
        better = "unipc" if is_flow(model.scheduler_config) else "pndm"
        for solver, steps in [(ours.sampler.solver, steps) for steps in STEPS] + [(better, STEPS[0])]:
            if steps > model.num_train_timesteps:
                continue
            if (solver, steps) == (ours.sampler.solver, ours.sampler.steps) or ours.sampler.adapter is not None:
                continue
            try:
                other = calls_with(ours.sampler.model_copy(update={"solver": solver, "steps": steps}), model, latents)
            except UserError:  # it cannot do so few steps, or none of them lies in the guidance's interval
                continue
            saved = cost.sampling * (1 - other / calls)
            rows[f"{solver}, {steps} steps ({other} evaluations)"] = replace(work, sampling=work.sampling - saved)
        for size in BATCHES:
            if size != work.sampler_batch:
                rows[f"{size} sampled at a time"] = replace(work, sampler_batch=size)
    if METHODS[ours.method].draws and ours.reference_score == "online" and ours.may_score_rollouts:
        rows["reference_score rollout"] = rollout(work, cost)
    width = max(len(name) for name in rows)
    times = {name: [sum(hours(rate, replace(row, gpus=gpus))) for gpus in GPUS] for name, row in rows.items()}
    longest = max(max(row) for row in times.values())
    unit, size = next(((name, size) for name, size in UNITS.items() if longest >= size), ("seconds", UNITS["seconds"]))
    title = f"{unit} on {rate.device} with"
    start = max(width + 2, len(title))
    table = [f"{title:<{start}}" + "".join(f"{f'{gpus} GPU' + 's' * (gpus > 1):>9}" for gpus in GPUS)]
    for name, row in times.items():
        figures = "".join(f"{f'{value / size:.3g}' if value / size >= SHOWN else f'<{SHOWN}':>9}" for value in row)
        table.append(f"{f'  {name}':<{start}}{figures}")
    return table
