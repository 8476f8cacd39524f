"""What the families of flow-matching transformers share; each has its pipeline's own way of embedding prompts and setting steps."""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from seppo_fast.errors import UserError
from seppo_fast.models import common
from seppo_fast.models.contract import Adapt, Conditions, Denoiser, unchanged
from seppo_fast.models.directory import Directory, kind_of
from seppo_fast.models.latents import LatentScale
from seppo_fast.models.pipeline import Pipeline
from seppo_fast.models.schedules import check_shift, dynamic_shift, flow_config, static_shift
from seppo_fast.models.values import ADVICE

CLIP = ("CLIPTokenizer", "CLIPTokenizerFast")
T5 = ("T5TokenizerFast", "T5Tokenizer")


class FlowTransformer(Pipeline, ABC):
    """A pipeline whose transformer sees patches of `patch` latents along a side, and which is a flow."""

    denoiser = "transformer"
    image_condition = False
    embeds_guidance = False
    half = (torch.bfloat16,)  # the published ones were trained in it; T5 and FLUX's transformer overflow in fp16
    prediction_type = "flow"
    pipeline: Any  # its diffusers class
    patch: int
    text_encoders: tuple[str, ...] = ()

    def __init__(self, directory: Directory) -> None:
        super().__init__(directory)
        self.scheduler_config = flow_config(directory)
        self.num_train_timesteps: int = self.scheduler_config.get("num_train_timesteps", 1000)
        self.prompt_tokens: dict[str, int] = {}
        self.multiple = self.patch * self.vae_scale_factor
        self.text_encoders = tuple(part for part in type(self).components if part.startswith("text") and part in directory.configs)

    def vae_facts(self) -> tuple[int, int, LatentScale]:
        """Latent channels, pixels per latent along a side, and how latents are scaled."""
        check_vae(self.directory)
        return super().vae_facts()

    def load_denoiser(self, dtype: torch.dtype) -> Denoiser:
        """A fresh transformer from disk, on the CPU; what the pipeline keeps in fp32 is so here."""
        return common.load_component(self.directory, self.denoiser, self._kind, dtype)

    def empty_denoiser(self) -> Denoiser:
        """The transformer without weights, made under the caller's device."""
        return self._kind.from_config(dict(self.directory.configs[self.denoiser]))

    @property
    def _kind(self) -> Any:
        return kind_of(type(self).components[self.denoiser][0])

    def text_config(self, part: str) -> Any:
        """A text encoder's configuration, with its class's values for what the file leaves out."""
        return common.text_config(self.directory, part, kind_of(type(self).components[part][0]))

    def load_text(self, device: torch.device | str, dtype: torch.dtype = torch.float32, adapt: Adapt = unchanged
                  ) -> Callable[[list[str]], Conditions]:
        """Prompts -> conditions on `device`, by the pipeline's own `encode_prompt`; `adapt` changes text encoders."""
        parts: dict[str, Any] = {}
        for part in self.text_encoders:
            parts[part] = common.load_text_encoder(self.directory, part, device, dtype, adapt)
            tokenizer = part.replace("text_encoder", "tokenizer")
            parts[tokenizer] = common.load_tokenizer(self.directory, tokenizer)
            # The pipeline fills prompts up to this length; a tokenizer saved without it claims 1e30.
            parts[tokenizer].model_max_length = min(parts[tokenizer].model_max_length, self.prompt_tokens[part])
        with torch.device("meta"):
            transformer = self.empty_denoiser()  # whose configuration the pipeline reads
        missing = {part: None for part in type(self).components if part not in parts}
        pipeline = self.pipeline(**missing | parts | {"transformer": transformer})
        return torch.no_grad()(lambda prompts: self.embed(pipeline, prompts, torch.device(device)))

    @abstractmethod
    def embed(self, pipeline: Any, prompts: list[str], device: torch.device) -> Conditions:
        """The conditions of prompts, by a pipeline with text encoders alone."""

    def shift_of(self, latents: Sequence[int], steps: int | None = None) -> float:
        """The mu that the pipeline computes for `steps` (None: its default), where the scheduler wants one."""
        tokens = math.prod(side // self.patch for side in latents[-2:])
        mu = self.mu(tokens, steps)
        check_shift(dynamic_shift(self.scheduler_config, mu), self.path / "scheduler" / "scheduler_config.json",
                    f" for {tokens} tokens")
        return mu

    def mu(self, tokens: int, steps: int | None) -> float:
        """The mu for so many tokens, whatever the steps, as FLUX.1's pipeline computes it."""
        config = self.scheduler_config
        return calculate_shift(tokens, config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096),
                               config.get("base_shift", 0.5), config.get("max_shift", 1.15))

    def set_timesteps(self, scheduler: Any, steps: int, latents: Sequence[int]) -> None:
        """As most pipelines do: evenly from 1, with a shift by the number of tokens where the scheduler takes one."""
        sigmas = {} if scheduler.config.get("use_flow_sigmas") else {"sigmas": np.linspace(1.0, 1 / steps, steps)}
        mu = {"mu": self.shift_of(latents, steps)} if scheduler.config.get("use_dynamic_shifting") else {}
        scheduler.set_timesteps(**(sigmas or {"num_inference_steps": steps}), **mu)
        scheduler.set_begin_index(0)

    def check_side(self, side: int) -> None:
        """Positions are rotations, for images of any size."""

    def time_shift(self, latents: Sequence[int]) -> float:
        """The k of s' = k s / (1 + (k - 1) s), by which times are shifted for latents of this shape."""
        config = self.scheduler_config
        if config.get("use_dynamic_shifting"):
            return dynamic_shift(config, self.shift_of(latents))
        return static_shift(config)


