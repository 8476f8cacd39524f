"""Policy and reference are asked by the same attention kernels, with gradients and without; the sampler by any."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch._inductor.codecache import FxGraphHashDetails

from seppo_fast.models.engines import cudnn_attention, same_with_gradients
from seppo_fast.reference.sampler import Sampler
from seppo_fast.training.objective import Objective
from seppo_fast.training.trainer import Trainer

ENGINES = {"cudnn": torch.backends.cuda.cudnn_sdp_enabled, "flash": torch.backends.cuda.flash_sdp_enabled,
           "efficient": torch.backends.cuda.mem_efficient_sdp_enabled, "math": torch.backends.cuda.math_sdp_enabled}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[frozenset[str]]]]:
    """By who asks: which engines were allowed, as each block of the network saw it."""
    found: dict[str, list[frozenset[str]]] = {"policy": [], "again": [], "reference": [], "score": [], "sampler": []}
    asking: list[str] = []

    def looks(*_: Any) -> None:
        who = asking[-1] if asking else "again"
        found[who].append(frozenset(name for name, allowed in ENGINES.items() if allowed()))

    def while_asked(owner: type, name: str, who: Callable[..., str]) -> None:
        plain = getattr(owner, name)

        def asked(self: Any, *given: Any, **named: Any) -> Any:
            asking.append(who(*given))
            try:
                return plain(self, *given, **named)
            finally:
                asking.pop()
        monkeypatch.setattr(owner, name, asked)

    def predicts(module: torch.nn.Module, *_: Any) -> str:
        return asking[-1] if asking else "policy" if module.training else "reference"

    while_asked(Objective, "_predict", predicts)
    while_asked(Objective, "score", lambda *_: "score")
    while_asked(Sampler, "_draw", lambda *_: "sampler")
    train = Trainer.train

    def watched(self: Trainer) -> None:
        hooks = [block.register_forward_pre_hook(looks) for module in (self.engine.module, self.reference.module)
                 for block in module.modules() if isinstance(block, BasicTransformerBlock)]
        try:
            train(self)
        finally:
            for hook in hooks:
                hook.remove()

    monkeypatch.setattr(Trainer, "train", watched)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield found
    torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize("changes", [{}, {"seppo.reference_score": "rollout"}, {"seppo.model.compile": "regional"}],
                         ids=["online", "rollout", "compiled"])
def test_what_is_compared_is_made_by_engines_that_do_not_ask_for_gradients(
        changes: dict[str, Any], seen: dict[str, list[frozenset[str]]], settings: Any, train: Callable[..., Path],
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what gradient checkpointing computes again; and what a sampler compiles that the reference is scored with."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **_: None)
    train(settings(**{"seppo.model.gradient_checkpointing": True, "seppo.iterations": 1, "seppo.updates_per_iteration": 1,
                      "train_batch_size": 2, "train_micro_batch_size_per_gpu": 2, "seppo.sampler.steps": 2, **changes}))
    same, every = {"flash", "efficient", "math"}, {*ENGINES}
    scored = "seppo.reference_score" in changes
    assert seen["policy"] and seen["again"] and seen["score" if scored else "reference"]
    for who in ("policy", "again", "reference", "score"):
        assert set(seen[who]) <= {frozenset(same)}, who
    assert set(seen["sampler"]) == {frozenset(same if "seppo.model.compile" in changes else every)}
    assert torch.backends.cuda.cudnn_sdp_enabled(), "as it was before the run"


def test_compiled_attention_of_the_other_setting_does_not_come_back_from_the_disk() -> None:
    """The key of the compiler's cache: as without any setting where cuDNN is allowed, another where it is not."""
    def key() -> str:
        graph = torch.fx.symbolic_trace(lambda query: torch.nn.functional.scaled_dot_product_attention(query, query, query))
        return FxGraphHashDetails(graph, [], {}, []).cache_key_tag

    plain = key()
    with same_with_gradients():
        without = key()
        with cudnn_attention(True):
            assert key() == plain
        assert key() == without != plain
    assert key() == plain


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads, tokens, width", [(8, 4096, 40), (8, 1024, 80), (8, 256, 160), (10, 1024, 64)])
def test_attention_is_the_same_with_gradients(dtype: torch.dtype, heads: int, tokens: int, width: int) -> None:
    query, key, value = (torch.randn(2, heads, tokens, width, device="cuda", dtype=dtype) for _ in range(3))
    with same_with_gradients():
        attention = torch.nn.functional.scaled_dot_product_attention
        for keys in (slice(None), slice(77)):
            with torch.no_grad():
                plain = attention(query, key[..., keys, :], value[..., keys, :])
            kept = attention(query.clone().requires_grad_(), key[..., keys, :], value[..., keys, :])
            assert torch.equal(plain, kept.detach())
