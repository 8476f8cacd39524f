"""Two ranks on two cores against one rank on one core: the same command, model, data, batch and micro-batch."""

import json
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace

from benchmarks import ROOT
from benchmarks.jobs import finish, fresh
from benchmarks.result_files import Keep, Row
from benchmarks.throughput.loop import Case, overrides
from seppo_fast.configfile import load_config
from seppo_fast.quickstart.steps import free_port


def measure(case: Case, keep: Keep) -> None:
    """Store the pairs per second of one and of two ranks, in turn, one thread a rank, and how many samples each rank drew."""
    case = replace(case, micro=case.batch // 2)
    rows: list[Row] = []
    for turn in range(case.rounds):
        for world in (1, 2):
            jobs = run_ranks(case, world)
            walls = [b - a for a, b in zip(jobs[0]["ended"], jobs[0]["ended"][1:], strict=False)][case.warm_up - 1:]
            rows.append({"ranks": world, "round": turn, "pairs_per_s": round(case.batch / statistics.median(walls), 3),
                         "updates": len(walls), "samples_a_rank": [sorted(set(job["samples"])) for job in jobs]})
            print(rows[-1], flush=True)
            keep(summary(rows))


def summary(rows: list[Row]) -> Row:
    """The ratio of the medians; `shared_evenly`: every rank drew the same number of samples in every update."""
    rates = {str(world): statistics.median(row["pairs_per_s"] for row in rows if row["ranks"] == world)
             for world in dict.fromkeys(row["ranks"] for row in rows)}
    ratio = {"two_over_one": round(rates["2"] / rates["1"], 2)} if "2" in rates else {}
    shares = [row["samples_a_rank"] for row in rows if row["ranks"] == 2]
    even = {"shared_evenly": all(len(set(map(tuple, share))) == 1 and len(share[0]) == 1 for share in shares)} if shares else {}
    return {"pairs_per_s": rates, **ratio, **even, "rows": rows}


def run_ranks(case: Case, world: int) -> list[Row]:
    """What each rank counted. One thread a rank, each rank on a core of its own."""
    out = fresh(case.work / "ranks")
    out.mkdir()
    config = out / "config.json"
    config.write_text(json.dumps(load_config(case.config, overrides(case, out / "run")).as_dict()))
    cores, log = sorted(os.sched_getaffinity(0)), case.work / "ranks.log"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
                                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with log.open("w") as output, ExitStack() as stack:
        started = []
        for rank in range(world):
            command = [sys.executable, "-m", "benchmarks.throughput.rank_job", "--config", str(config), "--out", str(out),
                       "--core", str(cores[rank % len(cores)])]
            started.append(subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
                                            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}))
            stack.callback(started[-1].kill)  # where another rank failed
        for process in started:
            finish(process, log)
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(world)]
