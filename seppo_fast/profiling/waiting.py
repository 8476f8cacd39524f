"""How long a GPU waits for the host: the time in which it runs something, of a phase's time."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from seppo_fast.configfile import Batch

LAUNCHES = ("cudaLaunch", "cudaGraphLaunch", "cuLaunch")  # the profiler's names of a launch by the host begin so
LARGE = 0.3  # an idle share that is worth a word


class Activity(NamedTuple):
    """`busy` seconds in which the GPU ran kernels or copies, and how often the host launched a kernel or a graph of them."""

    busy: float
    launches: float


def activity(events: Sequence[FunctionEvent], phases: Iterable[str]) -> dict[str, Activity]:
    """What the GPU did in each phase of a profile that has these phases as annotations; phases that it lacks are left out.

    A phase may come several times. It ends when the GPU has finished its work.
    """
    found = {}
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    launched = [event.time_range.start for event in on_host if event.name.startswith(LAUNCHES)]
    # On the GPU an annotation comes again, over the kernels below it.
    kernels = [_span(event) for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    for phase in phases:
        windows = [_span(event) for event in on_host if event.name == phase and event.is_user_annotation]
        if windows:
            found[phase] = Activity(sum(covered(kernels, *window) for window in windows) / 1e6,
                                    sum(start <= time < end for time in launched for start, end in windows))
    return found


def covered(spans: Iterable[tuple[float, float]], start: float, end: float) -> float:
    """How much of the time from `start` to `end` lies in at least one of `spans`; streams overlap."""
    total, reached = 0.0, start
    for begin, until in sorted(spans):
        total += max(0.0, min(until, end) - max(begin, reached))
        reached = max(reached, min(until, end))
    return total


def idle_shares(seconds: Mapping[str, float], busy: Mapping[str, float]) -> dict[str, float]:
    """By phase, the share of its `seconds` without the profiler in which the GPU, `busy` for so many of them, had nothing to do."""
    return {phase: max(0.0, 1 - busy[phase] / seconds[phase]) for phase in busy if seconds.get(phase)}


def waiting(found: Mapping[str, Any], batch: Batch, steps: int) -> tuple[dict[str, float], str]:
    """The idle share of each phase of this rank's updates, and a table of them.

    `found` has the seconds of an update, and what the GPU did in one batch of samples and in one micro-batch.
    """
    done: dict[str, Activity] = found["activity"]
    times = dict.fromkeys(done, float(batch.accumulation)) | {"optimizer step": 1.0}
    launches, units = {name: each.launches for name, each in done.items()}, dict.fromkeys(done, "a micro-batch")
    units["optimizer step"] = "an update"
    if "sampling" in done:
        times["sampling"] = batch.size / batch.world / found["sampling"][1]
        launches["sampling"], units["sampling"] = launches["sampling"] / steps, "a step"
    idle = idle_shares(found["seconds"], {name: each.busy * times[name] for name, each in done.items()})
    return idle, waiting_table(idle, launches, units)


def waiting_table(idle: Mapping[str, float], launches: Mapping[str, float], units: Mapping[str, str]) -> str:
    """Idle share and launches of each phase; `units` says of what a phase's launches are."""
    lines = ["how long the GPU waits for the host: of each phase's time, what the profiler saw no kernel or copy in"]
    lines += [f"  {phase:<22}{share:6.1%} {launches[phase]:10.0f} launches {units[phase]}" for phase, share in idle.items()]
    return "\n".join(lines)


def waits(idle: Mapping[str, float], seconds: Mapping[str, float], *phases: str) -> str:
    """", and the GPU waits for the host in x% of it", where that is a large share of these phases together; else nothing."""
    spent = sum(seconds[phase] for phase in phases if phase in idle)
    share = sum(idle[phase] * seconds[phase] for phase in phases if phase in idle) / spent if spent else 0.0
    return f", and the GPU waits for the host in {share:.0%} of it" if share > LARGE else ""


def _span(event: FunctionEvent) -> tuple[float, float]:
    return event.time_range.start, event.time_range.end
