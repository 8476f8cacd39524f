"""Stable Diffusion 1.x and 2.x: one text encoder, its last hidden state."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from torch import Tensor, nn

from seppo_fast.models import common
from seppo_fast.models.contract import Adapt, Conditions, unchanged
from seppo_fast.models.directory import Components, Directory
from seppo_fast.models.pipeline import UNetPipeline
from seppo_fast.models.pix2pix import network_input


class StableDiffusion(UNetPipeline):
    """A Stable Diffusion pipeline directory. Conditions: `prompt_embeds` (B, 77, D).

    With an `image_condition` also `image_latents` (B, C, h, w), unscaled: then it is, or will be, an InstructPix2Pix pipeline.
    """

    name = "sd"
    text_encoders: tuple[str, ...] = ("text_encoder",)
    components: Components = {
        "unet": ("UNet2DConditionModel",), "vae": ("AutoencoderKL",), "text_encoder": ("CLIPTextModel",),
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"), "scheduler": (),
    }
    lora_loader: Any = StableDiffusionLoraLoaderMixin

    def __init__(self, directory: Directory) -> None:
        common.check_schedule(directory)
        width = directory.configs["text_encoder"].get("hidden_size", 512)
        common.check_unet(directory, width, addition=None)
        self.prompt_tokens = {"text_encoder": common.check_vocabulary(directory, "text_encoder")}
        super().__init__(directory)
        self.condition_shapes = {"prompt_embeds": (self.prompt_tokens["text_encoder"], width)}

    def load_text(
        self, device: torch.device | str, dtype: torch.dtype = torch.float32, adapt: Adapt = unchanged
    ) -> Callable[[list[str]], Conditions]:
        """Prompts -> conditions on `device`, as `StableDiffusionPipeline.encode_prompt` makes them; `adapt` changes the encoder."""
        tokenizer = common.load_tokenizer(self.directory, "tokenizer")
        encoder = common.load_text_encoder(self.directory, "text_encoder", device, dtype, adapt)

        @torch.no_grad()
        def embed(prompts: list[str]) -> Conditions:
            tokens = common.token_ids(tokenizer, encoder.config, prompts)
            masked = getattr(encoder.config, "use_attention_mask", False)
            mask = tokens["attention_mask"].to(device) if masked else None
            states = encoder(tokens["input_ids"].to(device), attention_mask=mask)
            return {"prompt_embeds": states.last_hidden_state}

        return embed

    def denoise(self, unet: nn.Module, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """The network's output (B, C, h, w) for latents (B, C, h, w) at timesteps (B,)."""
        return unet(network_input(latents, conditions), timesteps, encoder_hidden_states=conditions["prompt_embeds"],
                    return_dict=False)[0]
