"""What PyTorch's allocator on the CPU really gives out, to which the plan is held."""

import gc
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

CLOSE = 0.15


def allocated(run: Callable[[], object]) -> int:
    """The most bytes that the CPU's allocator has given out at once during `run`, beyond those before it."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
