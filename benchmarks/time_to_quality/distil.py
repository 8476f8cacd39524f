"""A few-step adapter, distilled from a quickstart's base alone: `python -m benchmarks.time_to_quality.distil BASE OUT`.

A UNet gets a consistency LoRA (LCM-LoRA, arXiv 2311.05556) for LCMScheduler; a flow gets a LoRA for `CALLS` Euler steps of its own
scheduler. Both draw without guidance: the teacher's is in them.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import LCMScheduler
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor

from seppo_fast.meter import Meter
from seppo_fast.models import Model, open_model
from seppo_fast.models.contract import Conditions
from seppo_fast.models.schedules import is_flow
from seppo_fast.quickstart.digits import CAPTIONS, RESOLUTION
from seppo_fast.quickstart.fitting import fit
from seppo_fast.reference import classifier_free, sample
from seppo_fast.reference.solver import table_of
from seppo_fast.seeds import generator

# As LCM-LoRA has them, and the like of SD3's transformer.
UNET_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
               "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"]
FLOW_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff.net.0.proj",
               "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "norm1.linear", "norm1_context.linear"]
CALLS = 4  # of a flow's adapter
HUBER = 1e-3  # LCM's


@dataclass(frozen=True)
class Recipe:
    """`teacher_steps`: guided steps of a latent that the UNet's teacher draws, or of a step that a flow's student makes."""

    layers: list[str]
    steps: int
    batch_size: int
    lr: float
    rank: int
    teacher_steps: int
    latents: int = 256


UNET = Recipe(UNET_LAYERS, steps=150, batch_size=32, rank=8, lr=2e-3, teacher_steps=10)
FLOW = Recipe(FLOW_LAYERS, steps=120, batch_size=16, rank=16, lr=2e-3, teacher_steps=4)


class Networks:
    """A base's network as the teacher, guided, and with a LoRA as the student; both in fp32 on the CPU."""

    def __init__(self, model: Model, layers: list[str], rank: int, guidance: float, seed: int) -> None:
        self.model = model
        self.teacher = model.load_denoiser(torch.float32).eval().requires_grad_(False)
        self.student = copy.deepcopy(self.teacher)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # alpha = rank: the file needs to say nothing about the scale
            self.student.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))
        self.embeds, self.empty = (model.load_text("cpu")(prompts) for prompts in (list(CAPTIONS), [""]))
        self.guidance = classifier_free(guidance, self.empty, model.rescale_guidance)
        self.shape = model.latent_shape(RESOLUTION, 1)

    def predict(self, latents: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        """The student's output."""
        return self.model.denoise(self.student, latents, times, self.conditions(labels))

    @torch.no_grad()
    def teach(self, latents: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        """The teacher's guided output."""
        given, outputs = self.conditions(labels), []
        for branch in self.guidance.branches:
            own = {name: self.empty[name].expand_as(value) if name in branch.empty else value for name, value in given.items()}
            outputs.append(self.model.denoise(self.teacher, latents, times, own))
        return self.guidance.combined(outputs)

    def conditions(self, labels: Tensor) -> Conditions:
        """Of the captions of these digits."""
        return {name: value[labels] for name, value in self.embeds.items()}

    def save(self, out: Path) -> None:
        """Write pytorch_lora_weights.safetensors as diffusers does."""
        layers = get_peft_model_state_dict(self.student)
        self.model.lora_loader.save_lora_weights(out, **{f"{self.model.denoiser}_lora_layers": layers})


def distil(base: Path, out: Path, seed: int, steps: int | None = None, guidance: float = 2.0) -> dict[str, float]:
    """Write `out`/pytorch_lora_weights.safetensors for the pipeline in `base`; what it took: seconds and counted FLOPs.

    `steps` are the optimizer's, None: as many as the recipe has. `guidance` is the teacher's.
    """
    started = time.perf_counter()
    model = open_model(str(base))
    recipe, make = (FLOW, turbo) if is_flow(model.scheduler_config) else (UNET, consistency)
    networks = Networks(model, recipe.layers, recipe.rank, guidance, seed)
    loss, flops = make(networks, recipe, seed)
    weights = [weight for weight in networks.student.parameters() if weight.requires_grad]
    with Meter() as meter:  # every step costs the same
        loss().backward()
    for weight in weights:
        weight.grad = None
    steps = steps or recipe.steps
    fit(weights, loss, steps, recipe.lr, "adapter")
    networks.save(out)
    return {"seconds": round(time.perf_counter() - started, 1), "flops": float(flops + (steps + 1) * meter.flops)}


def consistency(networks: Networks, recipe: Recipe, seed: int) -> tuple[Callable[[], Tensor], int]:
    """The loss of a batch, by LCM's Algorithm 1 with a DDIM step as the teacher's, and the FLOPs of the latents that it is of."""
    scheduler = LCMScheduler.from_config(networks.model.scheduler_config)
    scheduler.set_timesteps(scheduler.config.original_inference_steps)
    times = scheduler.timesteps.flip(0)
    before = torch.cat([torch.zeros(1, dtype=torch.long), times[:-1]])
    alphas = scheduler.alphas_cumprod
    random = generator(seed, "adapter")
    with Meter() as meter:
        latents, labels = draw(networks, recipe, random)

    def clean(output: Tensor, noisy: Tensor, at: Tensor) -> Tensor:
        alpha = column(alphas[at])
        return (noisy - (1 - alpha).sqrt() * output) / alpha.sqrt()

    def consistent(noisy: Tensor, at: Tensor, of: Tensor) -> Tensor:
        """The student's consistency function."""
        skip, out = map(column, scheduler.get_scalings_for_boundary_condition_discrete(at))
        return skip * noisy + out * clean(networks.predict(noisy, at, of), noisy, at)

    def loss() -> Tensor:
        rows = torch.randint(len(latents), (recipe.batch_size,), generator=random)
        steps = torch.randint(len(times), (recipe.batch_size,), generator=random)
        of, at, then = labels[rows], times[steps], before[steps]
        noisy = scheduler.add_noise(latents[rows], torch.randn(latents[rows].shape, generator=random), at)
        with torch.no_grad():
            noise = networks.teach(noisy, at, of)
            target = consistent(scheduler.add_noise(clean(noise, noisy, at), noise, then), then, of)
        return (((consistent(noisy, at, of) - target) ** 2 + HUBER**2).sqrt() - HUBER).mean()

    return loss, meter.flops


def draw(networks: Networks, recipe: Recipe, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """The teacher's samples, scaled latents, and the digits in their captions."""
    labels = torch.arange(recipe.latents) % len(CAPTIONS)
    table = table_of(networks.model, "ddim", recipe.teacher_steps, networks.shape)
    denoise = partial(networks.model.denoise, networks.teacher)
    drawn = [sample(denoise, table, torch.randn(len(part), *networks.shape, generator=random), networks.conditions(part),
                    networks.empty, networks.guidance, torch.float32) for part in labels.split(64)]
    return torch.cat(drawn), labels


def column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def turbo(networks: Networks, recipe: Recipe, seed: int) -> tuple[Callable[[], Tensor], int]:
    """The loss of a batch: each of `CALLS` Euler steps from where the student is ends where the teacher's guided ones do."""
    starts = table_of(networks.model, "euler", CALLS, networks.shape).timesteps / 1000
    ends = torch.cat([starts[1:], torch.zeros(1)])
    moves = starts - ends > 0.01  # the last one may begin at 0.001
    starts, ends = starts[moves], ends[moves]
    random, shares = generator(seed, "adapter"), torch.linspace(0, 1, recipe.teacher_steps + 1)

    def loss() -> Tensor:
        labels = torch.randint(len(CAPTIONS), (recipe.batch_size,), generator=random)
        latents, seen = torch.randn(recipe.batch_size, *networks.shape, generator=random), []
        with torch.no_grad():
            for start, end in zip(starts, ends, strict=True):
                seen.append(latents)
                latents = latents + (end - start) * networks.predict(latents, (1000 * start).expand(len(latents)), labels)
        here = there = torch.cat(seen)
        labels = labels.repeat(len(starts))
        first, last = (sigmas.repeat_interleave(recipe.batch_size) for sigmas in (starts, ends))
        for now, then in pairwise(shares):
            at, to = (torch.lerp(first, last, share) for share in (now, then))
            there = there + column(to - at) * networks.teach(there, 1000 * at, labels)
        velocity = (there - here) / column(last - first)
        return (networks.predict(here, 1000 * first, labels) - velocity).square().mean()

    return loss, 0


def main() -> None:
    """Make one adapter, and print what it took."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.time_to_quality.distil", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, metavar="BASE", help="the pipeline's directory")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the LoRA file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of the optimizer (default: the recipe's)")
    parser.add_argument("--guidance", type=float, default=2.0, help="the teacher's (default: %(default)s)")
    given = parser.parse_args()
    print(json.dumps(distil(given.base, given.out, given.seed, given.steps, given.guidance)))


if __name__ == "__main__":
    main()
