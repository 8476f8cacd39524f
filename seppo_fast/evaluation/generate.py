"""Draws samples of every prompt with every model from the same noise, into files that a later run finds again."""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from seppo_fast import config
from seppo_fast.errors import UserError
from seppo_fast.evaluation.candidates import Candidate
from seppo_fast.evaluation.files import is_improvement, keep, read_source
from seppo_fast.evaluation.prompts import Prompt
from seppo_fast.models import Conditions, Model
from seppo_fast.models.launches import set_processors
from seppo_fast.models.pix2pix import IMAGE
from seppo_fast.ranks import Ranks
from seppo_fast.reference.batching import chunks
from seppo_fast.reference.guidance import double, guided
from seppo_fast.reference.sampler import Sampler
from seppo_fast.reference.solver import table_of
from seppo_fast.seeds import generator

READABLE = 40  # characters of the prompt in a file's name


@dataclass(frozen=True)
class Drawing:
    """How samples are drawn: everything that decides them except model and prompt. `frames` is None for images.

    `improvement` has the guidance scales of models that improve others' samples, in place of the sampler's.
    """

    seed: int
    per_prompt: int
    resolution: int | None
    frames: int | None
    dtype: torch.dtype
    sampler: config.Sampler
    improvement: config.Improvement = field(default_factory=config.Improvement)


@dataclass(frozen=True)
class Slot:
    """One sample to draw: the index of its prompt, its number among the prompt's samples, and its file in the output folder.

    `source` is the file of the sample that it improves; `turns` counts the improvements, this one included.
    """

    prompt: int
    sample: int
    file: str
    source: str | None = None
    turns: int = 0


def slots_of(candidate: Candidate, prompts: Sequence[Prompt], drawing: Drawing) -> list[Slot]:
    """The samples of a model; a file's name depends on the prompt's words and the sample's number alone."""
    suffix, source = "png" if drawing.frames is None else "webp", candidate.source
    slots = []
    for index, prompt in enumerate(prompts):
        for sample in range(drawing.per_prompt):
            name = f"{stem(prompt.text)}_{sample:02d}.{suffix}"
            slots.append(Slot(index, sample, f"samples/{candidate.name}/{name}", source and f"samples/{source.name}/{name}",
                              candidate.turns))
    return slots


def share_of(candidate: Candidate, prompts: Sequence[Prompt], drawing: Drawing, ranks: Ranks) -> list[Slot]:
    """This rank's samples of a model; those of the same prompt and number for all models."""
    return slots_of(candidate, prompts, drawing)[ranks.rank :: ranks.world]


def stem(text: str) -> str:
    """The prompt's first words and a hash, because prompts may begin alike."""
    words = re.sub(r"[^a-z0-9]+", "-", text.lower())[:READABLE].strip("-")
    return f"{words}-{hashlib.sha256(text.encode()).hexdigest()[:10]}".lstrip("-")


@dataclass(frozen=True)
class Source:
    """A sample that is to be improved, as the condition (1, *shape), and its file's checksum."""

    image: Tensor
    checksum: str


@dataclass(frozen=True)
class Renderer:
    """A model ready to draw: prompts to conditions, noise (B, *shape) to latents, one latent to pixels.

    `see` reads what a model that improves samples is given.
    """

    shape: tuple[int, ...]
    embed: Callable[[list[str]], Conditions]
    draw: Callable[[Tensor, Conditions], Tensor]
    decode: Callable[[Tensor], Tensor]
    batch_size: int
    device: torch.device
    rate: int  # frames a second
    see: Callable[[Path], Source] | None = None


def generate(candidate: Candidate, prompts: Sequence[Prompt], drawing: Drawing, out: Path, ranks: Ranks,
             say: Callable[[str], None] = print) -> dict[str, str]:
    """Draw this rank's samples that have no file, or one that was made of another sample than the present one.

    Returns file -> why it could not be made.
    """
    todo, problems = to_draw(share_of(candidate, prompts, drawing, ranks), out)
    if not todo:
        return problems
    (out / "samples" / candidate.name).mkdir(parents=True, exist_ok=True)
    if candidate.source is not None and any((out / slot.file).exists() for slot in todo):
        say(f"{candidate.name}: samples that were made of others than {candidate.source.name}'s present ones are drawn again")
    renderer = open_renderer(candidate, drawing, ranks, len(todo), say)
    with tqdm(total=len(todo), desc=f"samples of {candidate.name}", unit="sample", disable=ranks.rank != 0) as progress:
        return problems | render(todo, prompts, drawing.seed, out, renderer, progress.update)


def to_draw(slots: Sequence[Slot], out: Path) -> tuple[list[Slot], dict[str, str]]:
    """The samples that are to be drawn; and file -> why, for those that cannot be: what they should improve is missing."""
    todo, problems = [], {}
    for slot in slots:
        if slot.source is not None and not (out / slot.source).is_file():
            problems[slot.file] = f"there is no {slot.source} that it could improve"
        elif slot.source is None and not (out / slot.file).is_file():
            todo.append(slot)
        elif slot.source is not None and not is_improvement(out / slot.file, out / slot.source):
            todo.append(slot)
    return todo, problems


def render(todo: Sequence[Slot], prompts: Sequence[Prompt], seed: int, out: Path, renderer: Renderer,
           progress: Callable[[], Any]) -> dict[str, str]:
    """Write the samples' files in `out`. Returns file -> why it could not be made: not finite, or its source cannot be read."""
    problems: dict[str, str] = {}
    for batch in chunks(todo, renderer.batch_size):
        sources, faults = read_sources(batch, out, renderer.see)
        problems |= faults
        some = [slot for slot in batch if slot.file not in faults]
        latents = draw(some, prompts, seed, [source.image for source in sources.values()], renderer) if some else ()
        for slot, latent in zip(some, latents, strict=True):
            pixels = renderer.decode(latent)[0].cpu()  # one by one: pixels are large
            if pixels.isfinite().all():
                keep(pixels, out / slot.file, renderer.rate, sources[slot].checksum if sources else None)
            else:
                problems[slot.file] = "the model's sample is not finite (NaN or Inf)"
            progress()
        for _ in faults:
            progress()
    return problems


