"""The trainer that the loss's page shows trains, as it stands there."""

import re
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT
from diffusers import UNet2DConditionModel
from torch.utils.data import DataLoader

PAGE = ROOT / "seppo_fast" / "ops" / "README.md"


def test_the_example_trains(sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two updates of two batches each, on the CPU; in the first one, policy and reference are equal."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    code = re.search(r"## With accelerate\n.*?```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    code = code.replace("num_inference_steps=25", "num_inference_steps=2").replace("lr=1e-6", "lr=1e-3")
    code = code.replace("        accelerator.backward(loss)", "        history.append(stats)\n        accelerator.backward(loss)")
    torch.manual_seed(0)
    pairs = [(torch.rand(3, 16, 16) * 2 - 1, prompt) for prompt in ("a cat", "a dog") * 4]
    names = {"model": str(sd), "demonstrations": DataLoader(pairs, batch_size=2), "history": []}
    try:
        exec(code, names)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)  # it is the process's, and other tests train in it
    assert names["updates"] == 2 and len(names["history"]) == 4
    assert [bool((stats.logits == 0).all()) for stats in names["history"]] == [True, True, False, False]
    saved, before = (UNet2DConditionModel.from_pretrained(folder / "unet").state_dict() for folder in (tmp_path / "aligned", sd))
    assert any((saved[name] - before[name]).abs().max() > 1e-4 for name in saved)
    assert all(torch.equal(weight, before[name]) for name, weight in names["reference"].state_dict().items())
