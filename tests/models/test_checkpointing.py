"""Gradient checkpointing of the transformers: the same gradients with fewer tensors kept; and attention's rows at full size."""

import pytest
import torch
from networks import NETWORKS, denoise, given, made
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from seppo_fast.models.launches import MOST
from seppo_fast.reference.batching import LARGEST

# Heads of Wan 14B and Qwen-Image, and of the other published ones at most.
HEADS = {"wan": 40, "qwen": 24, "sd3": 38, "flux": 24}


def trained(name: str, checkpointing: bool) -> tuple[dict[str, Tensor], int]:
    """Gradients by name, and the bytes that autograd keeps between forward and backward."""
    network, kept = made(name, layers=4).train(), {}
    if checkpointing:
        network.enable_gradient_checkpointing()

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    latents, conditions = given(2)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = denoise(network, latents, torch.tensor([500.0]), conditions)
    weights = {weight.data_ptr() for weight in network.parameters()}
    size = sum(size for place, size in kept.items() if place not in weights)
    output.square().mean().backward()
    return {key: weight.grad for key, weight in network.named_parameters() if weight.grad is not None}, size


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_gradients_with_fewer_activations(name: str) -> None:
    (plain, whole), (again, fewer) = trained(name, False), trained(name, True)
    assert plain.keys() == again.keys() and len(plain) > 30 and any(grad.abs().max() > 1e-4 for grad in plain.values())
    for key, gradient in plain.items():
        torch.testing.assert_close(again[key], gradient, rtol=0, atol=1e-6, msg=key)
    assert fewer < 0.5 * whole


class Launched(TorchFunctionMode):
    """Samples and heads of each launch of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is functional.scaled_dot_product_attention:
            query = args[0] if args else kwargs["query"]
            self.rows.append(query.shape[0] * query.shape[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_largest_batch_of_samples_is_one_launch_of_attention(name: str) -> None:
    """Tokens are along the grid's x, which has two thousand million blocks. In y and z are a batch's samples, guided thrice at
    most, and the heads, whatever the sequences' length: no family's attention makes rows of its tokens."""
    with torch.device("meta"):
        network = NETWORKS[name](layers=1, heads=HEADS[name])
        conditions = {"prompt_embeds": torch.empty(3 * LARGEST, 7, 32)}
        with torch.no_grad(), Launched() as launched:
            denoise(network, torch.empty(3 * LARGEST, 4, 8, 8), torch.empty(1), conditions)
    assert set(launched.rows) == {3 * LARGEST * HEADS[name]} and launched.rows[0] <= MOST
