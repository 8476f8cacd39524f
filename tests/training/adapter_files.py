"""A few-step adapter as a file, and the samples that plain diffusers draws with it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from seppo_fast.seeds import normal

LATENTS = (4, 8, 8)


def write_lora(pipeline: Path, file: Path, seed: int = 5, targets: tuple[str, ...] = ("to_q", "to_v", "to_out.0", "conv1"),
               **unet: Any) -> Path:
    """A LoRA on the network of a pipeline directory, in diffusers' names, that changes much."""
    part = DiffusionPipeline.from_pretrained(pipeline, **unet)
    network, name = (part.unet, "unet") if hasattr(part, "unet") else (part.transformer, "transformer")
    network.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=list(targets)))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in (weight for key, weight in network.named_parameters() if "lora_" in key):
            weight.copy_(0.4 * torch.randn(weight.shape, generator=random))
    tensors = {f"{name}.{key}": value.contiguous() for key, value in get_peft_model_state_dict(network).items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file)
    return file


def stored(run: Path, iteration: int = 1) -> Tensor:
    """The losers of an iteration's set, by number."""
    files = sorted((run / "rollouts" / f"iteration_{iteration:05d}").glob("*.safetensors"))
    return torch.cat([load_file(file)["loser"] for file in files])


@torch.no_grad()
def drawn_by_diffusers(pipeline: Path, scheduler: Any, steps: int, prompts: list[str], seed: int, lora: Path | None = None,
                       guidance: Callable[[float], float] = lambda level: 1.0, lora_scale: float = 1.0) -> Tensor:
    """One sample a prompt from the noises of the slots 0, 1, ...; `guidance`: the scale at a timestep's share of the schedule."""
    loaded = DiffusionPipeline.from_pretrained(pipeline)
    if lora is not None:
        loaded.load_lora_weights(lora.parent, weight_name=lora.name, adapter_name="few")
        loaded.set_adapters("few", lora_scale)
    scheduler = scheduler.from_config(loaded.scheduler.config, clip_sample=False)
    given, empty = (loaded.encode_prompt(texts, "cpu", 1, False)[0] for texts in (prompts, [""] * len(prompts)))
    slots, found = range(len(prompts)), []
    for slot in slots:
        scheduler.set_timesteps(steps)
        latents = normal(LATENTS, seed, "initial noise", [slot]) * scheduler.init_noise_sigma
        for number, t in enumerate(scheduler.timesteps):
            scaled, scale = scheduler.scale_model_input(latents, t), guidance(float(t) / 1000)
            output = loaded.unet(scaled, t, given[slot : slot + 1]).sample
            if scale != 1:
                without = loaded.unet(scaled, t, empty[slot : slot + 1]).sample
                output = without + scale * (output - without)
            noise = normal(LATENTS, seed, f"later noise {number}", [slot])
            latents = step_with(scheduler, output, t, latents, noise)
        found.append(latents)
    return torch.cat(found)


def step_with(scheduler: Any, output: Tensor, t: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    """The scheduler's step, with `noise` where it draws one."""
    from diffusers.schedulers import scheduling_lcm, scheduling_tcd

    before = scheduling_lcm.randn_tensor, scheduling_tcd.randn_tensor
    scheduling_lcm.randn_tensor = scheduling_tcd.randn_tensor = lambda shape, **_: noise
    try:
        return scheduler.step(output, t, latents, return_dict=False)[0]
    finally:
        scheduling_lcm.randn_tensor, scheduling_tcd.randn_tensor = before
