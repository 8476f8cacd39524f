"""The networks of all families, small, made of diffusers' classes alone: `NETWORKS[name]()`, and a call of each."""

from collections.abc import Callable

import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel, SD3Transformer2DModel, WanTransformer3DModel
from torch import Tensor, nn

WIDTH, TOKENS = 32, 7  # of the prompt


def sd3(layers: int = 3, heads: int = 2, channels: int = 16) -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=layers, attention_head_dim=channels,
        num_attention_heads=heads, joint_attention_dim=WIDTH, caption_projection_dim=heads * channels, pooled_projection_dim=WIDTH,
        pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,))


def flux(layers: int = 3, heads: int = 2, channels: int = 16) -> nn.Module:
    return FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=layers, num_single_layers=layers, attention_head_dim=channels,
        num_attention_heads=heads, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, channels - 8))


def wan(layers: int = 3, heads: int = 2, channels: int = 16) -> nn.Module:
    return WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=channels, in_channels=4, out_channels=4, text_dim=WIDTH, freq_dim=16,
        ffn_dim=4 * heads * channels, num_layers=layers, rope_max_seq_len=64)


def qwen(layers: int = 3, heads: int = 2, channels: int = 16) -> nn.Module:
    return QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=layers, attention_head_dim=channels, num_attention_heads=heads,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, channels - 8))


NETWORKS: dict[str, Callable[..., nn.Module]] = {"sd3": sd3, "flux": flux, "wan": wan, "qwen": qwen}


def made(name: str, seed: int = 0, **changes: int) -> nn.Module:
    """The network with random weights; none of them is zero, as some are in a new one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = NETWORKS[name](**changes)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return network.eval()


def denoise(network: nn.Module, latents: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> Tensor:
    """The output for latents (B, 4, 8, 8) as for whichever of the networks; `conditions`: `prompt_embeds` (B, 7, 32)."""
    prompt, (size, *_) = conditions["prompt_embeds"], latents.shape
    timesteps = timesteps.expand(size)
    if isinstance(network, SD3Transformer2DModel):
        return network(latents, prompt, prompt.mean(1), timesteps, return_dict=False)[0]
    if isinstance(network, WanTransformer3DModel):
        return network(latents[:, :, None], timesteps, prompt, return_dict=False)[0][:, :, 0]
    packed = latents.unflatten(-1, (4, 2)).unflatten(-3, (4, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    if isinstance(network, FluxTransformer2DModel):
        image = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)).to(latents.device)
        out = network(packed, prompt, prompt.mean(1), timesteps / 1000, image, image.new_zeros(prompt.shape[1], 3),
                      return_dict=False)[0]
    else:
        mask = torch.ones(prompt.shape[:2], dtype=torch.bool, device=latents.device)
        out = network(packed, prompt, mask, timesteps / 1000, [[(1, 4, 4)]] * size, return_dict=False)[0]
    return out.unflatten(1, (4, 4)).unflatten(-1, (4, 2, 2)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def given(count: int = 2, device: str = "cpu") -> tuple[Tensor, dict[str, Tensor]]:
    """Noise and conditions."""
    random = torch.Generator().manual_seed(count)
    return (torch.randn(count, 4, 8, 8, generator=random).to(device),
            {"prompt_embeds": torch.randn(count, TOKENS, WIDTH, generator=random).to(device)})
