"""Models that can be planned before they are downloaded, by their published configurations."""

import re
from pathlib import Path
from typing import Any

from seppo_fast.models import Model, add_image_condition
from seppo_fast.models.animatediff import AnimateDiff
from seppo_fast.models.directory import HERE, Directory
from seppo_fast.models.families import FAMILIES
from seppo_fast.models.schedules import FLOW

Configs = dict[str, dict[str, Any]]  # by component; "model_index" has what the pipeline's own file says besides them
INDEX = "model_index"

SCHEDULER = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
             "num_train_timesteps": 1000, "steps_offset": 1, "skip_prk_steps": True, "set_alpha_to_one": False}
VAE = {"block_out_channels": [128, 256, 512, 512], "latent_channels": 4, "layers_per_block": 2,
       "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}

# Keys that are missing here have diffusers' defaults.
SD15: Configs = {
    "unet": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280]},
    "vae": VAE | {"scaling_factor": 0.18215, "sample_size": 512},
    "text_encoder": {"hidden_size": 768},
    "scheduler": SCHEDULER,
}
SDXL: Configs = {
    "unet": {
        "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10], "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    },
    "vae": VAE | {"scaling_factor": 0.13025, "sample_size": 1024},
    "text_encoder": {"hidden_size": 768},
    "text_encoder_2": {"hidden_size": 1280, "projection_dim": 1280},
    "scheduler": SCHEDULER | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"},
}

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
          "projection_dim": 768}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
          "projection_dim": 1280}
T5_XXL = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
          "feed_forward_proj": "gated-gelu"}
FLOW_VAE = VAE | {"latent_channels": 16, "sample_size": 1024, "use_quant_conv": False, "use_post_quant_conv": False}
SD3: Configs = {
    "transformer": {
        "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24, "attention_head_dim": 64,
        "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
    },
    "vae": FLOW_VAE | {"scaling_factor": 1.5305, "shift_factor": 0.0609},
    "text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "text_encoder_3": T5_XXL,
    "scheduler": {"_class_name": FLOW, "num_train_timesteps": 1000, "shift": 3.0},
}
SD35_MEDIUM = SD3 | {"transformer": SD3["transformer"] | {
    "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": list(range(13))}}
SD35_LARGE = SD3 | {"transformer": SD3["transformer"] | {
    "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"}}
FLUX_DEV: Configs = {
    "transformer": {
        "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
        "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
    },
    "vae": FLOW_VAE | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    "text_encoder": CLIP_L, "text_encoder_2": T5_XXL,
    "scheduler": {"_class_name": FLOW, "num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5,
                  "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096},
}
FLUX_SCHNELL = FLUX_DEV | {
    "transformer": FLUX_DEV["transformer"] | {"guidance_embeds": False},
    "scheduler": FLUX_DEV["scheduler"] | {"shift": 1.0, "use_dynamic_shifting": False},
}
UMT5_XXL = T5_XXL | {"vocab_size": 256384}
UNIPC = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True,
         "num_train_timesteps": 1000}
