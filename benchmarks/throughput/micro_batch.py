"""A micro-batch of training, compiled or not: its time, and what the host launches for it.

Policy and reference are two networks of random weights in the real objective; DeepSpeed's step is left out. On the CPU the calls
are the operators that a profile counts; on a GPU they are its kernels, and how long it waits for the host is measured too.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch.profiler import record_function

from benchmarks.networks import conditions, denoise, latents, make_unet, schedule
from benchmarks.result_files import Keep, Row
from benchmarks.timing import alternated, waiter
from seppo_fast.compiler import keep_all_graphs, transformer_blocks
from seppo_fast.models.engines import same_with_gradients
from seppo_fast.models.layout import convolve_in_channels_last
from seppo_fast.profiling.profiled import new_profiler
from seppo_fast.profiling.report import operators
from seppo_fast.profiling.waiting import activity, idle_shares
from seppo_fast.training.noise import Diffusion
from seppo_fast.training.objective import Objective, Pairs
from seppo_fast.training.one_graph import with_whole_networks

WAYS = ("none", "regional", "full")
# Pairs a micro-batch. On the CPU one is enough to count operators, and compilation takes minutes.
CASES = {"cpu": ("quickstart", (1,)), "cuda": ("sd15", (1, 8))}


def measure(device: str, keep: Keep, seconds: float, repeats: float = 3.0, ways: Sequence[str] = WAYS) -> None:
    """Store a row for each size and way; none is begun after `seconds`."""
    until = time.perf_counter() + seconds
    network, sizes = CASES[device]
    rows: list[Row] = []
    with same_with_gradients():
        for micro in sizes:
            for way in ways:
                if time.perf_counter() < until:
                    rows.append({"network": network, "pairs": micro, "compile": way} | of_way(network, micro, way, device, repeats))
                    print(rows[-1], flush=True)
                    keep({"rows": rows})


def of_way(network: str, micro: int, way: str, device: str, repeats: float) -> Row:
    """Seconds of the first micro-batch (compilation) and of a later one, calls, and a GPU's idle share and launches."""
    torch.compiler.reset()
    step, wait = micro_batch(network, micro, way, device), waiter(device)
    start = time.perf_counter()
    step()
    wait()
    first = time.perf_counter() - start
    step()
    took = statistics.median(alternated({way: step}, repeats, device)[way])
    with new_profiler() as profiler, record_function("micro-batch"):
        step()
        wait()
    row: Row = {"first_s": round(first, 2), "ms": round(1e3 * took, 2),
                "calls": sum(each.calls for each in operators(profiler, device) if each.name != "micro-batch")}
    if device == "cuda":
        done = activity(profiler.events(), ["micro-batch"])
        row["launches"] = done["micro-batch"].launches
        row["idle"] = round(idle_shares({"micro-batch": took}, {"micro-batch": done["micro-batch"].busy})["micro-batch"], 4)
    return row


def micro_batch(network: str, micro: int, way: str, device: str) -> Callable[[], None]:
    """What runs forward and backward on a micro-batch of random pairs."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    policy, reference = (prepared(make_unet(network, device, dtype), way, device) for _ in range(2))
    process = Diffusion(DDPMScheduler(**{name: value for name, value in schedule(network).items()
                                         if name not in ("set_alpha_to_one", "steps_offset")}))
    objective = Objective(denoise, process, "aaf", dtype, compiled=way != "none")
    times = torch.full((micro,), 300, device=device)
    pairs = Pairs(latents(network, 2 * micro, device), latents(network, micro, device), times,
                  conditions(network, micro, device, dtype))
    if way == "full":
        objective = with_whole_networks(objective, policy, reference, pairs)

    def step() -> None:
        loss: Tensor = objective(policy, reference, pairs, 1.0, 2000.0)[0]
        loss.backward()
        policy.zero_grad()

    return step


def prepared(network: nn.Module, way: str, device: str) -> nn.Module:
    """The network as `prepare_denoisers` makes it for training."""
    if device == "cuda":
        convolve_in_channels_last(network)
    if way == "regional":
        keep_all_graphs()
        for block in transformer_blocks(network):
            block.compile()
    return network
