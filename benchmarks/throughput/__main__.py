"""Training and sampling speed: `python -m benchmarks.throughput --out benchmarks/results [--device cuda] [--only loop sampler]`.

Writes throughput_<cpu or the GPU's name>.json after each part, and throughput_*_profile.txt, which show what takes the time.
The models have random weights; speed does not depend on them. It takes about 12 minutes on 2 idle CPU cores,
half of them for what is compiled.
"""

import argparse
import json
import os
import re
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import diffusers
import torch

from benchmarks.result_files import Keep, Row, about, one_row_a_line
from benchmarks.throughput import loop, micro_batch, profiles, ranks, samplers, swap, training_memory
from benchmarks.throughput.summary import rates, targets

PARTS = {"cpu": ("loop", "ranks", "sampler", "swap", "profile", "micro_batch"),
         "cuda": ("sampler", "loop", "training_memory", "swap", "profile", "micro_batch")}
Text = Callable[[str, str], None]  # name of a profile, text


def measure(part: str, device: str, work: Path, keep: Keep, text: Text, seconds: float) -> None:
    """Measure one part. `keep` gets the results as they come, `text` the profiles."""
    if part == "sampler":
        text("sampler", samplers.profile(device))
        samplers.measure(device, keep, seconds)
    elif part == "micro_batch":
        micro_batch.measure(device, keep, seconds)
    elif part == "swap":
        swap.measure("sd15" if device == "cuda" else "quickstart", device, work / "swap", keep)
    else:
        case = loop.sd15_case(work) if device == "cuda" else loop.quickstart_case(work)
        if part == "profile":
            for name, report in profiles.of_training(case, device).items():
                text(name, report)
            keep({})
        else:
            {"loop": loop.measure, "ranks": ranks.measure, "training_memory": training_memory.measure}[part](case, keep)


def others(earlier: Row, result: Row, parts: Sequence[str]) -> Row:
    """The parts of an earlier result of the same machine and versions, each with the commit that it is of."""
    if earlier.get("versions") != result["versions"] or earlier["machine"]["cpu"] != result["machine"]["cpu"]:
        return {}
    kept = {part: {"commit": earlier["commit"]} | earlier[part] for part in parts if part in earlier}
    return kept | {key: earlier[key] for key in ("profiled",) if key in earlier}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", nargs="+", choices=sorted({part for parts in PARTS.values() for part in parts}))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, help="after these begin no batch of the sampler (100 on a CPU, 300 on a GPU)")
    given = parser.parse_args(argv)
    out, device = given.out.resolve(), given.device
    out.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = str(given.threads)  # for the trainers, which run in processes of their own
    torch.set_num_threads(given.threads)
    diffusers.utils.logging.set_verbosity_error()
    name = "cpu" if device == "cpu" else re.sub(r"\W+", "_", torch.cuda.get_device_name()).lower()
    file = out / f"throughput_{name}.json"
    result = about(device, "diffusers", "deepspeed")
    earlier = json.loads(file.read_text()) if file.exists() else {}
    if given.only:
        result |= others(earlier, result, PARTS[device])

    def text(title: str, profile: str) -> None:
        about_it = f"{result['machine'].get('gpu', result['machine']['cpu'])}, torch {torch.__version__}, commit {result['commit']}"
        (out / f"throughput_{name}_{title}_profile.txt").write_text(f"{about_it}\n\n{profile}\n")
        result["profiled"] = sorted({*result.get("profiled", []), title})

    with tempfile.TemporaryDirectory(prefix="seppo-throughput-") as folder:
        for part in PARTS[device]:
            if given.only and part not in given.only:
                continue
            start, load = time.perf_counter(), os.getloadavg()[0]

            def keep(found: Row, part: str = part, start: float = start, load: float = load) -> None:
                result[part] = found | {"seconds_taken": round(time.perf_counter() - start, 1),
                                        "load_average": [round(load, 2), round(os.getloadavg()[0], 2)]}
                result["targets"], result["rates"] = targets(result, device), rates(result)
                file.write_text(one_row_a_line(result))

            try:
                measure(part, device, Path(folder), keep, text, given.seconds or {"cpu": 100, "cuda": 300}[device])
            except Exception as error:  # the other parts go on
                traceback.print_exc()
                keep(result.get(part, {}) | {"failed": str(error)[-2000:]})
            print(f"{part}: {result[part]['seconds_taken']} s {result[part].get('failed', '')}", flush=True)
    for target in result["targets"]:
        print(target)


if __name__ == "__main__":
    main()
