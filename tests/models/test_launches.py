"""Attention over more rows than one launch holds, with the limit lowered on the CPU, and kernels that fail."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import MotionAdapter, UNetMotionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0, XFormersAttnProcessor
from diffusers.utils import is_xformers_available
from tiny import tiny_adapter, unet
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from seppo_fast.errors import UserError
from seppo_fast.models import attention
from seppo_fast.models.attention import choose_attention
from seppo_fast.models.launches import MOST, Launches, inner, set_processors
from seppo_fast.reference.tuning import changed, fused_projections

ROOT = Path(__file__).parent.parent.parent
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BROKEN = "libcudart.so.12: cannot open shared object file"


def layer(heads: int = 4, channels: int = 32, prompt: int | None = None, fused: bool = False) -> Attention:
    torch.manual_seed(0)
    made = Attention(channels, prompt, heads, dim_head=channels // heads)
    if fused:
        made.fuse_projections()
        made.set_processor(FusedAttnProcessor2_0())
    return made


class Launched(TorchFunctionMode):
    """`rows` of each launch of PyTorch's attention under it."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            self.rows.append(len(args[0]))
        return func(*args, **(kwargs or {}))


def answer(attend: nn.Module, rows: int, prompt: int | None) -> list[Tensor]:
    """The output, and the gradients of input and weights."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, 6, 32, generator=generator).requires_grad_()
    given = None if prompt is None else torch.randn(rows, 5, prompt, generator=generator)
    attend.zero_grad()
    out = attend(hidden, given)
    out.square().sum().backward()
    return [out.detach(), hidden.grad, *(weight.grad.clone() for weight in attend.parameters() if weight.grad is not None)]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("prompt", [None, 24])
def test_pieces_are_the_whole_to_the_bit(prompt: int | None, fused: bool) -> None:
    attend = layer(prompt=prompt, fused=fused)
    whole = answer(attend, 11, prompt)
    attend.set_processor(Launches(attend.processor, most=4 * 3 + 1))
    with Launched() as launched:
        pieces = answer(attend, 11, prompt)
        answer(attend, 3, prompt)
    assert launched.rows == [3, 3, 3, 2, 3], "what fits is one launch"
    assert len(whole) >= 5 and all(torch.equal(one, other) for one, other in zip(whole, pieces, strict=True))


def test_xformers_rows_that_do_not_fit_go_to_pytorch() -> None:
    """Its processor folds the heads into the batch; it is not installed here, and not called."""
    attend = layer()
    whole = answer(attend, 11, None)
    attend.set_processor(Launches(XFormersAttnProcessor(), most=4 * 5))
    with Launched() as launched:
        assert all(torch.equal(one, other) for one, other in zip(whole, answer(attend, 11, None), strict=True))
    assert launched.rows == [5, 5, 1]


def test_pieces_compile() -> None:
    attend = layer()
    hidden = torch.randn(11, 6, 32)
    with torch.no_grad():
        whole = attend(hidden)
        attend.set_processor(Launches(attend.processor, most=4 * 3))
        attend.compile(backend="eager")
        assert torch.equal(attend(hidden), whole)


def motion(tmp_path: Path) -> UNetMotionModel:
    return UNetMotionModel.from_unet2d(unet(), MotionAdapter.from_pretrained(tiny_adapter(tmp_path)))


def frames(network: nn.Module, places: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, prompt = (torch.randn(*shape, generator=generator) for shape in ((2, 4, 4, places, places), (8, 7, 32)))
    return network(latents, torch.tensor([3, 9]), encoder_hidden_states=prompt).sample


@pytest.mark.parametrize("checkpointing", [False, True])
def test_motion_modules_in_pieces(checkpointing: bool, tmp_path: Path) -> None:
    """Their rows are places: 2 x 8 x 8 of 4 heads. Recomputed in backward, they are in pieces as well."""
    network = motion(tmp_path).train()
    if checkpointing:
        network.enable_gradient_checkpointing()

    def gradients() -> list[Tensor]:
        network.zero_grad()
        out = frames(network)
        out.square().mean().backward()
        return [out.detach(), *(weight.grad.clone() for weight in network.parameters())]

    whole = gradients()
    set_processors(network)
    for part in network.modules():
        if isinstance(part, Attention):
            part.processor.most = 4 * 50
    with Launched() as launched:
        assert all(torch.equal(one, other) for one, other in zip(whole, gradients(), strict=True))
    assert max(launched.rows) == 50 and 2 * 64 - 2 * 50 in launched.rows


def test_on_a_gpu_every_layer_is_split(tmp_path: Path) -> None:
    """As configured, nothing runs: no device is asked."""
    network = motion(tmp_path)
    choose_attention([network], "sdpa", (4, 8, 8), torch.bfloat16, torch.device("cuda"), lambda line: None)
    processors = list(network.attn_processors.values())
    assert {type(processor) for processor in processors} == {Launches} and {processor.most for processor in processors} == {MOST}
    assert {type(inner(processor)) for processor in processors} == {AttnProcessor2_0}
    changes, _ = fused_projections(network)
    with changed(changes):
        assert {type(inner(processor)) for processor in network.attn_processors.values()} == {FusedAttnProcessor2_0}
        frames(network)


def test_a_layer_that_is_measured_is_the_networks_own(tmp_path: Path) -> None:
    """Heads and channels of its projections; and it runs."""
    network = motion(tmp_path)
    kinds = attention.layers(network, (4, 8, 8))
    real = {(part.heads, part.to_q.weight.shape, part.to_k.weight.shape)
            for part in network.modules() if isinstance(part, Attention)}
    measured = set()
    for kind in kinds:
        rows = 2 * kind.sequences
        attend, *given = attention._alone(kind, Launches(AttnProcessor2_0()), rows, torch.bfloat16, torch.device("cpu"))
        measured.add((attend.heads, attend.to_q.weight.shape, attend.to_k.weight.shape))
        assert attend(*given).shape == (rows, kind.tokens, kind.channels)
    assert measured == real


def fails(name: str) -> Callable[..., float]:
    def seconds(processor: type, *given: object) -> float:
        if name in ("both", processor.__name__):
            raise RuntimeError("CUDA error: invalid configuration argument\nCompile with TORCH_USE_CUDA_DSA")
        return 0.002

    return seconds


@pytest.mark.parametrize(("failing", "chosen"), [("XFormersAttnProcessor", "sdpa"), ("AttnProcessor2_0", "xformers")])
def test_a_kernel_that_fails_loses_and_is_named(failing: str, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(attention, "_missing", lambda *given: None)
    monkeypatch.setattr(attention, "_seconds", fails(failing))
    assert choose_attention([unet()], "auto", (8, 8), torch.bfloat16, torch.device("cpu"), said.append) == chosen
    loser = "xformers" if chosen == "sdpa" else "sdpa"
    assert f"{loser} fails (RuntimeError: CUDA error: invalid configuration argument)" in said[0] and f"{chosen} 2.00 ms" in said[0]


def test_two_that_fail_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_missing", lambda *given: None)
    monkeypatch.setattr(attention, "_seconds", fails("both"))
    with pytest.raises(UserError, match=r"no kernel works here .*bfloat16: xformers fails \(.*\); sdpa fails \(.*\)"):
        choose_attention([unet()], "auto", (8, 8), torch.bfloat16, torch.device("cpu"))


@pytest.mark.slow
def test_a_broken_xformers_is_reported(tmp_path: Path) -> None:
    """A package with metadata whose import raises, as a wheel for another CUDA does: diffusers alone would fail with it."""
    package = tmp_path / "xformers"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "ops.py").write_text(f"raise OSError({BROKEN!r})\n")
    (tmp_path / "xformers-0.0.35.dist-info").mkdir()
    (tmp_path / "xformers-0.0.35.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: xformers\nVersion: 0.0.35\n")
    code = f"""
