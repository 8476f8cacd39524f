"""What a change of the reference costs: seconds and bytes of `Pool.load_into`, from host memory and from disk."""

import statistics
import time
from pathlib import Path

import torch

from benchmarks.networks import make_unet
from benchmarks.result_files import Keep, Row
from benchmarks.timing import waiter
from seppo_fast.reference import Pool


def measure(name: str, device: str, folder: Path, keep: Keep, repeats: int = 5) -> None:
    """Load two policies in turn, so that each load really changes the weights. The first load of each is not in the median."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    unet, wait = make_unet(name, device, dtype), waiter(device)
    weights = {key: weight.detach().cpu() for key, weight in unet.named_parameters()}
    size = sum(weight.nbytes for weight in weights.values())
    rows: list[Row] = []
    for kept, budget in (("host memory", 3 * size), ("disk", 0)):
        pool = Pool(folder / kept.replace(" ", "_"), dtype, budget)
        for index in range(2):
            pool.add(index, weights, write=True)
        times = []
        for turn in range(2 * (1 + repeats)):
            wait()
            start = time.perf_counter()
            pool.load_into(turn % 2, unet)
            wait()
            times.append(time.perf_counter() - start)
        took = statistics.median(times[2:])
        rows.append({"network": name, "from": kept, "bytes": size, "seconds": round(took, 5), "first_s": round(times[0], 5),
                     "gb_s": round(size / took / 1e9, 2)})
        print(rows[-1], flush=True)
        keep({"rows": rows})
