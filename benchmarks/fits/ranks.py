"""Whether the plan for more ranks is right: `python -m benchmarks.fits.ranks --out benchmarks/results`.

The quickstart's training on the CPU with one and with two ranks in turn, a thread each; the rate of gloo's all-reduce of its
gradients' bytes over loopback; and how much slower the network is in each of two processes at once, which send nothing: on a CPU
they share more than GPUs do. From one rank's times, this rate and this slowdown (the plan's stragglers) the plan predicts how much
faster two ranks are. Writes ranks_cpu.json; ten minutes on 2 cores that have nothing else to do.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks import ROOT
from benchmarks.jobs import finish, fresh
from benchmarks.result_files import Row, about, one_row_a_line
from seppo_fast.configfile import Config, batch_plan, load_config
from seppo_fast.models import Model, open_model
from seppo_fast.planning.communication import Cluster, gradient_bytes
from seppo_fast.planning.cost import Cost, estimate
from seppo_fast.planning.gpus import fit, hours_of
from seppo_fast.planning.time_plan import Rate, hours, work_of

WARM_UP = 2  # updates of each run that are not counted
STRAGGLERS = 0.05  # as in rates.json
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
COUNT = {1: {}, 2: {"train_micro_batch_size_per_gpu": 32}}  # ranks -> the changes with which the quickstart's 64 pairs are shared


def make_inputs(work: Path) -> None:
    """The quickstart's model, hardly trained, and its demonstrations."""
    from seppo_fast.quickstart.base import Recipe, make_base
    from seppo_fast.quickstart.demonstrations import write_demonstrations
    from seppo_fast.quickstart.digits import split_digits

    make_base(work / "base", Recipe(copies=1, vae_steps=60, text_steps=20, denoiser_steps=20))
    write_demonstrations(work / "demonstrations", split_digits(0)[0])


def overrides(work: Path, ranks: int, updates: int) -> list[str]:
    """The quickstart's configuration, for one iteration of so many updates without checkpoints between."""
    changes = {"seppo.model.path": work / "base", "seppo.data.source": work / "demonstrations",
               "seppo.data.cache_dir": work / "cache", "seppo.output_dir": work / "run", "seppo.iterations": 1,
               "seppo.updates_per_iteration": WARM_UP + updates, "seppo.checkpoint.every": 10**6, **COUNT[ranks]}
    return [f"{key}={value}" for key, value in changes.items()]


def trained(work: Path, ranks: int, updates: int) -> list[Row]:
    """The rows of metrics.jsonl of a run, without those of its first updates."""
    fresh(work / "run")
    log = work / f"ranks_{ranks}.log"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "seppo_fast/train.py",
               "--config", "quickstart.json", "--set", *overrides(work, ranks, updates)]
    finish(subprocess.Popen(command, cwd=ROOT, stdout=log.open("w"), stderr=subprocess.STDOUT, env=os.environ | ONE_THREAD), log)
    return [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()][WARM_UP:]


# On each rank: the median seconds of an all-reduce of so many bytes.
ALL_REDUCE = """
import statistics, sys, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
values, seconds = torch.ones(int(sys.argv[1]) // 4), []
for _ in range(24):
    dist.barrier()
    start = time.perf_counter()
    dist.all_reduce(values)
    seconds.append(time.perf_counter() - start)
print(f"seconds {statistics.median(seconds[3:])}\\n", end="")  # in one write: the other rank writes, too
dist.destroy_process_group()
"""
# On each rank: the mean seconds of the network's forward and backward on 32 samples, while all ranks do this and send nothing.
COMPUTE = """
import sys, time, torch, torch.distributed as dist
from diffusers import UNet2DConditionModel
dist.init_process_group("gloo")
torch.manual_seed(0)
unet = UNet2DConditionModel.from_pretrained(sys.argv[1], subfolder="unet").train()
noisy, text = torch.randn(32, 4, 8, 8), torch.randn(32, 77, unet.config.cross_attention_dim)
for turn in range(2 + 12):
    if turn == 2:
        dist.barrier()
        start = time.perf_counter()
    unet(noisy, torch.full((32,), 500), text).sample.square().mean().backward()
print(f"seconds {(time.perf_counter() - start) / 12}\\n", end="")
dist.barrier()
dist.destroy_process_group()
"""


def slowest(program: str, ranks: int, argument: str) -> float:
    """The most seconds that one of the ranks of a program says."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "program.py"
        script.write_text(program)
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command = [sys.executable, "-m", *launcher, str(script), argument]
        run = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | ONE_THREAD)
    found = [float(seconds) for seconds in re.findall(r"seconds ([0-9.e+-]+)", run.stdout)]
    if run.returncode or len(found) != ranks:
        raise RuntimeError(f"{command[1:]} ended with status {run.returncode}:\n{run.stderr[-2000:]}")
    return max(found)


def link_rate(size: int) -> float:
    """GB/s that each of two ranks sends, one way, in an all-reduce of `size` bytes: as many as it has."""
    return size / slowest(ALL_REDUCE, 2, str(size)) / 1e9


def in_each_others_way(base: Path, turns: int) -> float:
    """How much longer two processes compute at once than one: they share the processor's caches, memory and perhaps cores."""
    found: dict[int, list[float]] = {ranks: [] for ranks in COUNT}
    for _ in range(turns):
        for ranks, seconds in found.items():
            seconds.append(slowest(COMPUTE, ranks, str(base)))
    one, two = map(statistics.median, found.values())
    return max(0.0, two / one - 1)


