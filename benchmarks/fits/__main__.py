"""What fits on cards of 24, 40 and 80 GB, by the plan: `python -m benchmarks.fits --out benchmarks/results`.

For each family at its configuration, on one GPU, without a download. Where it does not fit, memory is saved in this order: smaller
batches, gradient checkpointing, a LoRA in place of all weights, text encoders and then the base in fewer bits. Writes fits.json; it
took ten minutes on 2 cores.
"""

import argparse
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from benchmarks.fits import CARDS
from benchmarks.fits.search import Batches, Way, best
from benchmarks.result_files import Row, about, one_row_a_line
from seppo_fast.configfile import Config, batch_plan, load_config
from seppo_fast.models import Model
from seppo_fast.models.published import published_model
from seppo_fast.planning.cost import Cost, estimate
from seppo_fast.planning.plan import with_data

# Of the single blocks, too, which have one projection for all.
KLEIN = '["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_qkv_mlp_proj"]'
CASES: dict[str, tuple[str, list[str]]] = {  # the name in the table -> configuration, and what is changed in it
    "SD-1.5, all weights": ("ds_a100", []),
    "SDXL, all weights": ("ds_a100", ["seppo.model.path=stabilityai/stable-diffusion-xl-base-1.0", "seppo.data.resolution=1024"]),
    "AnimateDiff": ("ds_a100_video", []),
    "SD3.5 Medium": ("ds_a100_sd35", []),
    "FLUX.1-dev": ("ds_a100_flux", []),
    "Wan 2.1 1.3B": ("ds_a100_wan", []),
    "Wan 2.1 14B": ("ds_a100_wan", ["seppo.model.path=Wan-AI/Wan2.1-T2V-14B-Diffusers"]),
    "Wan 2.2 TI2V-5B": ("ds_a100_wan", ["seppo.model.path=Wan-AI/Wan2.2-TI2V-5B-Diffusers"]),
    "Qwen-Image": ("ds_a100_qwen", []),
    "FLUX.2-klein-base-4B": ("ds_a100_flux", ["seppo.model.path=black-forest-labs/FLUX.2-klein-base-4B",
                                              "seppo.sampler.guidance_scale=4.0", f"seppo.model.lora.targets={KLEIN}"]),
}
LORA = 'seppo.model.lora={"rank": 16, "alpha": 16.0}'
CHECKPOINTING = "seppo.model.gradient_checkpointing=true"


def ways(name: str, changes: Sequence[str]) -> list[Way]:
    """The configuration, and how it saves memory step by step."""
    model = load_config(f"{name}.json", list(changes)).seppo.model
    found = [Way((), ())]
    if not model.gradient_checkpointing:
        found.append(Way(("checkpointing",), (CHECKPOINTING,)))
    if model.lora is None:
        found.append(Way(("checkpointing", "LoRA of rank 16"), (CHECKPOINTING, LORA)))
    last = found[-1]
    found.append(Way((*last.labels, "text encoders in int8"), (*last.changes, "seppo.model.quantize_text=int8")))
    return found + [Way((*last.labels, f"base and text encoders in {bits}"),
                        (*last.changes, f"seppo.model.quantize={bits}", f"seppo.model.quantize_text={bits}"))
                    for bits in ("int8", "nf4")]


def model_of(config: Config) -> Model:
    """The published shape of the model."""
    model = published_model(config.seppo.model.path, config.seppo.model.motion_adapter)
    if model is None:
        raise SystemExit(f"{config.seppo.model.path} has no published shape here")
    return model


def case(name: str, changes: Sequence[str]) -> Row:
    """The plan's bytes as configured, and for each card what fits."""

    @cache
    def cost(way: Way, batches: Batches) -> Cost:
        config = load_config(f"{name}.json", [*changes, *way.changes, *batches.changes])
        ours, model = config.seppo, model_of(config)
        return with_data(estimate(model, config, batch_plan(config.deepspeed, 1)), ours.data, model, None)

    config = load_config(f"{name}.json", list(changes))
    ours, found = config.seppo, ways(name, changes)
    whole = Batches(config.deepspeed["train_micro_batch_size_per_gpu"], ours.sampler.batch_size, ours.data.encode_batch_size)
    return {"configuration": f"{name}.json", "changes": list(changes), "resolution": ours.data.resolution,
            "frames": ours.data.video.frames if model_of(config).video else None, "parameters": cost(found[0], whole).parameters,
            "bytes": cost(found[0], whole).reserved, "cards": {str(card): best(card, found, whole, cost) for card in CARDS}}


def main() -> None:
    """Plan every case whose family is there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fits", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the folder for fits.json")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for label, (name, changes) in CASES.items():
        rows.append({"name": label} | case(name, changes))
        print(rows[-1], flush=True)
    result = about("cpu", "diffusers") | {"rows": rows}
    (out / "fits.json").write_text(one_row_a_line(result))


if __name__ == "__main__":
    main()