WAN_14B: Configs = {
    "transformer": {
        "patch_size": [1, 2, 2], "in_channels": 16, "out_channels": 16, "num_layers": 40, "attention_head_dim": 128,
        "num_attention_heads": 40, "ffn_dim": 13824, "text_dim": 4096, "freq_dim": 256,
    },
    "vae": {"base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True]},
    "text_encoder": UMT5_XXL,
    "scheduler": UNIPC | {"flow_shift": 3.0},
}
WAN_1_3B = WAN_14B | {"transformer": WAN_14B["transformer"] | {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}}
WAN_TI2V = WAN_14B | {
    "transformer": WAN_14B["transformer"] | {
        "in_channels": 48, "out_channels": 48, "num_layers": 30, "num_attention_heads": 24, "ffn_dim": 14336},
    "vae": WAN_14B["vae"] | {
        "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12,
        "patch_size": 2, "scale_factor_spatial": 16, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48},  # true ones not needed
    "scheduler": UNIPC | {"flow_shift": 5.0},
    INDEX: {"expand_timesteps": True},
}
QWEN_VL: dict[str, Any] = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "vocab_size": 152064, "tie_word_embeddings": False, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584},
}
QWEN_IMAGE: Configs = {
    "transformer": {
        "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 60, "attention_head_dim": 128,
        "num_attention_heads": 24, "joint_attention_dim": 3584, "axes_dims_rope": [16, 56, 56],
    },
    "vae": {"base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True]},
    "text_encoder": QWEN_VL,
    "scheduler": {"_class_name": FLOW, "num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": True, "base_shift": 0.5,
                  "max_shift": 0.9, "base_image_seq_len": 256, "max_image_seq_len": 8192, "shift_terminal": 0.02},
}
KLEIN_4B: Configs = {
    "transformer": {
        "patch_size": 1, "in_channels": 128, "num_layers": 5, "num_single_layers": 20, "attention_head_dim": 128,
        "num_attention_heads": 24, "joint_attention_dim": 7680, "guidance_embeds": False,
    },
    "vae": VAE | {"latent_channels": 32},
    "text_encoder": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
                     "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True},
    "scheduler": FLUX_DEV["scheduler"],
    INDEX: {"is_distilled": True},
}
PUBLISHED: dict[str, tuple[str, Configs]] = {  # each with its pipeline's class
    "stable-diffusion-v1-5/stable-diffusion-v1-5": ("StableDiffusionPipeline", SD15),
    "runwayml/stable-diffusion-v1-5": ("StableDiffusionPipeline", SD15),
    "stabilityai/stable-diffusion-xl-base-1.0": ("StableDiffusionXLPipeline", SDXL),
    "stabilityai/stable-diffusion-3-medium-diffusers": ("StableDiffusion3Pipeline", SD3),
    "stabilityai/stable-diffusion-3.5-medium": ("StableDiffusion3Pipeline", SD35_MEDIUM),
    "stabilityai/stable-diffusion-3.5-large": ("StableDiffusion3Pipeline", SD35_LARGE),
    "black-forest-labs/FLUX.1-dev": ("FluxPipeline", FLUX_DEV),
    "black-forest-labs/FLUX.1-schnell": ("FluxPipeline", FLUX_SCHNELL),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": ("WanPipeline", WAN_1_3B),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": ("WanPipeline", WAN_14B),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": ("WanPipeline", WAN_TI2V),
    "Qwen/Qwen-Image": ("QwenImagePipeline", QWEN_IMAGE),
    "black-forest-labs/FLUX.2-klein-4B": ("Flux2KleinPipeline", KLEIN_4B),
    "black-forest-labs/FLUX.2-klein-base-4B": ("Flux2KleinPipeline", KLEIN_4B | {INDEX: {"is_distilled": False}}),
}


# AnimateDiff's adapters for Stable Diffusion 1.x, with diffusers' defaults but for these.
ADAPTERS: Configs = {
    "guoyww/animatediff-motion-adapter-v1-4": {"motion_max_seq_length": 24, "use_motion_mid_block": False},
    "guoyww/animatediff-motion-adapter-v1-5": {"motion_max_seq_length": 24, "use_motion_mid_block": False},
    "guoyww/animatediff-motion-adapter-v1-5-2": {},
    "guoyww/animatediff-motion-adapter-v1-5-3": {"use_motion_mid_block": False},
}


def published_model(path: str, motion_adapter: str | None = None, image_condition: bool = False) -> Model | None:
    """The model of these hub ids without weights, for planning; it cannot be loaded. None where its shape is not known."""
    model = _published(path, motion_adapter)
    return add_image_condition(model) if model is not None and image_condition else model


def _published(path: str, motion_adapter: str | None) -> Model | None:
    pipeline, configs = PUBLISHED.get(path, ("", {}))
    if not pipeline or motion_adapter is not None and (motion_adapter not in ADAPTERS or pipeline != "StableDiffusionPipeline"):
        return None
    kinds = {part: [None, allowed[0]] for part, allowed in FAMILIES[pipeline].components.items() if allowed}
    directory = Directory(Path(path), kinds | configs.get(INDEX, {}) | {"_class_name": pipeline}, configs, {})
    if motion_adapter is not None:
        return AnimateDiff(directory, Directory(Path(motion_adapter), {}, {HERE: ADAPTERS[motion_adapter]}, {}))
    return FAMILIES[pipeline](directory)


# What people ask for and cannot be trained here, by what their ids on the hub contain (regular expressions).
OTHERS = {"flux.2-dev": "FLUX.2-dev", "qwen-image-edit": "Qwen-Image-Edit", "qwen-image-layered": "Qwen-Image-Layered",
          "wan2.*a14b": "Wan 2.2 A14B", "wan2.*(?:(?<!t)i2v|flf2v)": "Wan image-to-video", "wan2.*vace": "Wan VACE",
          "pixart": "PixArt", "z-image": "Z-Image", "hunyuan": "Hunyuan", "cogvideo": "CogVideoX", "ltx-video": "LTX-Video",
          "sana": "Sana", "kandinsky": "Kandinsky", "stable-cascade": "Stable Cascade"}


def supported(path: str) -> str:
    """What the model behind a hub id must be, with a warning where its name says that it is another one."""
    other = next((family for word, family in OTHERS.items() if re.search(rf"(?<![a-z]){word}", path.lower())), None)
    families = " or ".join(family.removesuffix("Pipeline") for family in FAMILIES)
    if other is None:
        return f"what can be trained is a {families} pipeline; another one will be refused when it is there"
    return f"by its name it is a {other} model, and no {families} pipeline, which is what can be trained: choose another model"
