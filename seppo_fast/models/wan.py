"""Wan 2.1 and 2.2: videos by a transformer on patches of a 3-D VAE's latents, with prompts of UMT5."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import WanPipeline
from diffusers.loaders import WanLoraLoaderMixin
from torch import Tensor, nn

from seppo_fast.errors import UserError
from seppo_fast.extras import need
from seppo_fast.models import common
from seppo_fast.models.contract import AT_ONCE, Conditions, Vae
from seppo_fast.models.directory import Components, Directory
from seppo_fast.models.flows import T5, FlowTransformer, check_transformer, per_channel
from seppo_fast.models.latents import LatentScale
from seppo_fast.models.values import ADVICE

TOKENS = 512  # as `WanPipeline` calls its text encoder by default; fewer where the tokenizer says so
SIDE = 16  # pixels of which `WanPipeline` wants sides to be multiples, whatever the patches


class Wan(FlowTransformer):
    """A Wan directory, for text to video. Conditions: `prompt_embeds` (B, 512, D) of UMT5, zeros after the prompt's end.

    A video of 4k + 1 frames has k + 1 latent frames. Wan 2.2 TI2V-5B, whose pipeline has `expand_timesteps`, is told the time of
    each token, which is the same for all.
    """

    name = "wan"
    video = True
    usual_frames = 17
    components: Components = {
        "transformer": ("WanTransformer3DModel",), "vae": ("AutoencoderKLWan",), "text_encoder": ("UMT5EncoderModel",),
        "tokenizer": T5, "scheduler": (),
    }
    lora_loader: Any = WanLoraLoaderMixin
    pipeline = WanPipeline
    guidance = True
    sample_size = None  # the published ones are made for 832x480 or 1280x704

    def __init__(self, directory: Directory) -> None:
        check_experts(directory)
        config = directory.configs["transformer"]
        patches = config.get("patch_size", (1, 2, 2))
        self.patch: int = patches[-1]
        super().__init__(directory)
        self.multiple = math.lcm(SIDE, self.multiple)
        self.expand_timesteps = bool(directory.index.get("expand_timesteps"))
        self.frame_rate = 24 if self.expand_timesteps else 16  # of TI2V-5B, and of Wan 2.1
        file = self.path / "transformer" / "config.json"
        if [*patches] != [1, self.patch, self.patch] or self.expand_timesteps and self.patch != 2:
            raise UserError(f"{file}: patch_size is {patches}, where one latent frame and a square are needed"
                            + ", of 2 x 2 where model_index.json has expand_timesteps." * self.expand_timesteps)
        text = self.text_config("text_encoder")
        channels, alone = (self.latent_channels, "the VAE"), "text-to-video"
        check_transformer(directory, self._kind, {
            "in_channels": channels, "out_channels": channels, "text_dim": (text.d_model, "text_encoder"),
            "image_dim": (None, alone), "added_kv_proj_dim": (None, alone), "pos_embed_seq_len": (None, alone),
        })
        if self.scheduler_config.get("use_dynamic_shifting"):
            raise UserError(f"{self.path / 'scheduler' / 'scheduler_config.json'}: use_dynamic_shifting is set, and WanPipeline"
                            " gives its scheduler no number of tokens; remove it.")
        if directory.weights:  # not where a model is only planned
            need("ftfy", "WanPipeline's cleaning of prompts", "seppo-fast[video]")
        self.tokens = common.check_vocabulary(directory, "text_encoder", most=TOKENS)
        self.prompt_tokens = {"text_encoder": self.tokens}
        self.condition_shapes = {"prompt_embeds": (self.tokens, text.d_model)}

    def vae_facts(self) -> tuple[int, int, LatentScale]:
        """Latent channels, pixels per latent along a side, and how latents are scaled."""
        config, file = self.directory.configs["vae"], self.path / "vae" / "config.json"
        halved = config.get("temperal_downsample", (False, True, True))
        pixels = 2 ** (len(config.get("dim_mult", (1, 2, 4, 4))) - 1) * (config.get("patch_size") or 1)
        self.frames_a_latent: int = 2 ** sum(halved)
        for key, found, usual in (("scale_factor_spatial", pixels, 8), ("scale_factor_temporal", self.frames_a_latent, 4)):
            if config.get(key, usual) != found:
                raise UserError(f"{file}: {key} is {config.get(key, usual)}, but its layers (dim_mult, temperal_downsample,"
                                f" patch_size) shrink by {found}. {ADVICE}.")
        for key in ("in_channels", "out_channels"):
            if config.get(key, 3) != (colours := 3 * (config.get("patch_size") or 1) ** 2):
                raise UserError(f"{file}: {key} is {config.get(key, 3)}, where 3 colours and its patch_size make {colours}."
                                f" {ADVICE}.")
        if self.frames_a_latent != 4:
            raise UserError(f"{file}: temperal_downsample is {halved}, which shrinks time by {self.frames_a_latent};"
                            " AutoencoderKLWan takes clips four frames at a time, so that two of its levels must halve it.")
        channels = config.get("z_dim", 16)
        return channels, pixels, per_channel(self.directory, self.vae_kind, channels)

    def latent_shape(self, side: int, frames: int) -> tuple[int, ...]:
        """(C, F', h, w) of a video of `side` pixels."""
        channels, *sides = super().latent_shape(side, frames)
        return (channels, (frames - 1) // self.frames_a_latent + 1, *sides)

    def check_frames(self, frames: int) -> None:
        """`UserError` where the VAE cannot make whole latent frames of so many frames."""
        each = self.frames_a_latent
        if (frames - 1) % each:
            below = max(frames - 1, 0) // each * each + 1
            raise UserError(f"{self.directory.labels.frames}: {frames}, but {self.path} makes videos of {each}k + 1 frames: set"
                            f" it to {below} or {below + each}")
        self._check_positions("frames", (frames - 1) // each + 1, frames)

    def check_side(self, side: int) -> None:
        """`UserError` where videos of `side` pixels have more patches along a side than the transformer has positions."""
        self._check_positions("pixels along a side", side // self.vae_scale_factor // self.patch, side)

    def _check_positions(self, of: str, needed: int, given: int) -> None:
        most = self.directory.configs["transformer"].get("rope_max_seq_len", 1024)
        if needed > most:
            raise UserError(f"{self.path}: {given} {of} need {needed} positions, and its transformer has {most} (rope_max_seq_len)")

    def embed(self, pipeline: Any, prompts: list[str], device: torch.device) -> Conditions:
        """The conditions of prompts, by the pipeline's `encode_prompt`."""
        embeds, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=self.tokens,
                                           device=device)
        return {"prompt_embeds": embeds}

    def encode(self, vae: Vae, pixels: Tensor, at_once: int = AT_ONCE) -> tuple[Tensor, Tensor]:
        """Clips (B, F, 3, H, W) in [-1, 1] -> posterior mean and standard deviation, (B, C, F', h, w) fp32, not scaled.

        A clip at a time; the VAE itself takes the first frame, and then four by four.
        """
        return super().encode(vae, pixels.transpose(1, 2), 1)

    def decode(self, vae: Vae, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, F', h, w) -> pixels (B, F, 3, H, W) fp32 in [0, 1], a clip at a time."""
        return torch.cat([super(Wan, self).decode(vae, clip).transpose(1, 2) for clip in latents.split(1)])

    def denoise(self, denoiser: nn.Module, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """The network's output (B, C, F', h, w) for latents (B, C, F', h, w) at timesteps (B,), 0 to 1000."""
        if self.expand_timesteps:
            _, _, frames, height, width = latents.shape
            timesteps = timesteps[:, None].expand(-1, frames * (height // 2) * (width // 2))
        return denoiser(hidden_states=latents, timestep=timesteps, encoder_hidden_states=conditions["prompt_embeds"],
                        return_dict=False)[0]

    def set_timesteps(self, scheduler: Any, steps: int, latents: Sequence[int]) -> None:
        """As the pipeline does."""
        scheduler.set_timesteps(steps)
        scheduler.set_begin_index(0)


def check_experts(directory: Directory) -> None:
    """Refuse Wan 2.2 A14B, which has a second transformer for the later steps."""
    index, value = directory.index, directory.index.get("transformer_2")
    if index.get("boundary_ratio") is not None or isinstance(value, list) and value[1] is not None:
        raise UserError(f"{directory.path / 'model_index.json'}: it has two transformers (transformer_2, boundary_ratio"
                        f" {index.get('boundary_ratio')}), as Wan 2.2 A14B: one for the noisy steps and one for the others. Only"
                        " models of one transformer can be trained: Wan 2.1 (1.3B, 14B), or Wan 2.2 TI2V-5B.")