def draw(slots: Sequence[Slot], prompts: Sequence[Prompt], seed: int, images: Sequence[Tensor], renderer: Renderer
         ) -> tuple[Tensor, ...]:
    """Latents (1, *shape) of each slot; `images` (1, *shape) are given to a model that improves samples."""
    texts = [prompts[slot.prompt].text for slot in slots]
    noise = torch.stack([initial_noise(renderer.shape, seed, text, slot.sample, slot.turns)
                         for text, slot in zip(texts, slots, strict=True)])
    conditions = renderer.embed(texts) | ({IMAGE: torch.cat([*images])} if images else {})
    return renderer.draw(noise.to(renderer.device), conditions).split(1)


def read_sources(slots: Sequence[Slot], out: Path, see: Callable[[Path], Source] | None
                 ) -> tuple[dict[Slot, Source], dict[str, str]]:
    """What a model that improves samples is given for each slot; and file -> why, where it cannot be read."""
    found, faults = {}, {}
    for slot in slots:
        if slot.source is not None and see is not None:
            try:
                found[slot] = see(out / slot.source)
            except UserError as error:
                faults[slot.file] = str(error)
    return found, faults


def open_renderer(candidate: Candidate, drawing: Drawing, ranks: Ranks, count: int, say: Callable[[str], None]) -> Renderer:
    """The candidate on this rank's device, in the drawing's precision, for `count` samples."""
    model, dtype = candidate.model, drawing.dtype
    vae, shape = model.load_vae(ranks.device), latent_shape(model, drawing)
    text = candidate.load_text(ranks.device)

    def embed(prompts: list[str]) -> Conditions:
        return {name: value.to(ranks.device, dtype) for name, value in text(prompts).items()}

    denoiser = candidate.load_denoiser(dtype).to(ranks.device)
    if ranks.device.type == "cuda":
        set_processors(denoiser)
    table = table_of(model, drawing.sampler.solver, drawing.sampler.steps, shape, "--").to(ranks.device)
    empty = embed([""])
    denoise, guidance = guided(model, drawing.sampler.guidance_scale, empty, "--guidance-scale")
    see = None
    if candidate.source is not None:
        empty |= {IMAGE: torch.zeros(1, *shape, device=ranks.device, dtype=dtype)}
        guidance = double(drawing.improvement.guidance_scale, drawing.improvement.image_guidance_scale, empty)

        def see(path: Path) -> Source:
            pixels, checksum = read_source(path, side_of(model, drawing))
            return Source(model.encode(vae, pixels)[0].to(dtype), checksum)

    sampler = Sampler(denoiser, denoise, table, empty, guidance, drawing.sampler, dtype, say=say)
    sampler.fit(shape, count)
    return Renderer(shape, embed, sampler.draw, partial(model.decode, vae), sampler.batch_size, ranks.device, model.frame_rate, see)


def check_drawing(candidates: Sequence[Candidate], drawing: Drawing) -> None:
    """UserError, before anything is drawn, where a model cannot make samples in this way: size, solver, steps, guidance."""
    sides = {candidate.name: side_of(candidate.model, drawing) for candidate in candidates}
    for candidate in candidates:
        if candidate.source is not None and sides[candidate.name] != (given := sides[candidate.source.name]):
            raise UserError(f"--models {candidate.name}={candidate.given}: it is made for images of {sides[candidate.name]} pixels"
                            f" along a side, and {candidate.source.name} draws {given}: give a --resolution for both, or an"
                            " improvement model of this size")
    for candidate in candidates:
        model, sampler = candidate.model, drawing.sampler
        table_of(model, sampler.solver, sampler.steps, latent_shape(model, drawing), "--")
        if candidate.source is None:
            guided(model, sampler.guidance_scale, (), "--guidance-scale")


def latent_shape(model: Model, drawing: Drawing) -> tuple[int, ...]:
    """The latents' shape: (C, h, w) of an image, (C, F', h, w) of a video; in the model's own size unless the drawing has one."""
    return model.latent_shape(side_of(model, drawing), drawing.frames or 1)


def side_of(model: Model, drawing: Drawing) -> int:
    """Pixels along a side of the samples; `UserError` where the model cannot make such ones."""
    side = drawing.resolution or own_side(model) * model.vae_scale_factor
    if side % model.multiple:
        raise UserError(f"--resolution {side} is no multiple of {model.multiple}, as {model.path} needs it")
    model.check_side(side)
    return side


def own_side(model: Model) -> int:
    """Latents along a side that the network was made for; `UserError` where its config does not say one."""
    size = model.sample_size
    sides = set(size if isinstance(size, list) else [size])
    if len(sides) != 1 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise UserError(f"{model.path / model.denoiser / 'config.json'}: sample_size is {size!r}, which does not give the size of"
                        " a square picture; give --resolution")
    return sides.pop()


def initial_noise(shape: Sequence[int], seed: int, prompt: str, sample: int, turns: int = 0) -> Tensor:
    """Standard normal noise, the same for every model, whatever the other prompts, the batch and the rank.

    Each improvement of a sample has noise of its own: in training, too, it does not depend on what is improved.
    """
    improvement = ("improvement", turns) if turns else ()
    return torch.randn(tuple(shape), generator=generator(seed, "evaluation", prompt, sample, *improvement))
