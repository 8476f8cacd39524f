"""A network from its published file of weights."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from seppo_fast.evaluation.weights import check_fit, read_tensors

Network = TypeVar("Network", bound=nn.Module)


def load_network(build: Callable[[], Network], file: Path, what: str, device: torch.device, unused: tuple[str, ...] = (),
                 ) -> Network:
    """`build()` with the weights in `file`, fp32, for inference on the device; UserError where they are not those of `what`.

    Names that begin with one of `unused` belong to layers that the score does not need.
    """
    with torch.device("meta"):
        network = build()
    weights = without(read_tensors(file), unused)
    check_fit(file, without(network.state_dict(), ()), weights, what)
    network.load_state_dict(weights, assign=True)
    return network.float().eval().requires_grad_(False).to(device)


def without(weights: Mapping[str, Any], unused: tuple[str, ...]) -> dict[str, Any]:
    """The weights without those of unused layers and without batch counters, which files from before PyTorch 0.4.1 lack."""
    named = {str(name): value for name, value in weights.items()}  # another pickle's names may be numbers
    return {name: value for name, value in named.items()
            if not name.startswith(unused) and not name.endswith(".num_batches_tracked")}
