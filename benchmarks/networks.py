"""Networks of published sizes with random weights, on which speed does not depend, and the FLOPs of one evaluation."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    DDIMScheduler,
    MotionAdapter,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNetMotionModel,
)
from diffusers.models.attention_processor import Attention
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from seppo_fast.evaluation.adapters import Adapter
from seppo_fast.models import Model
from seppo_fast.models.animatediff import SCHEDULER as VIDEO_SCHEDULE
from seppo_fast.models.contract import UNet
from seppo_fast.models.published import ADAPTERS, SD15, SDXL

Conditions = dict[str, Tensor]


@dataclass(frozen=True)
class Network:
    """A UNet's config and what it is called with: `side` latents a side, 77 tokens of `width`, `pooled` wide for SDXL.

    A video network has the config of its motion adapter too, and is called with `frames`.
    """

    config: dict[str, object]
    side: int
    width: int
    pooled: int = 0
    motion: dict[str, object] | None = None
    frames: int = 0


TINY = dict(sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, cross_attention_dim=32, block_out_channels=(32, 64),
            attention_head_dim=4, norm_num_groups=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
NETWORKS = {
    "sd15": Network(SD15["unet"], side=64, width=768),
    "sdxl": Network(SDXL["unet"], side=128, width=2048, pooled=1280),
    # The paper's videos: 16 frames of 256x256.
    "animatediff": Network(SD15["unet"], side=32, width=768, frames=16,
                           motion=ADAPTERS["guoyww/animatediff-motion-adapter-v1-5-2"]),
    # For the CPU: the quickstart's.
    "quickstart": Network(TINY, side=8, width=32),
    "tiny_video": Network(TINY, side=8, width=32, frames=16,
                          motion=dict(block_out_channels=(32, 64), motion_layers_per_block=1, motion_norm_num_groups=8)),
}
SCHEDULE = dict(num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
                set_alpha_to_one=False, steps_offset=1)


def make_unet(name: str, device: str, dtype: torch.dtype) -> UNet:
    """The network with random weights, made on the device, in inference mode."""
    torch.manual_seed(0)
    network = NETWORKS[name]
    with torch.device(device):
        unet = UNet2DConditionModel(**network.config)
        if network.motion is not None:
            unet = UNetMotionModel.from_unet2d(unet, MotionAdapter(**network.motion), load_weights=False)
    return nn.Module.to(unet, dtype).eval()  # diffusers' own `to` prints a warning that does not apply here


def conditions(name: str, batch: int, device: str, dtype: torch.dtype) -> Conditions:
    """Random prompt embeddings (batch, 77, D), and SDXL's pooled ones."""
    network = NETWORKS[name]
    embeds = {"prompt_embeds": torch.randn(batch, 77, network.width, device=device, dtype=dtype)}
    return embeds | ({"pooled": torch.randn(batch, network.pooled, device=device, dtype=dtype)} if network.pooled else {})


