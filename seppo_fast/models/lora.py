"""LoRA on the UNet through PEFT, and which weights are trained at all."""

import difflib

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import nn

from seppo_fast.config import Lora
from seppo_fast.errors import UserError

ADAPTER = "default"


def lora_config(lora: Lora) -> LoraConfig:
    targets = sorted(lora.targets)
    return LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets)


def add_lora(unet: UNet2DConditionModel, lora: Lora, seed: int) -> None:
    """Freeze the UNet and add a trainable adapter; A depends on `seed` alone, B is zero: no output changes yet."""
    check_targets(unet, lora.targets)
    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            unet.add_adapter(lora_config(lora), adapter_name=ADAPTER)
        except ValueError as error:
            raise UserError(f"seppo.model.lora: {error}") from error
    unet.train(unet.training)  # PEFT's layers come in training mode, whatever the UNet's


def check_targets(unet: nn.Module, targets: list[str]) -> None:
    """Every target must match a layer that LoRA can adapt; PEFT is content when any one of them does."""
    layers = [name for name, module in unet.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    for target in targets:
        if any(name == target or name.endswith(f".{target}") for name in layers):
            continue
        # by the last name, with the one before where that is an index (to_out.0)
        endings = {".".join(name.split(".")[-2 if name.split(".")[-1].isdigit() else -1:]): name for name in layers}
        lower = {ending.lower(): ending for ending in endings}
        close = [lower[match] for match in difflib.get_close_matches(target.lower(), list(lower), n=1)]
        raise UserError(
            f"seppo.model.lora.targets: {target!r} matches no linear or convolution layer of the UNet."
            + (f" Did you mean {close[0]!r}?" if close else "")
            + f" Such layers are, for example, {', '.join(sorted(endings.values())[:20])}."
        )
    if not targets:
        raise UserError("seppo.model.lora.targets is empty: name at least one kind of layer, e.g. 'to_q'.")


def trainable_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name, in the module's own order."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def share_frozen(reference: nn.Module, policy: nn.Module) -> None:
    """Let the reference's parameters that the policy keeps frozen use the policy's storage: one base, two adapters."""
    own = dict(reference.named_parameters())
    for name, parameter in policy.named_parameters():
        # ZeRO-3 leaves an empty stand-in where it has partitioned a parameter
        if not parameter.requires_grad and own[name].shape == parameter.shape:
            own[name].data = parameter.data
