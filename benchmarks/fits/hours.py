"""Hours by the plan with cheaper rollouts: `python -m benchmarks.fits.hours --out benchmarks/results`.

The paper's run; each key by which ds_a100_fast.json differs from ds_a100.json alone, all of them, and an adapter of few steps; the
same keys for a flow. On eight A100s, by the shipped rate, without a download. Writes hours.json in a few minutes.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.fits.__main__ import model_of
from benchmarks.networks import lcm_lora
from benchmarks.result_files import Row, about, one_row_a_line
from seppo_fast.configfile import batch_plan, given_config, load_config
from seppo_fast.data.fingerprint import latent_shape
from seppo_fast.planning.cost import estimate
from seppo_fast.planning.time_plan import calls_with, hours, load_rates, work_of


class Way(NamedTuple):
    """A way to draw, as a configuration and what is changed in it."""

    name: str
    configuration: str
    changes: Mapping[str, Any]  # of seppo.sampler


GPUS = 8
LCM = {"adapter": "pytorch_lora_weights.safetensors", "solver": "lcm", "steps": 4, "guidance_scale": 1.0,
       "guidance_interval": [0.0, 1.0], "unconditional_every": 1}
TWICE = {"samples_per_iteration": 30720}  # half of an iteration's pairs
LEVELS = [0.22, 0.84]  # of a flow: sigma / (1 + sigma) of the noise levels that are 0.07 and 0.81 of Stable Diffusion's schedule


def ways() -> list[Way]:
    """The rows of the table."""
    fast = load_config("ds_a100_fast.json").seppo.sampler
    solver = {"solver": fast.solver, "steps": fast.steps}
    interval = {"guidance_interval": fast.guidance_interval}
    every = {"unconditional_every": fast.unconditional_every}
    return [
        Way("the paper's setting", "ds_a100", {}),
        Way(f"{fast.solver}, {fast.steps} steps", "ds_a100", solver),
        Way("guidance in an interval", "ds_a100", interval),
        Way(f"the branch without the prompt every {fast.unconditional_every} steps", "ds_a100", every),
        Way("these three", "ds_a100_fast", {}),
        Way("each sample used twice", "ds_a100", TWICE),
        Way("these three, each sample used twice", "ds_a100_fast", TWICE),
        Way("an LCM adapter, 4 steps", "ds_a100_fast", LCM),
        Way("an LCM adapter, 4 steps, each sample used twice", "ds_a100_fast", LCM | TWICE),
        Way("SD3.5 Medium", "ds_a100_sd35", {}),
        Way("SD3.5 Medium, guidance in an interval", "ds_a100_sd35", {"guidance_interval": LEVELS}),
        Way("SD3.5 Medium, also each sample used twice", "ds_a100_sd35",
            {"guidance_interval": LEVELS, "samples_per_iteration": 1920}),
    ]


def row_of(way: Way) -> Row:
    """Calls of the network for a sample, FLOPs of a pair, and hours."""
    config = given_config(f"{way.configuration}.json", {f"seppo.sampler.{key}": value for key, value in way.changes.items()})
    model, batch = model_of(config), batch_plan(config.deepspeed, GPUS)
    cost = estimate(model, config, batch, lcm_lora(model) if config.seppo.sampler.adapter else None)
    rate = next(rate for rate in load_rates(None) if rate.sampling_fraction is not None)
    sampling, training = hours(rate, work_of(config, batch, cost))
    return {"name": way.name, "family": config.seppo.model.path, "configuration": f"{way.configuration}.json",
            "changes": dict(way.changes), "device": rate.device,
            "calls": calls_with(config.seppo.sampler, model, latent_shape(model, config.seppo.data)),
            "sampling_tflop": round(cost.sampling / 1e12, 3), "pair_tflop": round(cost.pair / 1e12, 3),
            "sampling_hours": round(sampling, 3), "hours": round(sampling + training, 3)}


def main(argv: Sequence[str] | None = None) -> None:
    """Plan every way."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fits.hours", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the folder for hours.json")
    out = parser.parse_args(argv).out
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for way in ways():
        rows.append(row_of(way))
        print(rows[-1], flush=True)
    (out / "hours.json").write_text(one_row_a_line(about("cpu", "diffusers") | {"rows": rows}))


if __name__ == "__main__":
    main()
