"""What a quantized base takes, without quantizing it: the plan needs neither the weights nor the packages."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from seppo_fast.models.quantize import BLOCK, chosen
from seppo_fast.sections import Quantized


def as_quantized(network: nn.Module, kind: Quantized) -> int:
    """The bytes that quantizing a network saves; on the meta device it runs from now on as the quantized one would.

    torchao's weights are turned into the inputs' dtype at each use, and autograd keeps that copy for the backward; bitsandbytes
    keeps its own.
    """
    saved = 0
    for layer in chosen(network).values():
        weights, rows = layer.weight.numel(), len(layer.weight)
        stored = {"int8": weights + rows * (4 + 1),  # a scale in fp32 and a zero point a row
                  "fp8": weights + rows * 4,
                  "nf4": (weights + 1) // 2 + 4 * (-(-weights // BLOCK) + 16)}[kind]  # and the code of 16 values
        saved += layer.weight.nbytes - stored
        if kind != "nf4":
            layer.forward = partial(_int8 if kind == "int8" else _fp8, layer)
    return saved


def _int8(layer: nn.Linear, given: Tensor) -> Tensor:
    """The products are scaled after they are summed."""
    product = functional.linear(given, layer.weight.clone()) * layer.weight[:, 0].clone()
    return product if layer.bias is None else product.add_(layer.bias)


def _fp8(layer: nn.Linear, given: Tensor) -> Tensor:
    """The weights are scaled first, in fp32."""
    weight = torch.empty_like(layer.weight, dtype=torch.float32) * 1.0
    product = functional.linear(given, weight.to(layer.weight.dtype, copy=True))
    return product if layer.bias is None else product + layer.bias
