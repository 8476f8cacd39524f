"""Peak memory of full training of Stable Diffusion 1.5 by our command on one GPU, beside the plan's estimate."""

import json
from dataclasses import replace

import torch

from benchmarks.jobs import finish, fresh, start_training
from benchmarks.result_files import Keep, Row
from benchmarks.throughput.loop import Case, overrides
from seppo_fast.configfile import batch_plan, load_config
from seppo_fast.models import open_model
from seppo_fast.planning.cost import estimate

# Local batch 1, two accumulated. Few steps and small batches of reference samples: the training step is what is measured.
SETTINGS = ("zero_optimization.stage=2", "seppo.sampler.batch_size=1", "seppo.samples.every=0")
WAYS = {"full": (), "small": ("seppo.model.gradient_checkpointing=true", "zero_optimization.offload_optimizer.device=cpu")}


def measure(case: Case, keep: Keep) -> None:
    """`measured_gb` is metrics.jsonl's peak, 10^9 bytes, of all that was allocated in the process."""
    rows: list[Row] = []
    for name, more in WAYS.items():
        one = replace(case, batch=2, micro=1, steps=2, warm_up=1, updates=(1, 0), ours=(*SETTINGS, *more))
        run, log = fresh(case.work / f"memory_{name}"), case.work / f"memory_{name}.log"
        config = load_config(one.config, overrides(one, run))
        planned = estimate(open_model(str(one.base)), config, batch_plan(config.deepspeed, 1)).memory / 1e9
        finish(start_training(one.config, overrides(one, run), log), log)
        peak = max(json.loads(line)["peak_memory_gb"] for line in (run / "metrics.jsonl").read_text().splitlines())
        rows.append({"way": name, "settings": list(one.ours), "measured_gb": peak, "planned_gb": round(planned, 3),
                     "planned_over_measured": round(planned / peak, 3)})
        print(rows[-1], flush=True)
        keep({"gpu_gb": round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1) if torch.cuda.is_available() else None,
              "rows": rows})
        fresh(run)  # its pool and final/ are large