def summary(rows: Sequence[Row], ranks: int) -> Row:
    """The median of the seconds of an update, and of its sampling and training."""
    own = [row for row in rows if row["ranks"] == ranks]
    return {"ranks": ranks, **{name: round(statistics.median(row[name] for row in own), 4)
                               for name in ("seconds", "sampling", "training")}}


def predicted(config: Config, model: Model, one: Row, link: float, stragglers: float) -> float:
    """How many times as fast two ranks are as one, by the plan: from one rank's rates of sampling and training, and the link's."""
    updates = config.seppo.updates
    cluster = Cluster(gpus_per_node=2, link_gb_s=link, network_gb_s=link, reached=1.0, stragglers=stragglers, source="measured")
    costs = {ranks: cost_of(config, model, ranks) for ranks in COUNT}
    rate = measured_rate(config, costs[1], one)
    times = {ranks: hours_of(config, fit(config, ranks), cost, rate, cluster, written=0).all for ranks, cost in costs.items()}
    assert abs(times[1] * 3600 / updates - one["sampling"] - one["training"]) < 1e-6
    return times[1] / times[2]


def cost_of(config: Config, model: Model, ranks: int) -> Cost:
    """The cost of a rank's share."""
    batch = fit(config, ranks).batch
    assert batch is not None
    return estimate(model, config, batch)


def measured_rate(config: Config, cost: Cost, one: Row) -> Rate:
    """The rate at which one rank's sampling and training take the measured seconds; at all batch sizes."""
    work = work_of(config, batch_plan(config.deepspeed, 1), cost)
    plain = Rate(device="one rank", matmul_tflops=1.0, sampling_fraction=1.0, training_fraction=1.0, source="measured")
    sampling, training = (value * 3600 / config.seppo.updates for value in hours(plain, work))
    shares = {"sampling": sampling / one["sampling"], "training": training / one["training"]}  # of 1 TFLOP/s
    fastest = max(shares.values())
    return Rate(device="one rank", matmul_tflops=fastest, sampling_fraction=shares["sampling"] / fastest,
                training_fraction=shares["training"] / fastest, source="measured")


@contextmanager
def folder_of(given: Path | None) -> Iterator[Path]:
    """The folder for model and runs."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, predict, and write the result after each round."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fits.ranks", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the folder for ranks_cpu.json")
    parser.add_argument("--work", type=Path, help="a folder for model and runs; a temporary one by default")
    parser.add_argument("--updates", type=int, default=12, help="measured updates of a run")
    parser.add_argument("--rounds", type=int, default=3, help="runs with each number of ranks")
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    start = about("cpu", "diffusers", "deepspeed")
    with folder_of(given.work) as work:
        make_inputs(work)
        config = load_config("quickstart.json", overrides(work, 1, given.updates))
        model = open_model(config.seppo.model.path)
        batch = batch_plan(config.deepspeed, 1)
        size = estimate(model, config, batch).trained * gradient_bytes(config, batch)
        rows: list[Row] = []
        for turn in range(given.rounds):
            for ranks in COUNT:
                began = time.perf_counter()
                rows += [{"round": turn, "ranks": ranks, "update": row["update"], "seconds": row["seconds"],
                          "sampling": row["seconds_sampling"], "training": row["seconds_training"]}
                         for row in trained(work, ranks, given.updates)]
                print(summary(rows, ranks) | {"round": turn, "run": round(time.perf_counter() - began)}, flush=True)
            one, two = (summary(rows, ranks) for ranks in COUNT)
            link, slower = link_rate(size), in_each_others_way(work / "base", given.rounds)
            plan, as_assumed = (predicted(config, model, one, link, stragglers) for stragglers in (slower, STRAGGLERS))
            measured = one["seconds"] / two["seconds"]
            figures = {"link_gb_s": round(link, 4), "slower_at_once": round(slower, 4), "measured": round(measured, 4),
                       "predicted": round(plan, 4), "apart": round(plan / measured - 1, 4),
                       "predicted_with_assumed_stragglers": round(as_assumed, 4)}
            print(figures, flush=True)
            result = start | {"updates": given.updates, "rounds": turn + 1, "gradient_bytes": size} | figures
            (given.out / "ranks_cpu.json").write_text(one_row_a_line(result | {"ranks": [one, two], "rows": rows}))


if __name__ == "__main__":
    main()
