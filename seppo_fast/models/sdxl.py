"""Stable Diffusion XL: two text encoders, a pooled embedding, and the picture's size as a condition."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from torch import Tensor, nn

from seppo_fast.errors import UserError
from seppo_fast.models import common
from seppo_fast.models.contract import Adapt, Conditions, unchanged
from seppo_fast.models.directory import Components, Directory
from seppo_fast.models.pipeline import UNetPipeline
from seppo_fast.models.pix2pix import SCALES, network_input

TIME_IDS = 6


class StableDiffusionXL(UNetPipeline):
    """A Stable Diffusion XL base directory. Conditions: `prompt_embeds` (B, 77, D1 + D2) and `pooled` (B, P).

    With an `image_condition` also `image_latents` (B, C, h, w), unscaled: then it is, or will be, an InstructPix2Pix pipeline.
    """

    name = "sdxl"
    text_encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2")
    components: Components = {
        "unet": ("UNet2DConditionModel",), "vae": ("AutoencoderKL",), "text_encoder": ("CLIPTextModel",),
        "text_encoder_2": ("CLIPTextModelWithProjection",), "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"), "scheduler": (),
    }
    lora_loader: Any = StableDiffusionXLLoraLoaderMixin

    def __init__(self, directory: Directory) -> None:
        first, second, unet = (directory.configs[name] for name in ("text_encoder", "text_encoder_2", "unet"))
        common.check_schedule(directory)
        width = first.get("hidden_size", 512) + second.get("hidden_size", 512)
        common.check_unet(directory, width, addition="text_time")
        pooled = second.get("projection_dim", 512)
        expected = TIME_IDS * (unet.get("addition_time_embed_dim") or 0) + pooled
        if unet.get("projection_class_embeddings_input_dim") != expected:
            raise UserError(
                f"{directory.path / 'unet' / 'config.json'}: projection_class_embeddings_input_dim is "
                f"{unet.get('projection_class_embeddings_input_dim')}, but six size conditions and a pooled embedding "
                f"of {pooled} make {expected}. Only SDXL base models can be trained (no refiner)."
            )
        self.prompt_tokens = {part: common.check_vocabulary(directory, part, pooled=part == "text_encoder_2")
                              for part in self.text_encoders}
        common.check_lengths(directory, self.prompt_tokens)
        super().__init__(directory)
        self.condition_shapes = {"prompt_embeds": (self.prompt_tokens["text_encoder"], width), "pooled": (pooled,)}
        self.image_scale = self.latent_scale.factor if directory.index.get(SCALES) else 1.0
        self.zeros_for_empty_prompt: bool = directory.index.get("force_zeros_for_empty_prompt", True)

    def load_text(
        self, device: torch.device | str, dtype: torch.dtype = torch.float32, adapt: Adapt = unchanged
    ) -> Callable[[list[str]], Conditions]:
        """Prompts -> conditions on `device`, as `StableDiffusionXLPipeline.encode_prompt` makes them; `adapt` changes encoders."""
        tokenizers = [common.load_tokenizer(self.directory, name) for name in ("tokenizer", "tokenizer_2")]
        encoders = [common.load_text_encoder(self.directory, name, device, dtype, adapt) for name in self.text_encoders]

        @torch.no_grad()
        def embed(prompts: list[str]) -> Conditions:
            outputs = []
            for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
                tokens = common.token_ids(tokenizer, encoder.config, prompts)
                outputs.append(encoder(tokens["input_ids"].to(device), output_hidden_states=True))
            embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
            pooled = outputs[1].text_embeds
            if self.zeros_for_empty_prompt:
                # masked_fill, because 0 * NaN would not be 0
                empty = torch.tensor([prompt == "" for prompt in prompts], device=embeds.device)
                embeds = embeds.masked_fill(empty[:, None, None], 0)
                pooled = pooled.masked_fill(empty[:, None], 0)
            return {"prompt_embeds": embeds, "pooled": pooled}

        return embed

    def denoise(self, unet: nn.Module, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """The network's output (B, C, h, w) for latents (B, C, h, w) at timesteps (B,)."""
        size = {"text_embeds": conditions["pooled"], "time_ids": self.time_ids(latents)}
        return unet(network_input(latents, conditions, self.image_scale), timesteps,
                    encoder_hidden_states=conditions["prompt_embeds"], added_cond_kwargs=size, return_dict=False)[0]

    def time_ids(self, latents: Tensor) -> Tensor:
        """(B, 6) fp32: original size, crop corner, target size in pixels, as if nothing were cropped (DiffusionDPO)."""
        height, width = (side * self.vae_scale_factor for side in latents.shape[-2:])
        # filled on the device: a copy from the host waits for the device, and a CUDA graph cannot capture it
        ids = torch.zeros(latents.shape[0], TIME_IDS, device=latents.device)
        ids[:, 0::4] = height
        ids[:, 1::4] = width
        return ids
