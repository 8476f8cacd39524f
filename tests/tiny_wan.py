"""A tiny random Wan pipeline on disk, of its true architecture."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tiny import t5_tokenizer
from transformers import UMT5Config, UMT5EncoderModel

WAN_PIXELS, WAN_FRAMES, WAN_LATENTS = 32, 5, (4, 2, 8, 8)


def wan_vae(channels: int = 4, levels: int = 3, **overrides: Any) -> AutoencoderKLWan:
    """Three levels: 4 x 4 pixels a latent, and two that halve the time, as in the published ones."""
    settings = dict(
        base_dim=8, z_dim=channels, dim_mult=[1] * levels, num_res_blocks=1, temperal_downsample=[True, True],
        latents_mean=[0.1 * number for number in range(channels)], latents_std=[1.0 + 0.25 * number for number in range(channels)],
        scale_factor_spatial=2 ** (levels - 1), scale_factor_temporal=4,
    )
    return AutoencoderKLWan(**settings | overrides)


def tiny_wan(folder: Path | str, seed: int = 0, expand_timesteps: bool = False, vae: dict[str, Any] | None = None,
             shift: float = 3.0, **overrides: Any) -> Path:
    """A random `WanPipeline` directory: 5 frames of 32x32 pixels, (4, 2, 8, 8) latents, prompt embeds (32, 24)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokens = t5_tokenizer()
        tokens.model_max_length = 32
        text = UMT5EncoderModel(UMT5Config(vocab_size=len(tokens), d_model=24, d_kv=8, d_ff=48, num_layers=1, num_heads=2))
        autoencoder = wan_vae(**vae or {})
        channels = autoencoder.config.z_dim
        settings = dict(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=channels, out_channels=channels,
            text_dim=24, freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
        )
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
        pipeline = WanPipeline(tokenizer=tokens, text_encoder=text, vae=autoencoder, scheduler=scheduler,
                               transformer=WanTransformer3DModel(**settings | overrides), expand_timesteps=expand_timesteps)
        pipeline.save_pretrained(folder)
    return Path(folder)
