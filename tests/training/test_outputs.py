"""The run folder: metrics, sample grids, monitors, the configuration; and what these must not change in training."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from outcomes import apart, column, identical, rows, weights
from PIL import Image

from seppo_fast.configfile import load_config, parse_config
from seppo_fast.seeds import normal

Trained = Callable[..., Path]
COLUMNS = """update iteration reference loss model_mse_winner model_mse_loser ref_mse_winner ref_mse_loser aaf_rate
    winner_gain loser_gain winner_worse implicit_acc logit_p05 logit_p50 logit_p95 abs_logit_p50 grad_norm lr beta
    skipped_steps pairs_per_s peak_memory_gb seconds seconds_sampling seconds_training seconds_data seconds_evaluation
    seconds_grids seconds_pool seconds_checkpoints seconds_other""".split()
PROMPTS = ["a handwritten one", "a red cat", "a photo of the sky"]
GRIDS = {"seppo.samples": {"every": 2, "prompts": PROMPTS, "per_prompt": 2, "seed": 3}}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def samples_of(grid: np.ndarray) -> list[np.ndarray]:
    """The samples of 16x16 pixels of a grid of two columns, each pixel of which it shows as 8x8 equal ones."""
    tiles = [grid[145 * i + 16 : 145 * i + 144, 129 * j : 129 * j + 128] for i in range(3) for j in range(2)]
    assert all((np.kron(tile[::8, ::8], np.ones((8, 8, 1), np.uint8)) == tile).all() for tile in tiles)
    return [tile[::8, ::8] for tile in tiles]


def test_metrics_have_their_columns(trained: Trained) -> None:
    for number, row in enumerate(rows(trained()), start=1):
        assert list(row) == COLUMNS
        assert row["update"] == number and row["iteration"] == (number + 1) // 2
        assert row["loss"] > 0 and row["grad_norm"] > 0 and row["lr"] == 1e-3 and row["skipped_steps"] == 0
        assert 0 <= row["aaf_rate"] <= 1 and 0 <= row["implicit_acc"] <= 1
        assert row["logit_p05"] <= row["logit_p50"] <= row["logit_p95"]
        assert row["seconds_sampling"] > 0 and row["seconds_training"] > 0
        assert sum(row[name] for name in COLUMNS if name.startswith("seconds_")) == pytest.approx(row["seconds"], abs=1e-3)
        assert row["pairs_per_s"] == pytest.approx(8 / row["seconds"], rel=0.01)
        # What follows an iteration's last row is in the next: its place in the pool and its checkpoint.
        assert (row["seconds_pool"] > 0) == (number % 2 == 1) and row["seconds_grids"] == row["seconds_evaluation"] == 0
        assert number != 3 or row["seconds_checkpoints"] > 0.001
        assert 0.1 < row["peak_memory_gb"] < 64


def test_learning_rate_is_the_one_that_was_used(trained: Trained) -> None:
    schedule = {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_max_lr": 1e-3, "warmup_type": "linear"}}
    run = trained(scheduler=schedule)
    assert column(run, "lr") == sorted(column(run, "lr")) and column(run, "lr")[0] < column(run, "lr")[-1] <= 1e-3


def test_grids_come_at_their_turn(trained: Trained) -> None:
    run = trained(**GRIDS)
    assert sorted(path.name for path in (run / "samples").iterdir()) == [f"update_{n:08}.png" for n in (0, 2, 4)]
    before, middle, after = (pixels(path) for path in sorted((run / "samples").iterdir()))
    assert before.shape == (3 * 145 - 1, 2 * 129 - 1, 3)  # a row a prompt, each pixel eight wide, a line of text above
    assert (before[144] == 255).all() and (before[:, 128] == 255)[16:144].all()
    captions = [before[145 * i : 145 * i + 16] for i in range(3)]
    assert all(40 < (caption < 128).all(axis=2).sum() < 1000 for caption in captions)
    tiles = [samples_of(before)[k] for k in range(6)]
    assert all((one != other).any() for k, one in enumerate(tiles) for other in tiles[:k])
    assert (before != middle).any() and (middle != after).any()


def test_grid_is_what_diffusers_draws(trained: Trained) -> None:
    """The last grid, from the same noise, by plain diffusers and the exported model."""
    run = trained(**GRIDS)
    pipeline = StableDiffusionPipeline.from_pretrained(run / "final")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    noise = normal((4, 8, 8), 3, "grid", range(6))
    images = pipeline([prompt for prompt in PROMPTS for _ in range(2)], num_inference_steps=3, guidance_scale=2.0, latents=noise,
                      height=16, width=16, output_type="np").images
    grid = pixels(run / "samples" / "update_00000004.png")
    for tile, image in zip(samples_of(grid), images, strict=True):
        assert np.abs(tile - image * 255).max() < 1


def test_grids_differ_by_the_policy_alone(trained: Trained) -> None:
    """Equal weights give equal grids, whatever the run is; its own draws do not touch training."""
    seppo, sft = trained(**GRIDS), trained(**GRIDS, **{"seppo.method": "sft", "seppo.seed": 5})
    first, last = ([pixels(run / "samples" / f"update_{n:08}.png") for run in (seppo, sft)] for n in (0, 4))
    assert (first[0] == first[1]).all() and (last[0] != last[1]).any()
    assert identical(weights(seppo), weights(trained()))
    every = trained(**{"seppo.samples": {**GRIDS["seppo.samples"], "every": 1}})  # in the middle of an iteration, too
    assert identical(weights(every), weights(trained()))
    assert (pixels(every / "samples" / "update_00000002.png") == pixels(seppo / "samples" / "update_00000002.png")).all()


def test_grid_prompts_default_to_the_data(trained: Trained) -> None:
    run = trained(**{"seppo.samples": {"every": 4}})
    assert pixels(run / "samples" / "update_00000000.png").shape == (4 * 145 - 1, 128, 3)
    assert not (trained() / "samples").exists()


def test_csv_monitor(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("monitor")
    run = trained(csv_monitor={"enabled": True, "output_path": str(folder), "job_name": "job"})
    for name in ("loss", "aaf_rate", "grad_norm", "lr", "logit_p50", "seconds_sampling", "skipped_steps"):
        (file,) = (folder / "job").rglob(f"*seppo_{name}.csv")
        header, *lines = csv.reader(file.read_text().splitlines())
        assert len(header) == 2
        assert [int(step) for step, _ in lines] == [1, 2, 3, 4]
        assert [float(value) for _, value in lines] == pytest.approx(column(run, name))
    assert identical(weights(run), weights(trained()))


def test_config_is_written_as_resolved(trained: Trained) -> None:
    run = trained()
    written = load_config(str(run / "config.json"))
    assert written.seppo.reference == "uniform" and written.seppo.flipper == "aaf"  # the method's, spelled out
    assert written.seppo.output_dir == str(run) and written.seppo.sampler.solver == "ddim"
    assert written.deepspeed["train_batch_size"] == 8
    assert parse_config(json.loads((run / "config.json").read_text())) == written
    assert written.as_dict() == json.loads((run / "config.json").read_text())


def test_written_config_trains_the_same_model(trained: Trained, train: Callable[..., Path], tmp_path: Path) -> None:
    raw: dict[str, Any] = json.loads((trained() / "config.json").read_text())
    raw["seppo"]["output_dir"] = str(tmp_path / "again")
    assert identical(weights(train(raw)), weights(trained()))


@pytest.mark.parametrize("precision", [{}, {"bf16": {"enabled": True}}])
def test_gradient_checkpointing_changes_nothing(precision: dict[str, Any], trained: Trained) -> None:
    once, twice = (trained(**precision, **{"seppo.model.gradient_checkpointing": flag}) for flag in (False, True))
    assert apart(weights(once), weights(twice)) < 1e-7
    assert column(once, "loss") == pytest.approx(column(twice, "loss"), rel=1e-6)


def test_caches_and_runs_are_apart(trained: Trained, cache_dir: Path) -> None:
    """Nothing but what the design names is in a run folder."""
    run = trained(**GRIDS)
    assert {path.name for path in run.iterdir()} == {"run.json", "config.json", "metrics.jsonl", "skipped.jsonl", "samples",
                                                     "checkpoints", "pool", "final", "status.json"}
    assert torch.tensor(column(run, "loss")).isfinite().all() and any(cache_dir.iterdir())
