"""The paper's run on many GPUs, by the plan: `python -m benchmarks.fits.gpus --out benchmarks/results`.

ds_a100.json on A100s with the shipped rates, as `--dry-run --gpus 8 64 512 ...` plans it, without a download. Writes gpus.json in a
minute.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.fits.__main__ import model_of
from benchmarks.result_files import about, one_row_a_line
from seppo_fast.configfile import load_config
from seppo_fast.planning.gpus import assumptions, chosen, plans
from seppo_fast.planning.time_plan import duration, load_rates

CONFIGURATION = "ds_a100.json"
GPUS = (8, 64, 512, 2048, 4096)


def main(argv: Sequence[str] | None = None) -> None:
    """Plan each number of GPUs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fits.gpus", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the folder for gpus.json")
    out = parser.parse_args(argv).out
    out.mkdir(parents=True, exist_ok=True)
    config = load_config(CONFIGURATION)
    rate, cluster = chosen(load_rates(None))
    rows = []
    for found, spent in plans(config, model_of(config), GPUS, rate, cluster):
        shown = None if spent is None else {**asdict(spent), "all": spent.all}
        rows.append({"gpus": found.gpus, "share": found.share, "accumulation": found.batch and found.batch.accumulation,
                     "note": found.note, "in_all": spent and duration(spent.all), "hours": shown})
        print(rows[-1], flush=True)
    pairs = config.seppo.updates * config.deepspeed["train_batch_size"]
    result = about("cpu", "diffusers") | {"configuration": CONFIGURATION, "device": rate.device, "pairs": pairs,
                                          "assumptions": assumptions(cluster), "rows": rows}
    (out / "gpus.json").write_text(one_row_a_line(result))


if __name__ == "__main__":
    main()
