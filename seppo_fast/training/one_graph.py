"""`seppo.model.compile: "full"`: a network's forward as one compiled graph, and its backward as another."""

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from seppo_fast.compiler import keep_all_graphs
from seppo_fast.errors import warn_fallback
from seppo_fast.models.lora import trainable_weights
from seppo_fast.reference.tuning import changed
from seppo_fast.training.objective import Objective
from seppo_fast.training.pairs import Pairs


def with_whole_networks(objective: Objective, policy: nn.Module, reference: nn.Module | None, pairs: Pairs,
                        say: Callable[[str], None] = print) -> Objective:
    """The objective, in which policy and reference run as one graph each; as it is, with a warning, where the compiler fails.

    The policy is compiled now, forward and backward, for micro-batches of the shapes of `pairs`. Gradients are not accumulated, so
    that DeepSpeed's engine around it sees nothing of it. Call this within `same_with_gradients()`.
    """
    keep_all_graphs()
    networks = [network for network in (policy, reference) if network is not None]
    # Not the modules' calls: DeepSpeed has hooks there, which no graph can hold.
    whole = replace(objective, whole={network: torch.compile(network.forward, dynamic=False, fullgraph=True)
                                      for network in networks})
    start, devices = time.perf_counter(), [pairs.latents.device] if pairs.latents.is_cuda else []
    try:
        with torch.random.fork_rng(devices), changed([(policy, "_forward_pre_hooks", {}), (policy, "_forward_hooks", {})]):
            predicted = whole.prediction(policy, pairs)
            torch.autograd.grad(predicted.float().sum(), [*trainable_weights(policy).values()], allow_unused=True)
    except Exception as error:  # whatever the compiler raises
        warn_fallback("seppo.model.compile", error)
        return objective
    say(f"policy: compiled as one graph, forward and backward, in {time.perf_counter() - start:.1f} s")
    return whole
