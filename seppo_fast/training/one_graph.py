"""`seppo.model.compile: "full"`: a network's forward as one compiled graph, and its backward as another."""

import time
from collections.abc import Callable

import torch
from torch import nn

from seppo_fast.compiler import keep_all_graphs
from seppo_fast.errors import warn_fallback
from seppo_fast.models.lora import trainable_weights
from seppo_fast.training.objective import Objective
from seppo_fast.training.pairs import PairSource


def compile_whole(policy: nn.Module, reference: nn.Module | None, objective: Objective, pairs: PairSource, micro: int,
                  say: Callable[[str], None] = print) -> None:
    """Let policy and reference run as one graph each, except where samples are drawn.

    The policy is compiled now, forward and backward, for micro-batches of `micro` pairs: where the compiler fails, both stay as
    they are. DeepSpeed's hooks do not run, because no gradient is accumulated. Call it within `same_with_gradients()`.
    """
    keep_all_graphs()
    networks = [network for network in (policy, reference) if network is not None]
    for network in networks:
        network.compile(dynamic=False, fullgraph=True)
    start = time.perf_counter()
    try:
        with torch.random.fork_rng(devices=[pairs.device] if pairs.device.type == "cuda" else []):
            predicted = objective.prediction(policy, pairs.blank(micro))
            torch.autograd.grad(predicted.float().sum(), [*trainable_weights(policy).values()], allow_unused=True)
    except Exception as error:  # whatever the compiler raises
        for network in networks:
            network._compiled_call_impl = None
        warn_fallback("seppo.model.compile", error)
        return
    say(f"policy: compiled as one graph, forward and backward, in {time.perf_counter() - start:.1f} s")
