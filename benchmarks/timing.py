"""How calls are timed and their memory counted, on the CPU and on a GPU."""

import itertools
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

Calls = dict[str, Callable[[int], object]]


def waiter(device: str) -> Callable[[], object]:
    """A function that returns when the device has finished its work."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def first_calls(calls: Calls, device: str = "cpu") -> dict[str, float]:
    """Seconds of the first call of each function, compilation included."""
    seconds, wait = {}, waiter(device)
    for name, call in calls.items():
        start = time.perf_counter()
        call(0)
        wait()
        seconds[name] = round(time.perf_counter() - start, 3)
    return seconds


def in_turn(calls: Calls, seconds: float, *, block: int = 3, together: int = 1, least: int = 4,
            device: str = "cpu") -> dict[str, list[float]]:
    """Microseconds of a call. In each turn every function gives `block` figures; a figure is the mean of `together` calls.

    The order changes from turn to turn, because the function before decides which pages are mapped and what the caches hold.
    A call's argument is the number of all calls before it, so that a buffer chosen by it is used again only after all others.
    The first call of a block is not counted: it pays for code and threads that the function before left cold. The first turn
    is not counted either.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, names, index, wait = random.Random(0), list(calls), itertools.count(), waiter(device)
    turn, until = -1, 0.0
    while turn < least or time.perf_counter() < until:
        order.shuffle(names)
        for name in names:
            call = calls[name]
            call(next(index))
            for _ in range(block):
                wait()
                start = time.perf_counter()
                for _ in range(together):
                    call(next(index))
                wait()
                times[name].append(1e6 * (time.perf_counter() - start) / together)
        turn += 1
        if turn == 0:
            times = {name: [] for name in calls}
            until = time.perf_counter() + seconds
    return times


def alternated(calls: dict[str, Callable[[], object]], seconds: float, device: str = "cpu",
               least: int = 2) -> dict[str, list[float]]:
    """Seconds of calls, one of each in turn, at least `least` of each. For calls so long that the one before does not matter."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    until, wait = time.perf_counter() + seconds, waiter(device)
    while calls and (len(times[next(iter(calls))]) < least or time.perf_counter() < until):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            wait()
            times[name].append(time.perf_counter() - start)
    return times


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """The most that `call` holds at one time, beyond what was allocated before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    return max(itertools.accumulate((event["args"]["Bytes"] for event in events), initial=0))


def last_level_cache(device: str) -> int:
    """Bytes of the last cache: what may still be there when a buffer is used again."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes), default=64 << 20)


def free_memory(device: str) -> int:
    """Bytes that are free."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
