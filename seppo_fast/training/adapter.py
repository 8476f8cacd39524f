"""The few-step adapter of the sampler (seppo.sampler.adapter): found, and checked against the model and the policy."""

import torch
from torch import nn

from seppo_fast.checksums import checksum
from seppo_fast.config import Seppo
from seppo_fast.errors import UserError, few
from seppo_fast.evaluation.adapters import Adapter, read_adapter
from seppo_fast.evaluation.candidates import LORA
from seppo_fast.models import Model
from seppo_fast.opening import named_file
from seppo_fast.training import start
from seppo_fast.training.card import is_policy

KEY = "seppo.sampler.adapter"


def read(settings: Seppo, model: Model) -> Adapter | None:
    """The adapter, if there is one; `UserError` where it is no adapter of this model's network alone, or a policy."""
    given = settings.sampler.adapter
    if given is None:
        return None
    file = named_file(given, LORA, KEY, "give the safetensors file of a distillation LoRA, fetched from the hub if it is there")
    if is_policy(file.parent):
        raise UserError(f"{KEY} {given}: it is a policy that seppo_fast trained, no distillation; to begin with it, take its"
                        f" checkpoint as {start.KEY}")
    adapter = read_adapter(file, model)
    if text := [name for name in adapter.tensors if not name.startswith(f"{model.denoiser}.")]:
        raise UserError(f"{KEY}: {file} changes text encoders, too ({few(text)}), and prompts are embedded once, for the policy and"
                        " for rollouts alike; take an adapter of the network alone")
    if settings.model.start_from and checksum(start.find(settings.model.start_from)) == checksum(file):
        raise UserError(f"{KEY} {given}: the policy already is this adapter ({start.KEY}); leave one of them out")
    adapter.check(model)
    return adapter


def adapted_network(adapter: Adapter, model: Model) -> nn.Module:
    """The model's network with the adapter's weights on the CPU; its own weights are zeros that take no memory."""
    with torch.device("meta"):
        network = model.empty_denoiser()
    for part in network.modules():  # PEFT moves an adapter to the device of the layer that it is put on
        for name, weight in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(torch.zeros(()).expand(weight.shape), requires_grad=False))
    adapter.put_on(model.denoiser, network)
    return network
