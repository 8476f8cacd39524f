"""What the ways draw with a seed's base: the trainer's sampler on the trainer's network, without a training."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.time_to_quality.ways import PAPER, Settings, overrides
from seppo_fast.config import Seppo
from seppo_fast.configfile import load_config
from seppo_fast.models import open_model
from seppo_fast.models.prepare import prepare_denoisers
from seppo_fast.models.trial import block_inputs, call_once
from seppo_fast.quickstart.digits import CAPTIONS, RESOLUTION
from seppo_fast.quickstart.models import KINDS
from seppo_fast.reference import Sampler
from seppo_fast.reference.adapter import beside
from seppo_fast.reference.guidance import guided
from seppo_fast.reference.solver import rollout_table
from seppo_fast.seeds import normal
from seppo_fast.training.adapter import adapted_network
from seppo_fast.training.adapter import read as read_adapter

CPU = torch.device("cpu")


class Rollouts:
    """The base of a seed, on which each way has its sampler, as a run of it has in the first iteration; in fp32 on the CPU."""

    def __init__(self, home: Path, seed: int, settings: Settings) -> None:
        self.home, self.seed, self.settings = home, seed, settings
        self.model = model = open_model(str(home / "base"))
        self.shape = model.latent_shape(RESOLUTION, 1)
        self.network = model.load_denoiser(torch.float32).eval().requires_grad_(False)
        prepare_denoisers([self.network], self.keys(PAPER).networks, self.shape[1:], torch.float32, CPU,
                          inputs=partial(block_inputs, model.empty_denoiser, partial(call_once, model)))
        self.embeds, self.empty = (model.load_text("cpu")(prompts) for prompts in (list(CAPTIONS), [""]))

    def keys(self, way: str) -> Seppo:
        """The way's section of the configuration."""
        return load_config(KINDS[self.settings.model].config, overrides(self.home.parent, self.seed, way, self.settings)).seppo

    def sampler(self, way: str) -> Sampler:
        """What a run of the way draws with."""
        ours = self.keys(way)
        denoise, guidance = guided(self.model, ours.sampler.guidance_scale, self.empty)
        adapter = read_adapter(ours, self.model)
        adapted = [] if adapter is None else beside(self.network, adapted_network(adapter, self.model), CPU, torch.float32)
        return Sampler(self.network, denoise, rollout_table(self.model, ours.sampler, self.shape), self.empty, guidance,
                       ours.sampler, torch.float32, adapted=adapted)

    def draw(self, sampler: Sampler, numbers: Sequence[int], purpose: str = "initial noise") -> Tensor:
        """Scaled latents of these samples, whose captions take turns; their noise depends on (seed, purpose, number) alone."""
        labels = torch.tensor([*map(label_of, numbers)])
        return sampler.draw(normal(self.shape, self.seed, purpose, numbers),
                            {name: value[labels] for name, value in self.embeds.items()},
                            later=lambda index: normal(self.shape, self.seed, f"{purpose}, later {index}", numbers))


def label_of(number: int) -> int:
    """The digit in a sample's caption."""
    return number % len(CAPTIONS)
