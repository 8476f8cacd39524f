"""The shipped configurations of flow models, on tiny models of the same architecture."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from forked import Forks
from tiny import tiny_flux, tiny_sd3


@pytest.mark.parametrize(("name", "make", "pipeline"), [
    ("ds_a100_sd35.json", tiny_sd3, StableDiffusion3Pipeline), ("ds_a100_flux.json", tiny_flux, FluxPipeline)])
def test_a_few_updates(name: str, make: Callable[..., Path], pipeline: type, forks: Forks, demonstrations: Path, tmp_path: Path
                       ) -> None:
    model, run = make(tmp_path / "model"), tmp_path / "run"
    result = forks.run(name, "--set", f"seppo.model.path={model}", f"seppo.data.source={demonstrations}", f"seppo.output_dir={run}",
                       f"seppo.data.cache_dir={tmp_path / 'cache'}", "seppo.data.resolution=16", "seppo.iterations=2",
                       "seppo.updates_per_iteration=1", "seppo.sampler.steps=2", "train_batch_size=4",
                       "train_micro_batch_size_per_gpu=2")
    assert result.status == 0, result.output[-3000:]
    assert f"done: the trained model is in {run / 'final'}" in result.output
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(row["beta"] > 0 for row in rows)
    weights = pipeline.lora_state_dict(run / "final")
    names = (weights[0] if isinstance(weights, tuple) else weights).keys()
    assert all(any(f".{part}." in key for key in names) for part in ("to_q", "to_out.0", "add_k_proj", "to_add_out"))
