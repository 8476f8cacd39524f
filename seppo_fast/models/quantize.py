"""Frozen linear layers in 8 or 4 bits, by torchao and bitsandbytes through diffusers' quantizers; how to treat such weights.

The network is loaded whole first, so that what is wrong with its files is found as ever. The quantizer that diffusers would apply
while it loads is then applied to it, one weight after another, on the device where the network will be.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.quantizers.auto import DiffusersAutoQuantizer
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from seppo_fast.errors import UserError, reason
from seppo_fast.extras import need
from seppo_fast.sections import Quantized

PACKAGES = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}
BLOCK = 64  # weights of nf4 with one scale, bitsandbytes' default
FP8 = (8, 9)  # the first compute capability with it


def quantize(network: Any, kind: Quantized, device: torch.device | str, dtype: torch.dtype) -> None:
    """Quantize the weights of a network's `chosen` layers, whose inputs are `dtype`; these layers are on `device` afterwards."""
    quantizer = DiffusersAutoQuantizer.from_config(_settings(kind, dtype), pre_quantized=False)
    layers = chosen(network)
    weights = {f"{name}.{part}": value for name, layer in layers.items() for part, value in layer.named_parameters(recurse=False)}
    others = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear) and name not in layers]
    quantizer.preprocess_model(network, device_map=None, keep_in_fp32_modules=others)
    for name, value in weights.items():
        if quantizer.check_if_quantized_param(network, value, name, {}):
            quantizer.create_quantized_param(network, value.data, name, torch.device(device), {}, [])
    quantizer.postprocess_model(network)
    network.requires_grad_(False)
    for layer in network.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            # Without gradients bitsandbytes would pack the weights anew for another kernel, on processors that have it: policy and
            # reference share them, and must compute alike.
            layer.support_avx512bf16_for_cpu = False


def chosen(network: Any) -> dict[str, nn.Linear]:
    """The linear layers that are quantized, by name: all but those kept in fp32, and those that share their weight (embeddings)."""
    kept = getattr(network, "_keep_in_fp32_modules", None) or ()
    holders = Counter(map(id, (weight for _, weight in network.named_parameters(remove_duplicate=False))))
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear)
            and not any(part in name.split(".") for part in kept) and holders[id(layer.weight)] == 1}


def _settings(kind: Quantized, dtype: torch.dtype) -> Any:
    """diffusers' settings of a quantizer."""
    package = need(PACKAGES[kind], f"quantization to {kind}", "seppo-fast[quantize]")
    if package.__name__ == "bitsandbytes":
        from diffusers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    from diffusers import TorchAoConfig
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig())


def lacking(kind: Quantized, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a base cannot be quantized like this here; None where forward and backward of a small layer work on `device`."""
    if kind == "fp8" and device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < FP8:
        major, minor = torch.cuda.get_device_capability(device)
        return (f"{torch.cuda.get_device_name(device)} has no fp8 (compute capability {major}.{minor}, and 8.9 is needed); take"
                ' "int8" or "nf4"')
    network, given = nn.Sequential(nn.Linear(BLOCK, BLOCK)).to(dtype), torch.ones(2, BLOCK, device=device, dtype=dtype)
    network.config = SimpleNamespace()
    try:
        quantize(network, kind, device, dtype)
        network.to(device)(given.requires_grad_()).sum().backward()
    except UserError as error:
        return str(error)
    except Exception as error:  # a build for another PyTorch or GPU may raise anything
        return f"{PACKAGES[kind]} cannot train on this {device.type} ({reason(error)}); choose another value"
    return None


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is torchao's or bitsandbytes' own kind of tensor."""
    return is_traceable_wrapper_subclass(weight) or getattr(weight, "quant_state", None) is not None


def parts(weight: Tensor) -> list[Tensor]:
    """The plain tensors that a weight consists of: itself, or what a quantized one holds."""
    if is_traceable_wrapper_subclass(weight):
        inner = (getattr(weight, name) for name in weight.__tensor_flatten__()[0])
        return [tensor for tensor in inner if isinstance(tensor, Tensor)]
    state = getattr(weight, "quant_state", None)
    return [weight] if state is None else [weight, state.absmax, state.code]


@contextmanager
def without_quantized(network: nn.Module) -> Iterator[None]:
    """The network without its quantized weights, which DeepSpeed would cast, broadcast and save as if they were plain tensors."""
    held = [(layer, name, weight) for layer in network.modules() for name, weight in layer.named_parameters(recurse=False)
            if is_quantized(weight)]
    for layer, name, _ in held:
        layer._parameters[name] = None  # its place stays, and with it the order of all
    try:
        yield
    finally:
        for layer, name, weight in held:
            layer._parameters[name] = weight