def per_channel(directory: Directory, kind: type, channels: int) -> LatentScale:
    """The scale of a VAE, a `kind`, that has a mean and a standard deviation for each of its channels."""
    config, file = directory.configs["vae"], directory.path / "vae" / "config.json"
    defaults = inspect.signature(kind).parameters
    mean, std = (tuple(map(float, config.get(key) or defaults[key].default)) for key in ("latents_mean", "latents_std"))
    if len(mean) != channels or len(std) != channels or min(std) <= 0 or not all(map(math.isfinite, mean + std)):
        raise UserError(f"{file}: latents_mean and latents_std must be {channels} numbers each, as z_dim says, and the latter above"
                        f" 0; they are {len(mean)} and {len(std)}, from {min(std):g}. {ADVICE}.")
    return LatentScale(tuple(1 / value for value in std), mean)


def check_vae(directory: Directory) -> None:
    """Refuse a VAE whose latents the pipelines of this kind would not scale as training does, or could not decode."""
    if directory.configs["vae"].get("shift_factor") is None:
        raise UserError(f"{directory.path / 'vae' / 'config.json'}: it has no shift_factor, which"
                        f" {directory.index.get('_class_name')} adds to latents before it decodes them. {ADVICE}.")
    common.check_scaling(directory, ("latents_mean", "latents_std"), "scaling_factor and shift_factor are")


def check_transformer(directory: Directory, kind: type, expected: dict[str, Any]) -> None:
    """Refuse a transformer, a `kind`, whose configuration has other values than these: `key: (value, what decides it)`."""
    config, file = directory.configs["transformer"], directory.path / "transformer" / "config.json"
    defaults = inspect.signature(kind).parameters
    for key, (wanted, why) in expected.items():
        if (found := config.get(key, defaults[key].default)) != wanted:
            raise UserError(f"{file}: {key} is {found}, but {why} makes it {wanted}. Either a part of another model lies here, or"
                            " this is a model that edits or completes images or videos; only those that draw from a prompt alone"
                            " can be trained.")
