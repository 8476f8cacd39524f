"""The report of a measured run: where a second goes, which operators take it, and what to turn on."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch.autograd import DeviceType

from seppo_fast.configfile import Batch, Config
from seppo_fast.profiling.waiting import waits

PHASES = ("sampling", "data", "policy forward", "reference scoring", "backward", "optimizer step", "loss and bookkeeping", "other")
COMMUNICATION = ("gloo:", "nccl", "c10d::")  # the profiler's names of collectives begin so


class Operator(NamedTuple):
    """An operator, or on a GPU a kernel: its own time, without the operators that it calls."""

    name: str
    calls: int
    seconds: float


def operators(profile: torch.profiler.profile, device: torch.device | str) -> list[Operator]:
    """What ran on the device (on a GPU: kernels and copies), the longest first."""
    events = profile.key_averages()
    if torch.device(device).type == "cuda":
        found = [Operator(event.key, event.count, event.self_device_time_total / 1e6) for event in events
                 if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    else:
        # Work on another thread, such as gloo's collectives, has no time of its own in this one.
        found = [Operator(event.key, event.count, (event.cpu_time_total if event.is_async else event.self_cpu_time_total) / 1e6)
                 for event in events]
    return sorted(found, key=lambda operator: -operator.seconds)


def operator_table(found: list[Operator], title: str, rows: int = 15) -> str:
    """The first `rows` operators with calls, milliseconds and share of the total."""
    total = sum(operator.seconds for operator in found) or 1.0
    lines = [f"{title}: {1e3 * total:.1f} ms in {sum(operator.calls for operator in found)} calls",
             f"  {'share':>6} {'ms':>10} {'calls':>7}  operator"]
    lines += [f"  {seconds / total:6.1%} {1e3 * seconds:10.2f} {calls:7d}  {name[:90]}" for name, calls, seconds in found[:rows]]
    return "\n".join(lines)


def communication(found: list[Operator]) -> float:
    """Seconds that the profiler saw in collectives; on a GPU they may overlap with the backward."""
    return sum(operator.seconds for operator in found if operator.name.lower().startswith(COMMUNICATION))


def phase_table(seconds: Mapping[str, float], batch: Batch, updates: int, slowest_sampling: float) -> str:
    """`seconds` of an update by phase, means over ranks; `slowest_sampling`: by what share the slowest rank exceeds the mean."""
    update = sum(seconds.values())
    lines = [f"where a second goes: mean of {updates} updates of {batch.size} pairs on {batch.world}"
             f" rank{'s' * (batch.world > 1)}, {update:.3g} s each, {batch.size / update:.4g} pairs/s (with a wait for the device"
             " after each phase, which training itself does not do)"]
    lines += [f"  {name:<22}{seconds[name] / update:6.1%} {seconds[name]:10.3f} s an update" for name in PHASES if name in seconds]
    if batch.world > 1:
        lines.append(f"  the slowest rank samples {slowest_sampling:.0%} longer than the mean; the others wait for it")
    return "\n".join(lines)


def advice(seconds: Mapping[str, float], config: Config, batch: Batch, cuda: bool, in_collectives: float = 0.0,
           idle: Mapping[str, float] | None = None) -> list[str]:
    """What could make this configuration faster, by the time of its phases; `in_collectives` is a share of an update, `idle` those
    of phases in which a GPU had nothing to do."""
    ours, sampler = config.seppo, config.seppo.sampler
    total = sum(seconds.values())
    share = {name: seconds.get(name, 0.0) / total for name in PHASES}
    policy = share["policy forward"] + share["backward"]
    zero = config.deepspeed.get("zero_optimization", {})
    stage = int(zero.get("stage", 0))
    notes = []

    waiting = {name: waits(idle or {}, seconds, *names)
               for name, names in (("sampling", ["sampling"]), ("policy", ["policy forward", "backward"]))}
    if share["sampling"] > 0.3:
        begin = f"sampling is {share['sampling']:.0%}{waiting['sampling']}: "
        if cuda and not sampler.cuda_graph:
            notes.append(begin + "seppo.sampler.cuda_graph is off; turn it on (the same samples, fewer launches)")
        if sampler.compile == "none":
            notes.append(begin + "seppo.sampler.compile=regional fuses what lies between the convolutions and products (rounding"
                        " differs, compilation comes first)")
        elif not sampler.fuse_projections and not ours.model.lora and ours.model.attention != "xformers":
            notes.append(begin + "seppo.sampler.fuse_projections=true makes three products of attention one")
        share_of_rank = batch.size // batch.world
        if sampler.batch_size != "auto" and sampler.batch_size < min(16, share_of_rank):
            notes.append(begin + f"batches of {sampler.batch_size} where a rank has {share_of_rank} samples an update to make;"
                        " seppo.sampler.batch_size=auto measures what pays")
        if sampler.solver != "dpmsolver++" and sampler.steps > 20:
            notes.append(begin + f"solver dpmsolver++ at 20 steps instead of {sampler.solver} at {sampler.steps} would cut it by"
                        f" {1 - 20 / sampler.steps:.0%} (changes the samples)")
    if share["data"] > 0.05:
        notes.append(f"data is {share['data']:.0%}: latents and embeddings are read from the cache; put seppo.data.cache_dir on a"
                    " local disk, or on one that is held in memory")
    if share["reference scoring"] > 0.05 and ours.reference_score == "online" and ours.may_score_rollouts:
        notes.append(f"reference scoring is {share['reference scoring']:.0%}: seppo.reference_score=rollout computes it in large"
                    " batches where the samples are made")
    if policy > 0.2:
        begin = f"the policy's forward and backward are {policy:.0%}{waiting['policy']}: "
        if ours.model.gradient_checkpointing:
            notes.append(begin + "seppo.model.gradient_checkpointing computes each forward twice; turn it off if memory allows")
        whole = stage < 3 and not ours.model.quantize and ours.reference_offload == "none"
        if cuda and waiting["policy"] and whole and ours.model.compile != "full":
            notes.append(begin + "seppo.model.compile=full has the fewest launches (holds for the reference too; compilation comes"
                        " first)")
        elif cuda and ours.model.compile == "none":
            notes.append(begin + "seppo.model.compile=regional (holds for the reference too)")
        if cuda and batch.accumulation > 1 and (batch.micro < 4 or waiting["policy"]):
            notes.append(begin + f"micro-batches of {batch.micro}, {batch.accumulation} accumulated; a larger"
                        " train_micro_batch_size_per_gpu fills the GPU better if memory allows")
    if cuda and not ours.model.channels_last and share["sampling"] + policy > 0.3:
        notes.append("seppo.model.channels_last=true is what convolutions in half precision are fastest with")
    if batch.world > 1 and stage >= 2 and batch.accumulation > 1:
        notes.append(f"ZeRO stage {stage} communicates in every one of {batch.accumulation} micro-batches (collectives:"
                    f" {in_collectives:.0%}); stage 1 does so once an update, if memory allows")
    elif batch.world > 1 and in_collectives > 0.1:
        notes.append(f"collectives are {in_collectives:.0%}: a larger train_batch_size has fewer of them a pair")
    if share["optimizer step"] > 0.15:
        offload = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
        notes.append(f"the optimizer step is {share['optimizer step']:.0%}: "
                    + ("zero_optimization.offload_optimizer moves it to the CPU; leave that out if memory allows" if offload else
                       "a larger train_batch_size has fewer of them a pair"))
    if share["other"] > 0.1:
        notes.append(f"other is {share['other']:.0%}: metrics, agreeing with other ranks and Python between the phases, once an"
                    " update; a larger train_batch_size has less of it a pair")
    return notes or ["nothing that this program could turn on stands out"]
