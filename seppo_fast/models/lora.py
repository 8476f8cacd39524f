"""LoRA on the denoiser through PEFT, and which weights are trained."""

import copy
import difflib
import re
from typing import Literal

import torch
from diffusers import UNetMotionModel
from peft import LoraConfig
from torch import nn

from seppo_fast.config import Lora
from seppo_fast.errors import UserError
from seppo_fast.models.animatediff import MOTION
from seppo_fast.models.contract import Denoiser
from seppo_fast.models.pix2pix import sees_image

ADAPTER = "default"


def choose_trained(denoiser: Denoiser, lora: Lora | None, seed: int) -> None:
    """Make trainable only what is trained: an adapter, an AnimateDiff's motion modules, or all weights.

    Beside an adapter, the first convolution is trained in full where it is given an image: its new weights are zero.
    """
    if lora is not None:
        add_lora(denoiser, lora, seed)
        if sees_image(denoiser):
            train_first_convolution(denoiser)
    elif isinstance(denoiser, UNetMotionModel):
        denoiser.freeze_unet2d_params()


def train_first_convolution(denoiser: nn.Module) -> None:
    """Train all weights of the first convolution; `UserError` where LoRA has been put on it."""
    if not isinstance(denoiser.conv_in, nn.Conv2d):
        raise UserError("seppo.model.lora.targets: the first convolution (conv_in) is trained in full in a model that is given an"
                        " image; leave out the target that matches it")
    denoiser.conv_in.requires_grad_(True)


def trains_a_part(denoiser: nn.Module) -> bool:
    """Whether some weights are frozen, and can be shared between policy and reference."""
    return not all(parameter.requires_grad for parameter in denoiser.parameters())


def portion(denoiser: nn.Module, lora: Lora) -> Literal["temporal", "spatial", "all"]:
    """Which layers get adapters; by default, an AnimateDiff's motion modules."""
    if isinstance(denoiser, UNetMotionModel):
        return lora.layers or "temporal"
    if lora.layers is not None:
        raise UserError(f"seppo.model.lora.layers: {lora.layers!r} is for video models, and this is an image model, or one without"
                        " motion modules; leave it out")
    return "all"


def lora_config(denoiser: nn.Module, lora: Lora) -> LoraConfig:
    """PEFT's configuration: the targets as suffixes, or as a regular expression for a part of a video model's layers."""
    part, targets = portion(denoiser, lora), sorted(lora.targets)
    if part != "all":
        motion, among = rf"(.*\.)?{MOTION}\..*", "|".join(map(re.escape, targets))
        targets = rf"{motion}\.({among})" if part == "temporal" else rf"(?!{motion})(.*\.)?({among})"
    return LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets)


def add_lora(denoiser: Denoiser, lora: Lora, seed: int) -> None:
    """Freeze the denoiser and add a trainable adapter. A depends on `seed` alone and B is zero, so no output changes yet."""
    check_targets(denoiser, lora)
    denoiser.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            denoiser.add_adapter(lora_config(denoiser, lora), adapter_name=ADAPTER)
        except ValueError as error:
            raise UserError(f"seppo.model.lora: {error}") from error
    denoiser.train(denoiser.training)  # PEFT's layers come in training mode, whatever the network's


def check_targets(denoiser: nn.Module, lora: Lora) -> None:
    """Check that every target matches a layer that LoRA can adapt; PEFT checks only that one of them does."""
    part = portion(denoiser, lora)
    layers = [name for name, module in denoiser.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))
              and (part == "all" or (MOTION in name) == (part == "temporal"))]
    network = "transformer" if "Transformer" in type(denoiser).__name__ else "UNet"
    where = network if part == "all" else f"UNet's {part} part (seppo.model.lora.layers)"
    for target in lora.targets:
        if any(name == target or name.endswith(f".{target}") for name in layers):
            continue
        # the last part of the name, and the part before it where the last is an index (to_out.0)
        endings = {".".join(name.split(".")[-2 if name.split(".")[-1].isdigit() else -1:]): name for name in layers}
        lower = {ending.lower(): ending for ending in endings}
        close = [lower[match] for match in difflib.get_close_matches(target.lower(), list(lower), n=1)]
        raise UserError(
            f"seppo.model.lora.targets: {target!r} matches no linear or convolution layer of the {where}."
            + (f" Did you mean {close[0]!r}?" if close else "")
            + f" Such layers are, for example, {', '.join(sorted(endings.values())[:20])}."
        )
    if not lora.targets:
        raise UserError("seppo.model.lora.targets is empty: name at least one kind of layer, e.g. 'to_q'.")


def trainable_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name, in the module's order."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def copy_beside(policy: Denoiser, shares: bool) -> Denoiser:
    """A copy of the policy; where it `shares`, of what is trained alone: frozen parameters are the same objects in both."""
    shared = [weight for weight in policy.parameters() if shares and not weight.requires_grad]
    # bitsandbytes' layers hold the scales of their weight once more
    shared += [state for weight in shared if (state := getattr(weight, "quant_state", None)) is not None]
    return copy.deepcopy(policy, {id(each): each for each in shared})


def share_frozen(reference: nn.Module, policy: nn.Module) -> None:
    """Let the reference use the storage of the policy's frozen parameters and its tables: one base, two adapters.

    What it does not share gets the policy's dtype, so that both compute alike.
    """
    own = dict(reference.named_parameters())
    for name, parameter in policy.named_parameters():
        # ZeRO-3 leaves an empty placeholder where it has partitioned a parameter
        if own[name] is not parameter:
            shared = not parameter.requires_grad and own[name].shape == parameter.shape
            own[name].data = parameter.data if shared else own[name].data.to(parameter.dtype)
    tables = dict(reference.named_buffers())  # half a gigabyte of positions in SD3.5 Medium
    for name, table in policy.named_buffers():
        tables[name].data = table.data
