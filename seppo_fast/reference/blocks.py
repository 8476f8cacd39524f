"""A network whose weights are in host memory and come to the device block by block: diffusers' group offloading."""

from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

HOOK = "group_offloading"  # diffusers' name of its hook


def offload_blocks(network: ModelMixin, device: torch.device) -> None:
    """Move the weights to host memory, pinned where there is a GPU; each block is on `device` for its own call alone.

    On a GPU the next block is copied meanwhile. Between calls every parameter is in host memory, and what is written into it
    there is what the next call computes with.
    """
    network.enable_group_offload(device, offload_type="block_level", num_blocks_per_group=1, use_stream=device.type == "cuda")
    network.register_forward_hook(_take_back, always_call=True)


def offloads_blocks(network: nn.Module) -> bool:
    """Whether the network's blocks come to the device one after another."""
    return _hook_of(network) is not None


def bytes_on_device(network: nn.Module) -> int:
    """The most bytes of such a network that are on the device at once: what is in no block, a block, and the next one."""
    lists = [part for part in network.children() if isinstance(part, nn.ModuleList | nn.Sequential)]
    blocks = [_bytes(block) for part in lists for block in part]
    rest = _bytes(network) - sum(blocks)
    return rest + max((sum(pair) for pair in zip(blocks, [*blocks[1:], 0], strict=False)), default=0)


def _take_back(network: nn.Module, given: tuple[Any, ...], output: Any) -> None:
    """After a call that failed: blocks that are still on the device would be read from host memory again by the next call, and
    weights that a pool writes meanwhile would be lost with the device's copy."""
    if output is None:
        for part in network.modules():
            hook = _hook_of(part)
            if hook is not None and hook.group.offload_leader is part:
                hook.group.offload_()


def _hook_of(module: nn.Module) -> Any:
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(HOOK)


def _bytes(module: nn.Module) -> int:
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    return sum(tensor.nbytes for tensor in tensors)
