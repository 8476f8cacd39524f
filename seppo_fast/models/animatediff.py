"""AnimateDiff: Stable Diffusion 1.x with motion modules between its layers, for videos of F frames."""

from dataclasses import replace
from typing import Any

import torch
from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel
from torch import Tensor, nn

from seppo_fast.errors import UserError
from seppo_fast.models import common
from seppo_fast.models.contract import AT_ONCE, Conditions, Vae
from seppo_fast.models.directory import HERE, Components, Directory
from seppo_fast.models.sd import StableDiffusion

MOTION = "motion_modules"  # in the names of their weights, and of no others
MOTION_LENGTH = "motion_max_seq_length"
# The motion modules were trained with a linear schedule, unlike Stable Diffusion.
SCHEDULER = {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear",
             "steps_offset": 1, "clip_sample": False, "timestep_spacing": "linspace"}
# How model_index.json of an AnimateDiff pipeline differs from Stable Diffusion's.
IMAGE_ONLY = ("safety_checker", "requires_safety_checker", "image_encoder", "feature_extractor")
PIPELINE = {"_class_name": "AnimateDiffPipeline", "scheduler": ["diffusers", "DDIMScheduler"],
            "unet": ["diffusers", "UNetMotionModel"], "feature_extractor": [None, None], "image_encoder": [None, None]}


class AnimateDiff(StableDiffusion):
    """An AnimateDiff pipeline directory, or Stable Diffusion's and a motion adapter's.

    Latents are (B, C, F, h, w), with one timestep a video. Conditions: `prompt_embeds` (B, 77, D), the same for all frames.
    """

    name = "animatediff"
    video = True
    components: Components = StableDiffusion.components | {"unet": ("UNetMotionModel",)}

    def __init__(self, directory: Directory, adapter: Directory | None = None) -> None:
        index = directory.index | {"motion_adapter": ["diffusers", "MotionAdapter"]}
        if adapter is not None:
            check_adapter(directory, adapter)
            common.check_schedule(directory)  # DDIM would follow keys that this class ignores
            index = {name: part for name, part in index.items() if name not in IMAGE_ONLY} | PIPELINE
            scheduler = directory.configs["scheduler"] | SCHEDULER
            directory = replace(directory, configs=directory.configs | {"scheduler": scheduler})
        super().__init__(replace(directory, index=index))
        self.adapter = adapter
        config = directory.configs["unet"] if adapter is None else adapter.configs[HERE]
        self.most_frames: int = config.get(MOTION_LENGTH, 32)

    def check_frames(self, frames: int) -> None:
        """`UserError` where a video has more frames than the motion modules have positions."""
        if frames > self.most_frames:
            source = self.path / "unet" if self.adapter is None else self.adapter.path
            raise UserError(f"{self.directory.labels.frames}: {frames} are more than the {self.most_frames} positions that the"
                            f" motion modules in {source} have ({MOTION_LENGTH}); set it to {self.most_frames} or fewer")

    def load_denoiser(self, dtype: torch.dtype) -> UNetMotionModel:
        """A fresh UNet with its motion modules from disk, on the CPU."""
        if self.adapter is None:
            return common.load_component(self.directory, "unet", UNetMotionModel, dtype)
        unet = common.load_unet(self.directory, dtype)
        adapter = common.load_component(self.adapter, HERE, MotionAdapter, dtype)
        with torch.random.fork_rng(devices=[]):  # its weights are random before those of the files are copied into it
            return joined(self.directory, unet, adapter)

    def empty_denoiser(self) -> UNetMotionModel:
        """The network without weights, made under the caller's device."""
        if self.adapter is None:
            return UNetMotionModel.from_config(dict(self.directory.configs["unet"]))
        unet = super().empty_denoiser()
        return joined(self.directory, unet, MotionAdapter.from_config(dict(self.adapter.configs[HERE])), load_weights=False)

    def latent_shape(self, side: int, frames: int) -> tuple[int, ...]:
        """(C, F, h, w) of a video of `side` pixels."""
        channels, *sides = super().latent_shape(side, frames)
        return (channels, frames, *sides)

    def encode(self, vae: Vae, pixels: Tensor, at_once: int = AT_ONCE) -> tuple[Tensor, Tensor]:
        """Clips (B, F, 3, H, W) in [-1, 1] -> posterior mean and standard deviation, (B, C, F, h, w) fp32, not scaled."""
        of_frames = super().encode(vae, pixels.flatten(0, 1), at_once)
        mean, std = (values.unflatten(0, pixels.shape[:2]).transpose(1, 2).contiguous() for values in of_frames)
        return mean, std

    def decode(self, vae: Vae, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, F, h, w) -> pixels (B, F, 3, H, W) fp32 in [0, 1], a few frames at a time."""
        frames = latents.transpose(1, 2).flatten(0, 1)
        pixels = torch.cat([common.decode(vae, some, self.latent_scale) for some in frames.split(AT_ONCE)])
        return pixels.unflatten(0, (len(latents), -1))

    def denoise(self, unet: nn.Module, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """The network's output (B, C, F, h, w) for latents (B, C, F, h, w) at timesteps (B,)."""
        each_frame = conditions["prompt_embeds"].repeat_interleave(latents.shape[2], dim=0)
        return unet(latents, timesteps, encoder_hidden_states=each_frame, return_dict=False)[0]


def joined(directory: Directory, unet: UNet2DConditionModel, adapter: MotionAdapter, load_weights: bool = True) -> UNetMotionModel:
    """Image model and motion adapter as one network; with their weights, or without any."""
    try:
        return UNetMotionModel.from_unet2d(unet, adapter, load_weights)
    except (ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{directory.labels.motion_adapter}: it does not fit {directory.path / 'unet'}: {reason}") from error


def check_adapter(directory: Directory, adapter: Directory) -> None:
    """Refuse a motion adapter that was made for another UNet than the directory's."""
    config, unet = adapter.configs[HERE], directory.configs["unet"]
    file = adapter.path / "config.json"
    if config.get("conv_in_channels"):
        raise UserError(f"{file}: conv_in_channels is {config['conv_in_channels']}, so it animates a given image (PIA);"
                        " only text-to-video adapters can be trained")
    wanted, found = ([*each.get("block_out_channels", (320, 640, 1280, 1280))] for each in (unet, config))
    if wanted != found:
        raise UserError(f"{file}: block_out_channels is {found}, but {directory.path / 'unet'} has {wanted}: the motion adapter was"
                        " made for another model (Stable Diffusion 1.x adapters go with 1.x models)")


def motion_adapter(unet: UNetMotionModel) -> MotionAdapter:
    """The motion modules of `unet` alone, sharing their weights."""
    config: dict[str, Any] = dict(unet.config)
    with torch.device("meta"):
        adapter = MotionAdapter(
            block_out_channels=config["block_out_channels"], motion_layers_per_block=config["layers_per_block"],
            motion_transformer_layers_per_block=config["temporal_transformer_layers_per_block"],
            motion_mid_block_layers_per_block=config["mid_block_layers"],
            motion_transformer_layers_per_mid_block=config["temporal_transformer_layers_per_mid_block"],
            motion_norm_num_groups=config["norm_num_groups"], motion_num_attention_heads=config["motion_num_attention_heads"],
            motion_max_seq_length=config[MOTION_LENGTH], use_motion_mid_block=config["use_motion_mid_block"],
        )
    weights = {name: tensor for name, tensor in unet.state_dict().items() if MOTION in name}
    adapter.load_state_dict(weights, strict=True, assign=True)
    return adapter
