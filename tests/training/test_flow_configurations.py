"""The shipped configurations of flow models, on tiny models of the same architecture."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from data.video_files import pictures, write_csv, write_video
from diffusers import FluxPipeline, QwenImagePipeline, StableDiffusion3Pipeline, WanPipeline
from forked import Forks
from tiny import tiny_flux, tiny_sd3
from tiny_qwen import tiny_qwen
from tiny_wan import tiny_wan


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A CSV of clips of 12 frames."""
    names = [f"clip{i}" for i in range(5)]
    for i, name in enumerate(names):
        write_video(tmp_path / "clips" / f"{name}.webm", pictures(12, 32, 40, seed=i))
    return write_csv(tmp_path / "clips" / "clips.csv", [(name, "a cat", 1) for name in names])


@pytest.mark.parametrize(("name", "make", "pipeline"), [
    ("ds_a100_sd35.json", tiny_sd3, StableDiffusion3Pipeline), ("ds_a100_flux.json", tiny_flux, FluxPipeline),
    ("ds_a100_qwen.json", tiny_qwen, QwenImagePipeline), ("ds_a100_wan.json", tiny_wan, WanPipeline)])
def test_a_few_updates(name: str, make: Callable[..., Path], pipeline: type, forks: Forks, demonstrations: Path, clips: Path,
                       tmp_path: Path) -> None:
    model, run, wan = make(tmp_path / "model"), tmp_path / "run", make is tiny_wan
    sizes = ["seppo.data.resolution=32", "seppo.data.video.frames=5"] if wan else ["seppo.data.resolution=16"]
    result = forks.run(name, "--set", f"seppo.model.path={model}", f"seppo.data.source={clips if wan else demonstrations}",
                       f"seppo.output_dir={run}", f"seppo.data.cache_dir={tmp_path / 'cache'}", *sizes, "seppo.iterations=2",
                       "seppo.updates_per_iteration=1", "seppo.sampler.steps=2", "train_batch_size=4",
                       "train_micro_batch_size_per_gpu=2")
    assert result.status == 0, result.output[-3000:]
    assert f"done: the trained model is in {run / 'final'}" in result.output
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(row["beta"] > 0 for row in rows)
    weights = pipeline.lora_state_dict(run / "final")
    names = (weights[0] if isinstance(weights, tuple) else weights).keys()
    added = () if wan else ("add_k_proj", "to_add_out")  # Wan's prompts have no queries
    assert all(any(f".{part}." in key for key in names) for part in ("to_q", "to_out.0", *added))