def latents(name: str, batch: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Initial noise (batch, 4, side, side), (batch, 4, frames, side, side) of a video network."""
    network = NETWORKS[name]
    frames = [network.frames] if network.frames else []
    return torch.randn(batch, 4, *frames, network.side, network.side, device=device, dtype=dtype)


def denoise(unet: nn.Module, noisy: Tensor, timesteps: Tensor, given: Conditions) -> Tensor:
    """The network's output, as seppo_fast.models calls it; SDXL's time ids are made on the device, as a capture needs it."""
    added = None
    if "pooled" in given:
        ids = torch.full((len(noisy), 6), 8.0 * noisy.shape[-1], device=noisy.device)
        ids[:, 2:4] = 0
        added = {"text_embeds": given["pooled"], "time_ids": ids}
    prompts = given["prompt_embeds"]
    if noisy.dim() == 5:
        prompts = prompts.repeat_interleave(noisy.shape[2], dim=0)
    return unet(noisy, timesteps, encoder_hidden_states=prompts, added_cond_kwargs=added, return_dict=False)[0]


def own_flops(name: str) -> int:
    """FLOPs of one evaluation on one sample, 2 a multiply-add: convolutions, linear maps and attention, from their shapes."""
    total = 0

    def convolution(module: nn.Conv2d, _: tuple, out: Tensor) -> None:
        nonlocal total
        total += 2 * out.numel() * module.in_channels // module.groups * prod(module.kernel_size)

    def linear(module: nn.Linear, _: tuple, out: Tensor) -> None:
        nonlocal total
        total += 2 * out.numel() * module.in_features

    def attention(module: Attention, args: tuple, kwargs: dict, _: Tensor) -> None:
        nonlocal total
        batch, queries, _ = args[0].shape
        context = kwargs.get("encoder_hidden_states")
        keys = queries if context is None else context.shape[1]
        total += 2 * 2 * batch * queries * keys * module.inner_dim  # q k' and the weighted sum of v

    unet = make_unet(name, "meta", torch.float32)
    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(convolution)
        elif isinstance(module, nn.Linear):
            module.register_forward_hook(linear)
        elif isinstance(module, Attention):
            module.register_forward_hook(attention, with_kwargs=True)
    _evaluate(name, unet)
    return total


def counted_flops(name: str) -> int:
    """The same by torch.utils.flop_counter."""
    with FlopCounterMode(display=False) as counter:
        _evaluate(name, make_unet(name, "meta", torch.float32))
    return counter.get_total_flops()


@torch.no_grad()
def _evaluate(name: str, unet: nn.Module) -> None:
    make = ("meta", torch.float32)
    denoise(unet, latents(name, 1, "meta"), torch.empty(1, device="meta", dtype=torch.long), conditions(name, 1, *make))


def latent_pipeline(name: str, unet: UNet) -> Callable[..., Tensor]:
    """`draw(noise, conditions, unconditional, steps, guidance)`: diffusers' own pipeline without VAE and text encoder."""
    if NETWORKS[name].frames:
        return _video_pipeline(name, unet)
    kind = StableDiffusionXLPipeline if NETWORKS[name].pooled else StableDiffusionPipeline
    absent = dict.fromkeys(("vae", "text_encoder", "tokenizer", *(("text_encoder_2", "tokenizer_2") if NETWORKS[name].pooled else
                                                                  ("safety_checker", "feature_extractor"))))
    more = {} if NETWORKS[name].pooled else {"requires_safety_checker": False}
    pipeline = kind(**absent, unet=unet, scheduler=DDIMScheduler(**SCHEDULE), **more)
    pipeline.set_progress_bar_config(disable=True)

    def draw(noise: Tensor, given: Conditions, unconditional: Conditions, steps: int, guidance: float) -> Tensor:
        prompts = {"prompt_embeds": given["prompt_embeds"],
                   "negative_prompt_embeds": unconditional["prompt_embeds"].expand_as(given["prompt_embeds"])}
        if "pooled" in given:
            prompts |= {"pooled_prompt_embeds": given["pooled"],
                        "negative_pooled_prompt_embeds": unconditional["pooled"].expand_as(given["pooled"])}
        side = 8 * noise.shape[-1]
        return pipeline(**prompts, height=side, width=side, latents=noise, num_inference_steps=steps, guidance_scale=guidance,
                        output_type="latent").images

    return draw


def _video_pipeline(name: str, unet: UNetMotionModel) -> Callable[..., Tensor]:
    absent = dict.fromkeys(("vae", "text_encoder", "tokenizer", "motion_adapter"))
    pipeline = AnimateDiffPipeline(**absent, unet=unet, scheduler=DDIMScheduler(**schedule(name)))
    pipeline.set_progress_bar_config(disable=True)

    def draw(noise: Tensor, given: Conditions, unconditional: Conditions, steps: int, guidance: float) -> Tensor:
        side = 8 * noise.shape[-1]
        return pipeline(prompt_embeds=given["prompt_embeds"], num_frames=noise.shape[2], height=side, width=side, latents=noise,
                        negative_prompt_embeds=unconditional["prompt_embeds"].expand_as(given["prompt_embeds"]),
                        num_inference_steps=steps, guidance_scale=guidance, output_type="latent").frames

    return draw


def schedule(name: str) -> dict[str, object]:
    """The noise schedule of the network: AnimateDiff's is linear."""
    own = {key: value for key, value in VIDEO_SCHEDULE.items() if key != "_class_name"}
    return SCHEDULE | (own if NETWORKS[name].frames else {})


def write_pipeline(folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float16) -> None:
    """Write a full-size Stable Diffusion 1.5 with random weights and a small tokenizer, unless it is there."""
    from transformers import CLIPTextConfig, CLIPTextModel

    from seppo_fast.quickstart.digits import CAPTIONS
    from seppo_fast.quickstart.tokenizer import train_tokenizer

    if (folder / "model_index.json").is_file():
        return
    tokenizer = train_tokenizer(CAPTIONS)
    with torch.device(device):
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512, latent_channels=4,
                            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
        text = CLIPTextModel(CLIPTextConfig(
            vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            max_position_embeddings=77, projection_dim=768, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    pipeline = StableDiffusionPipeline(
        vae=nn.Module.to(vae, dtype), text_encoder=text.to(dtype), tokenizer=tokenizer, unet=make_unet("sd15", device, dtype),
        scheduler=DDIMScheduler(**SCHEDULE), safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    pipeline.save_pretrained(unfinished, safe_serialization=True)
    unfinished.rename(folder)


# As lcm-lora-sdv1-5 has it: 67.5 M parameters by its model card.
RANK, LAYERS = 64, ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
                    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"]


def lcm_lora(model: Model, std: float = 0.0) -> Adapter:
    """A LoRA of the LCM LoRA's shape for a UNet, with random weights of this deviation."""
    with torch.device("meta"):
        network = model.empty_denoiser()
        network.add_adapter(LoraConfig(r=RANK, target_modules=LAYERS))
    tensors = {f"{model.denoiser}.{name}": torch.zeros(value.shape, dtype=torch.bfloat16).normal_(std=std)
               for name, value in get_peft_model_state_dict(network).items()}
    return Adapter(Path("pytorch_lora_weights.safetensors"), tensors, None)
