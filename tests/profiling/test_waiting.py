"""How long a GPU waits for the host, from the events of a profile."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent
from torch.profiler import record_function

from seppo_fast.configfile import batch_plan, parse_config
from seppo_fast.profiling.profiled import new_profiler, profile
from seppo_fast.profiling.report import Operator, advice, operators
from seppo_fast.profiling.waiting import Activity, activity, covered, idle_shares, waiting
from seppo_fast.signals import StopSignals


def event(name: str, start: float, end: float, gpu: bool = False, stream: int = 7, annotation: bool = False) -> FunctionEvent:
    """An event as the profiler makes it; a host's thread, or a GPU's stream."""
    return FunctionEvent(id=1, name=name, thread=1, start_us=start, end_us=end, use_device="cuda", is_user_annotation=annotation,
                         device_type=DeviceType.CUDA if gpu else DeviceType.CPU, device_resource_id=stream if gpu else 1, stack=[])


# Two micro-batches' forward, 100 us each, and a step. On a GPU annotations come a second time, over the kernels below them.
EVENTS = [
    event("policy forward", 0, 100, annotation=True), event("policy forward", 10, 95, gpu=True, annotation=True),
    event("aten::mm", 1, 20), event("cudaLaunchKernel", 5, 8), event("ampere_sgemm_128x64", 10, 30, gpu=True),
    event("cudaLaunchKernelExC", 12, 14), event("ncclDevKernel_AllReduce", 20, 40, gpu=True, stream=9),
    event("cudaMemcpyAsync", 50, 52), event("Memcpy HtoD (Pinned -> Device)", 60, 70, gpu=True),
    event("cudaStreamSynchronize", 80, 100),
    event("policy forward", 200, 300, annotation=True), event("cuLaunchKernelEx", 201, 203),
    event("triton_poi_fused_0", 210, 290, gpu=True),
    event("optimizer step", 300, 320, annotation=True), event("cudaGraphLaunch", 301, 302), event("adam", 303, 319, gpu=True),
    event("Optimizer.step#AdamW.step", 300, 320, gpu=True, annotation=True),
]


def test_kernels_of_all_streams_are_counted_once_and_annotations_never() -> None:
    found = activity(EVENTS, ("policy forward", "backward", "optimizer step"))
    assert found.keys() == {"policy forward", "optimizer step"}
    assert found["policy forward"] == (pytest.approx((30 + 10 + 80) / 1e6), 3)
    assert found["optimizer step"] == (pytest.approx(16e-6), 1)


@pytest.mark.parametrize(("spans", "time"), [([], 0), ([(0, 10)], 10), ([(2, 4), (3, 5), (3, 4)], 3), ([(8, 12), (-3, 1)], 3),
                                             ([(12, 15), (-5, -1)], 0), ([(5, 5)], 0)])
def test_the_time_that_spans_cover(spans: list[tuple[float, float]], time: float) -> None:
    assert covered(spans, 0, 10) == time


def test_the_idle_share_is_of_the_time_without_the_profiler() -> None:
    assert idle_shares({"backward": 2.0, "data": 1.0}, {"backward": 0.5}) == {"backward": 0.75}
    assert idle_shares({"backward": 2.0}, {"backward": 2.1}) == {"backward": 0.0}, "two clocks"
    assert idle_shares({"backward": 0.0}, {"backward": 0.0}) == {}, "a phase that took no time was never idle"


def test_one_batch_and_one_micro_batch_stand_for_an_update(settings: Callable[..., dict[str, Any]]) -> None:
    """8 pairs of an update: drawn in two batches of 4, trained on in two micro-batches, of which the last has the step."""
    found = {"seconds": {"sampling": 2.0, "policy forward": 0.4, "backward": 0.8, "optimizer step": 0.1, "data": 0.1},
             "sampling": ([], 4), "activity": {"sampling": Activity(0.9, 60), "policy forward": Activity(0.1, 400),
                                               "backward": Activity(0.1, 800), "optimizer step": Activity(0.1, 30)}}
    config = parse_config(settings())
    batch = batch_plan(config.deepspeed, 1)
    idle, table = waiting(found, batch, steps=3)
    assert idle == pytest.approx({"sampling": 0.1, "policy forward": 0.5, "backward": 0.75, "optimizer step": 0.0})
    for line in ("sampling               10.0%         20 launches a step",
                 "backward               75.0%        800 launches a micro-batch",
                 "optimizer step          0.0%         30 launches an update"):
        assert f"\n  {line}" in table
    notes = "\n".join(advice(found["seconds"], config, batch, True, idle=idle))
    assert "forward and backward are 35%, and the GPU waits for the host in 67% of it: seppo.model.compile=full" in notes
    assert "in 67% of it: micro-batches of 4, 2 accumulated; a larger train_micro_batch_size_per_gpu" in notes
    assert "sampling is 59%: " in notes and "waits" not in notes.split("sampling is")[1].split("\n")[0]
    third = parse_config(settings(zero_optimization={"stage": 3}))
    assert "compile=full" not in "\n".join(advice(found["seconds"], third, batch, True, idle=idle)), "which it refuses"
    slow = "\n".join(advice(found["seconds"], config, batch, True, idle=idle | {"sampling": 0.6}))
    assert "sampling is 59%, and the GPU waits for the host in 60% of it: seppo.sampler." in slow


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@gpu
def test_a_run_says_how_long_its_gpu_waits(settings: Callable[..., dict[str, Any]], ranks: Any, train: Any) -> None:
    """Tiny networks are all launches."""
    text = profile(parse_config(settings()), ranks, StopSignals(), updates=1)
    shares = {line.split("%")[0].rsplit(None, 1)[0].strip(): float(line.split("%")[0].split()[-1])
              for line in text.split("how long the GPU waits")[1].split("\n\n")[0].splitlines()[1:]}
    assert shares.keys() == {"sampling", "policy forward", "reference scoring", "backward", "optimizer step"}
    assert all(0 <= share <= 100 for share in shares.values()) and shares["backward"] > 30
    assert ", and the GPU waits for the host in " in text


@gpu
def test_a_real_profile_tells_waiting_from_work() -> None:
    """A large product keeps the GPU busy; many small ones do not."""
    large, small = torch.randn(8192, 8192, device="cuda"), torch.randn(8, 8, device="cuda")
    large @ large
    torch.cuda.synchronize()
    with new_profiler() as profiler:
        for name, matrix, times in (("work", large, 3), ("waiting", small, 500)):
            with record_function(name):
                for _ in range(times):
                    matrix @ matrix
                torch.cuda.synchronize()
    found = activity(profiler.events(), ("work", "waiting"))
    assert found["work"].launches >= 3 and found["waiting"].launches >= 500
    spent = {each.name: each.time_range.elapsed_us() / 1e6 for each in profiler.events()
             if each.name in found and each.device_type == DeviceType.CPU}
    idle = idle_shares(spent, {name: each.busy for name, each in found.items()})
    assert idle["work"] < 0.2 < 0.5 < idle["waiting"]
    assert not {"work", "waiting"} & {each.name for each in operators(profiler, "cuda")}, "an annotation is no kernel"


def test_an_annotation_is_no_kernel() -> None:
    """DeepSpeed and PyTorch's optimizers annotate, too; on a GPU each comes again over the kernels below it."""
    events = EventList(EVENTS, use_device="cuda")
    events._build_tree()  # as a profile does it
    found: list[Operator] = operators(events, "cuda")  # type: ignore[arg-type]  # what is asked of a profile is there
    assert {each.name for each in found} == {"ampere_sgemm_128x64", "ncclDevKernel_AllReduce", "triton_poi_fused_0", "adam",
                                             "Memcpy HtoD (Pinned -> Device)"}
