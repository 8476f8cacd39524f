"""Draws samples of every prompt with every model from the same noise, into files that a later run finds again."""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from seppo_fast import config
from seppo_fast.errors import UserError
from seppo_fast.evaluation.candidates import Candidate
from seppo_fast.evaluation.files import keep
from seppo_fast.evaluation.prompts import Prompt
from seppo_fast.models import Conditions, Model
from seppo_fast.models.launches import set_processors
from seppo_fast.ranks import Ranks
from seppo_fast.reference.batching import chunks
from seppo_fast.reference.guidance import classifier_free
from seppo_fast.reference.sampler import Sampler
from seppo_fast.reference.solver import solver_table
from seppo_fast.seeds import generator

READABLE = 40  # characters of the prompt in a file's name


@dataclass(frozen=True)
class Drawing:
    """How samples are drawn: everything that decides them except model and prompt. `frames` is None for images."""

    seed: int
    per_prompt: int
    resolution: int | None
    frames: int | None
    dtype: torch.dtype
    sampler: config.Sampler


@dataclass(frozen=True)
class Slot:
    """One sample to draw: the index of its prompt, its number among the prompt's samples, and its file in the output folder."""

    prompt: int
    sample: int
    file: str


def slots_of(candidate: Candidate, prompts: Sequence[Prompt], drawing: Drawing) -> list[Slot]:
    """The samples of a model; a file's name depends on the prompt's words and the sample's number alone."""
    suffix = "png" if drawing.frames is None else "webp"
    return [Slot(index, sample, f"samples/{candidate.name}/{stem(prompt.text)}_{sample:02d}.{suffix}")
            for index, prompt in enumerate(prompts) for sample in range(drawing.per_prompt)]


def share_of(candidate: Candidate, prompts: Sequence[Prompt], drawing: Drawing, ranks: Ranks) -> list[Slot]:
    """This rank's samples of a model; those of the same prompt and number for all models."""
    return slots_of(candidate, prompts, drawing)[ranks.rank :: ranks.world]


def stem(text: str) -> str:
    """The prompt's first words and a hash, because prompts may begin alike."""
    words = re.sub(r"[^a-z0-9]+", "-", text.lower())[:READABLE].strip("-")
    return f"{words}-{hashlib.sha256(text.encode()).hexdigest()[:10]}".lstrip("-")


@dataclass(frozen=True)
class Renderer:
    """A model ready to draw: prompts to conditions, noise (B, *shape) to latents, one latent to pixels."""

    shape: tuple[int, ...]
    embed: Callable[[list[str]], Conditions]
    draw: Callable[[Tensor, Conditions], Tensor]
    decode: Callable[[Tensor], Tensor]
    batch_size: int
    device: torch.device


def generate(candidate: Candidate, prompts: Sequence[Prompt], drawing: Drawing, out: Path, ranks: Ranks,
             say: Callable[[str], None] = print) -> dict[str, str]:
    """Draw this rank's samples that have no file. Returns file -> why it could not be made, where a sample is not finite."""
    todo = [slot for slot in share_of(candidate, prompts, drawing, ranks) if not (out / slot.file).is_file()]
    if not todo:
        return {}
    (out / "samples" / candidate.name).mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(todo), desc=f"samples of {candidate.name}", unit="sample", disable=ranks.rank != 0) as progress:
        return render(todo, prompts, drawing.seed, out, open_renderer(candidate, drawing, ranks, len(todo), say), progress.update)


def render(todo: Sequence[Slot], prompts: Sequence[Prompt], seed: int, out: Path, renderer: Renderer,
           progress: Callable[[], Any]) -> dict[str, str]:
    """Write the samples' files in `out`. Returns file -> why it could not be made, where a sample is not finite."""
    problems = {}
    for some in chunks(todo, renderer.batch_size):
        noise = torch.stack([initial_noise(renderer.shape, seed, prompts[slot.prompt].text, slot.sample) for slot in some])
        conditions = renderer.embed([prompts[slot.prompt].text for slot in some])
        latents = renderer.draw(noise.to(renderer.device), conditions)
        for slot, latent in zip(some, latents.split(1), strict=True):
            pixels = renderer.decode(latent)[0].cpu()  # one by one: pixels are large
            if pixels.isfinite().all():
                keep(pixels, out / slot.file)
            else:
                problems[slot.file] = "the model's sample is not finite (NaN or Inf)"
            progress()
    return problems


def open_renderer(candidate: Candidate, drawing: Drawing, ranks: Ranks, count: int, say: Callable[[str], None]) -> Renderer:
    """The candidate on this rank's device, in the drawing's precision, for `count` samples."""
    model, dtype = candidate.model, drawing.dtype
    vae, shape = model.load_vae(ranks.device), latent_shape(model, drawing)
    text = candidate.load_text(ranks.device)

    def embed(prompts: list[str]) -> Conditions:
        return {name: value.to(ranks.device, dtype) for name, value in text(prompts).items()}

    unet = candidate.load_unet(dtype).to(ranks.device)
    if ranks.device.type == "cuda":
        set_processors(unet)
    table = solver_table(model.scheduler_config, drawing.sampler.solver, drawing.sampler.steps, "--steps").to(ranks.device)
    empty = embed([""])
    branches = classifier_free(drawing.sampler.guidance_scale, empty)
    sampler = Sampler(unet, model.denoise, table, empty, branches, drawing.sampler, dtype, say=say)
    sampler.fit(shape, count)
    return Renderer(shape, embed, sampler.draw, partial(model.decode, vae), sampler.batch_size, ranks.device)


def latent_shape(model: Model, drawing: Drawing) -> tuple[int, ...]:
    """The latents' shape: (C, h, w) of an image, (C, F, h, w) of a video; in the model's own size unless the drawing has one."""
    side = drawing.resolution or own_side(model) * model.vae_scale_factor
    if side % model.vae_scale_factor:
        raise UserError(f"--resolution {side} is no multiple of {model.vae_scale_factor}, by which the VAE in {model.path} shrinks"
                        " images")
    frames = [] if drawing.frames is None else [drawing.frames]
    return (model.latent_channels, *frames, side // model.vae_scale_factor, side // model.vae_scale_factor)


def own_side(model: Model) -> int:
    """Latents along a side that the UNet was made for; `UserError` where its config does not say one."""
    size = model.directory.configs["unet"].get("sample_size")
    sides = set(size if isinstance(size, list) else [size])
    if len(sides) != 1 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise UserError(f"{model.path / 'unet' / 'config.json'}: sample_size is {size!r}, which does not give the size of a square"
                        " picture; give --resolution")
    return sides.pop()


def initial_noise(shape: Sequence[int], seed: int, prompt: str, sample: int) -> Tensor:
    """Standard normal noise, the same for every model, whatever the other prompts, the batch and the rank."""
    return torch.randn(tuple(shape), generator=generator(seed, "evaluation", prompt, sample))
