"""FLUX.2 klein: hidden states of Qwen3, a transformer on 2 x 2 patches of latents, which the VAE's batch norm normalises."""

from typing import Any

import torch
from diffusers import Flux2KleinPipeline
from diffusers.loaders import Flux2LoraLoaderMixin
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import pad

from seppo_fast.errors import UserError
from seppo_fast.models import common
from seppo_fast.models.contract import AT_ONCE, Conditions, Vae
from seppo_fast.models.directory import Components, Directory
from seppo_fast.models.files import load_pickle
from seppo_fast.models.flows import FlowTransformer, check_transformer
from seppo_fast.models.flux import places
from seppo_fast.models.latents import LatentScale
from seppo_fast.models.values import ADVICE

TOKENS = 512  # as `Flux2KleinPipeline` calls Qwen3 by default; fewer where the tokenizer says so
LAYERS = (9, 18, 27)  # of Qwen3, put side by side
STEPS = 50  # the pipeline's default
STATISTICS = ("bn.running_mean", "bn.running_var")
MARK = "(prompt)"


class Flux2Klein(FlowTransformer):
    """A FLUX.2 klein directory, base or distilled. Conditions: `prompt_embeds` (B, 512, 3 D) of Qwen3, template and padding too.

    Its latents (B, 4 C, h / 2, w / 2) are patches of the VAE's (B, C, h, w). Training shifts times as the pipeline does for
    its default of 50 steps. The base models are guided by a second call; the pipeline never guides the distilled ones.
    """

    name = "flux2_klein"
    components: Components = {
        "transformer": ("Flux2Transformer2DModel",), "vae": ("AutoencoderKLFlux2",), "text_encoder": ("Qwen3ForCausalLM",),
        "tokenizer": ("Qwen2TokenizerFast", "Qwen2Tokenizer"), "scheduler": (),
    }
    lora_loader: Any = Flux2LoraLoaderMixin
    pipeline = Flux2KleinPipeline
    patch = 1
    sample_size = 64  # half of `Flux2KleinPipeline.default_sample_size`, which counts the VAE's

    def __init__(self, directory: Directory) -> None:
        super().__init__(directory)
        config, text = directory.configs["transformer"], self.text_config("text_encoder")
        channels, why = self.latent_channels, "the VAE, of whose latents 2 x 2 are one token,"
        check_transformer(directory, self._kind, {
            "in_channels": (channels, why), "out_channels": (config.get("out_channels") and channels, why),
            "patch_size": (1, "the patches of the VAE's latents"),
            "joint_attention_dim": (len(LAYERS) * text.hidden_size, "text_encoder, of which three layers are put side by side,"),
            "guidance_embeds": (False, "the pipeline, which gives it no guidance scale,"),
        })
        if text.num_hidden_layers < max(LAYERS):
            raise UserError(f"{self.path / 'text_encoder' / 'config.json'}: num_hidden_layers is {text.num_hidden_layers}, and the"
                            f" pipeline takes the hidden states of layers {LAYERS}. {ADVICE}.")
        self.tokens = min(TOKENS, common.check_vocabulary(directory, "text_encoder", most=TOKENS))
        self.prompt_tokens = {"text_encoder": self.tokens - template_tokens(directory, self.tokens)}
        self.condition_shapes = {"prompt_embeds": (self.tokens, len(LAYERS) * text.hidden_size)}
        self.guidance = not is_distilled(directory)

    def vae_facts(self) -> tuple[int, int, LatentScale]:
        """Channels and pixels of a patch of 2 x 2 latents, and how patches are scaled."""
        config = self.directory.configs["vae"]
        if (patch := config.get("patch_size", [2, 2])) != [2, 2]:
            raise UserError(f"{self.path / 'vae' / 'config.json'}: patch_size is {patch}, and the pipeline makes patches"
                            f" of 2 x 2 latents. {ADVICE}.")
        levels, channels = len(config.get("block_out_channels", (128, 256, 512, 512))), 4 * config.get("latent_channels", 32)
        return channels, 2**levels, patch_scale(self.directory, channels)

    def embed(self, pipeline: Any, prompts: list[str], device: torch.device) -> Conditions:
        """The conditions of prompts, by the function of the pipeline; without Qwen3's head, whose output it does not use."""
        return {"prompt_embeds": pipeline._get_qwen3_prompt_embeds(pipeline.text_encoder.model, pipeline.tokenizer, prompts,
                                                                   device=device, max_sequence_length=self.tokens)}

    def encode(self, vae: Vae, pixels: Tensor, at_once: int = AT_ONCE) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, H, W) in [-1, 1] -> the patches' posterior mean and standard deviation, (B, 4 C, h, w) fp32, not scaled."""
        mean, std = super().encode(vae, pixels, at_once)
        return Flux2KleinPipeline._patchify_latents(mean), Flux2KleinPipeline._patchify_latents(std)

    def decode(self, vae: Vae, latents: Tensor) -> Tensor:
        """Scaled latents (B, 4 C, h, w) -> pixels (B, 3, H, W) fp32 in [0, 1]."""
        patches = self.latent_scale.unscaled(latents.to(vae.device, torch.float32))
        return common.decode(vae, Flux2KleinPipeline._unpatchify_latents(patches), LatentScale(1.0))

    def denoise(self, denoiser: nn.Module, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """The network's output (B, 4 C, h, w) for latents (B, 4 C, h, w) at timesteps (B,), 0 to 1000."""
        embeds = conditions["prompt_embeds"]
        numbers = torch.arange(embeds.shape[1], device=latents.device)
        output = denoiser(
            hidden_states=latents.flatten(2).transpose(1, 2), timestep=timesteps / 1000, encoder_hidden_states=embeds,
            txt_ids=pad(numbers[:, None], (3, 0)), img_ids=pad(places(*latents.shape[-2:], latents.device), (0, 1)),
            return_dict=False)[0]
        return output.transpose(1, 2).reshape(latents.shape)

    def mu(self, tokens: int, steps: int | None) -> float:
        """The mu for so many tokens and steps (None: the pipeline's default), as the pipeline computes it."""
        return compute_empirical_mu(tokens, steps or STEPS)


def patch_scale(directory: Directory, channels: int) -> LatentScale:
    """How the pipeline normalises patches of latents: by statistics that are among the VAE's weights."""
    if not directory.weights:  # a model whose shape alone is known
        return LatentScale((1.0,) * channels, (0.0,) * channels)
    found: dict[str, Tensor] = {}
    for file in directory.weights["vae"].files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                found |= {name: tensors.get_tensor(name) for name in STATISTICS if name in tensors.keys()}
        elif file.suffix == ".bin":
            found |= {name: value for name, value in load_pickle(file, "cpu").items() if name in STATISTICS}
    where = directory.path / "vae" / directory.weights["vae"].entry
    if missing := [name for name in STATISTICS if name not in found]:
        raise UserError(f"{where} lacks {' and '.join(missing)}, by which the pipeline normalises latents. {ADVICE}.")
    mean, variance = (found[name].double().flatten() for name in STATISTICS)
    if not (mean.isfinite().all() and variance.isfinite().all() and (variance >= 0).all()):
        raise UserError(f"{where}: {' or '.join(STATISTICS)}, by which the pipeline normalises latents, holds values that are not"
                        f" finite, or a negative variance. {ADVICE}.")
    factor = (variance + directory.configs["vae"].get("batch_norm_eps", 1e-4)).rsqrt()
    return LatentScale(tuple(factor.tolist()), tuple(mean.tolist()))


def template_tokens(directory: Directory, most: int) -> int:
    """How many of a prompt's `most` tokens are the chat template's. Refuses a tokenizer that has no fitting template."""
    if not directory.weights:  # a model whose shape alone is known
        return 0
    tokenizer, place = common.load_tokenizer(directory, "tokenizer"), directory.path / "tokenizer"
    with common.explained(directory, "tokenizer"):
        text = tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False, add_generation_prompt=True,
                                             enable_thinking=False)
    if MARK not in text:
        raise UserError(f"{place}: its chat template leaves the prompt out. {ADVICE}s.")
    taken = len(tokenizer(text.replace(MARK, ""), verbose=False)["input_ids"])
    if taken >= most:
        raise UserError(f"{place}: its chat template takes {taken} tokens, and the text encoder sees {most} (model_max_length), so"
                        f" that none is left for a prompt. {ADVICE}s.")
    return taken


def is_distilled(directory: Directory) -> bool:
    """Whether the pipeline ignores the guidance scale."""
    value = directory.index.get("is_distilled", False)
    if not isinstance(value, bool):
        raise UserError(f"{directory.path / 'model_index.json'}: is_distilled is {value!r}, where true or false is expected."
                        f" {ADVICE}.")
    return value
