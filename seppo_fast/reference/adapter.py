"""A distillation LoRA beside the weights of the network that draws, only while it draws: what scores the pairs stays clean."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from seppo_fast.reference.tuning import Change


@dataclass(frozen=True)
class Beside:
    """The forward of a layer with a LoRA beside it, as PEFT computes it."""

    forward: Callable[..., Tensor]
    down: nn.Module
    up: nn.Module
    scale: float

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        latents = args[0] if args else kwargs["input"]  # motion modules name it
        given = latents.to(self.down.weight.dtype)  # type: ignore[arg-type]  # some layers compute in fp32 beside bf16
        return self.forward(*args, **kwargs) + self.up(self.down(given)) * self.scale


def beside(network: nn.Module, adapted: nn.Module, device: torch.device | str, dtype: torch.dtype, scale: float = 1.0
           ) -> list[Change]:
    """Changes of `network` that put the LoRA of `adapted`, `scale` times, beside its layers, those of the same names.

    `adapted` is a network of the same architecture on which PEFT has put the LoRA; no other weights of it are read. Names and
    storage of the network's own weights stay, so that past policies are loaded, captured steps replayed and other adapters used
    as before.
    """
    layers = dict(network.named_modules())
    changes: list[Change] = []
    for name, part in adapted.named_modules():
        if isinstance(part, LoraLayer):
            for one in part.lora_A:
                down, up = (side[one].to(device, dtype).requires_grad_(False) for side in (part.lora_A, part.lora_B))
                changes.append((layers[name], "forward", Beside(layers[name].forward, down, up, part.scaling[one] * scale)))
    return changes
