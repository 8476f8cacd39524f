"""The improvement model in a run: as what makes winners, and, while it is trained itself, in grids of samples."""

from functools import partial
from pathlib import Path

import torch

from seppo_fast.config import Improvement, Seppo
from seppo_fast.data import ClipStream, LatentCache
from seppo_fast.models import Conditions, Model
from seppo_fast.models.pix2pix import IMAGE
from seppo_fast.models.prepare import prepare_denoisers
from seppo_fast.models.trial import block_inputs, call_once
from seppo_fast.ranks import Ranks
from seppo_fast.reference.batching import free_memory
from seppo_fast.reference.guidance import Guidance, double
from seppo_fast.reference.improver import Improver
from seppo_fast.reference.sampler import Sampler
from seppo_fast.reference.solver import SolverTable
from seppo_fast.sampling import EVERYWHERE
from seppo_fast.training.objective import Objective
from seppo_fast.training.pairs import PairSource
from seppo_fast.training.samples import PROMPTS, Grids


def with_image(pairs: PairSource, settings: Improvement) -> tuple[Conditions, Guidance]:
    """The empty conditions with "no image", and double guidance."""
    empty = pairs.unconditional | {IMAGE: torch.zeros(1, *pairs.cache.shape, dtype=pairs.dtype, device=pairs.device)}
    return empty, double(settings.guidance_scale, settings.image_guidance_scale, empty)


def half_of_memory(device: torch.device) -> int:
    """What each of two samplers may count on: where their steps are captured, both keep their memory."""
    return free_memory(device) // 2


def open_improver(model: Model, settings: Seppo, objective: Objective, table: SolverTable, pairs: PairSource, wanted: int,
                  ranks: Ranks) -> Improver:
    """The frozen improvement model on this rank's device, in the policy's precision and with its solver.

    It is given at most `wanted` losers at once.
    """
    def say(line: str) -> None:
        ranks.say(f"improvement model: {line}")

    denoiser = model.load_denoiser(objective.dtype).eval().requires_grad_(False)
    prepare_denoisers([denoiser], settings.networks, pairs.cache.shape[1:], objective.autocast or objective.dtype, ranks.device,
                      say, ranks.largest, inputs=partial(block_inputs, model.empty_denoiser, partial(call_once, model)))
    empty, guidance = with_image(pairs, settings.improvement)
    everywhere = settings.sampler.model_copy(update={"guidance_interval": list(EVERYWHERE), "unconditional_every": 1})
    sampler = Sampler(denoiser.to(ranks.device), model.denoise, table.to(ranks.device), empty, guidance, everywhere,
                      objective.dtype, objective.autocast, say)
    sampler.fit(pairs.cache.shape, wanted, agree=lambda size: -ranks.largest(-size), free=half_of_memory)
    improver = Improver(sampler, model.latent_scale, settings.improvement.offload)
    improver.offload()
    return improver


def grids_of_pairs(model: Model, settings: Seppo, cache: LatentCache | ClipStream, folder: Path, dtype: torch.dtype,
                   device: torch.device) -> Grids:
    """Grids of the data's first pairs: loser, what is made of it, winner."""
    rows = cache.rows(range(min(PROMPTS, len(cache))), [0] * min(PROMPTS, len(cache)))
    assert rows.loser_mean is not None, "the cache was made without losers"
    per_prompt = settings.samples.per_prompt
    losers = rows.loser_mean.repeat_interleave(per_prompt, 0)
    prompts = [prompt for prompt in rows.prompts for _ in range(per_prompt)]
    conditions = {name: value.to(device, dtype) for name, value in (cache.embeddings(prompts) | {IMAGE: losers}).items()}
    samples = settings.samples.model_copy(update={"prompts": rows.captions})
    pair = model.latent_scale.scaled(rows.loser_mean), model.latent_scale.scaled(rows.mean)
    return Grids(folder, model, samples, conditions, cache.shape, device, pair)