import sys
sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch
from diffusers.utils import is_xformers_available
assert is_xformers_available()
import seppo_fast.reference
from seppo_fast.errors import UserError
from seppo_fast.models.attention import choose_attention
from tiny import unet
net = unet()
assert choose_attention([net], "auto", (8, 8), torch.bfloat16, torch.device("cuda")) == "sdpa"
try:
    choose_attention([net], "xformers", (8, 8), torch.bfloat16, torch.device("cuda"))
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    why = f"xformers is installed and cannot be imported (OSError: {BROKEN})"
    assert f"attention: sdpa ({why})" in done.stdout and f'"xformers" does not work here: {why}' in done.stdout


@GPU
@pytest.mark.parametrize("kind", [AttnProcessor2_0, FusedAttnProcessor2_0, XFormersAttnProcessor])
@pytest.mark.parametrize("heads", [1, 8])
def test_65536_rows_on_a_gpu(kind: type, heads: int) -> None:
    """Of 16 frames, forward and backward, as a motion module has them; each row as when it is alone with a few."""
    if kind is XFormersAttnProcessor and not is_xformers_available():
        pytest.skip("needs xformers")
    attend = layer(heads, 320, fused=kind is FusedAttnProcessor2_0).to("cuda", torch.bfloat16)
    attend.set_processor(Launches(kind()))
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(MOST + 1, 16, 320, device="cuda", dtype=torch.bfloat16, generator=generator).requires_grad_()
    out = attend(hidden)
    out.float().square().sum().backward()
    few = hidden.detach()[-64:].requires_grad_()
    expected = attend(few)
    expected.float().square().sum().backward()
    torch.testing.assert_close(out[-64:], expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(hidden.grad[-64:], few.grad, rtol=0.05, atol=0.05)
