"""What cannot be done with an improvement model ends with a message, before anything is lost; what is unusable is counted."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from outcomes import identical, rows, steady_rows, weights
from safetensors.torch import load_file, save_file
from tiny import tiny_animatediff, tiny_sd

from seppo_fast.configfile import parse_config
from seppo_fast.errors import UserError
from seppo_fast.planning.dry_run import dry_run
from seppo_fast.training.trainer import Trainer

SET = {"seppo.sampler.samples_per_iteration": 8}
KEYS: list[tuple[dict[str, Any], str]] = [
    ({"improvement.tasks": {"improve": 0.5}}, "tasks: the shares sum to 0.9, and must sum to 1: give all three"),
    ({"improvement.tasks": {"improve": 1.2, "reconstruct": -0.2, "unconditional": 0.0}},
     "tasks.reconstruct: expected a value greater than or equal to 0"),
    ({"improvement.tasks": {"improve": 0.0, "reconstruct": 0.5, "unconditional": 0.5}},
     "tasks: improve is 0, and the model would never"),
    ({"improvement.path": None}, "improvement.path is needed with method='iterative_dpo'"),
    ({"improvement.path": None, "improvement.revision": "main"}, "improvement: revision is given without path"),
    ({"reference_model.variant": "fp16"}, "reference_model: variant is given without path"),
    ({"improvement.guidance_scale": -1.0}, "improvement.guidance_scale: expected a value greater than or equal to 0"),
    ({"improvement.image_guidance_scale": -0.5}, "improvement.image_guidance_scale: expected a value greater than or equal to 0"),
    ({"improvement.guidance_scale": float("nan")}, "improvement.guidance_scale: expected a finite number"),
    ({"improvement.image_guidance_scale": float("inf")}, "improvement.image_guidance_scale: expected a finite number"),
    ({"flipper": "aaf"}, "flipper='aaf' does not go with method='iterative_dpo', which has 'none'"),
    ({"reference": "uniform"}, "reference='uniform' does not go with method='iterative_dpo', which has 'initial'"),
    ({"reference_score": "rollout"}, "reference_score='rollout' does not go with method='iterative_dpo'"),
    ({"method": "spin"}, "improvement.path does not go with method='spin'"),
    ({"reference_model.path": "x", "model.lora": {}}, "reference_model.path does not go with model.lora"),
    ({"method": "seppo", "improvement.path": None, "reference_model.path": "x"}, "whose reference is 'initial', not with 'seppo'"),
    ({"sampler.samples_per_iteration": 0}, "sampler.samples_per_iteration: expected a value greater than 0"),
    ({"sampler.samples_per_iteration": 8, "method": "spin", "improvement.path": None, "reference_score": "rollout"},
     "reference_score='rollout' does not go with sampler.samples_per_iteration"),
    *(({"sampler.samples_per_iteration": 8, "method": method, "improvement.path": None},
       f"samples_per_iteration does not go with method='{method}', which draws no samples")
      for method in ("dpo", "sft", "improvement")),
]


@pytest.fixture
def stage_two(settings: Any, improvement: Path) -> Any:
    """`stage_two(**changes)`: iterative DPO with 2 steps a sample."""
    return lambda **changes: settings(**{"seppo.method": "iterative_dpo", "seppo.improvement.path": str(improvement),
                                         "seppo.sampler.steps": 2, **changes})


@pytest.fixture
def stage_one(settings: Any, pickapic: Path) -> Any:
    """`stage_one(**changes)`: an improvement model's training."""
    return lambda **changes: settings(**{"seppo.method": "improvement", "seppo.data.source": str(pickapic), **changes})


@pytest.mark.parametrize(("changes", "message"), KEYS, ids=[message for _, message in KEYS])
def test_keys_that_do_not_go_together_are_named(changes: dict[str, Any], message: str, stage_two: Any) -> None:
    with pytest.raises(UserError) as error:
        parse_config(stage_two(**{f"seppo.{key}": value for key, value in changes.items()}))
    assert message in str(error.value)


def test_a_set_that_is_too_small_is_refused(stage_two: Any) -> None:
    with pytest.raises(UserError, match="samples_per_iteration=4: it must be at least the 8 pairs of an update"):
        dry_run(parse_config(stage_two(**{"seppo.sampler.samples_per_iteration": 4})), 1)


def test_models_that_do_not_fit_are_named(stage_two: Any, improvement: Path, sd: Path, tmp_path: Path) -> None:
    wide = tiny_sd(tmp_path / "wide")
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.rmtree(wide / part)
        shutil.copytree(sd / part, wide / part)
    video = tiny_animatediff(tmp_path / "video")
    no_image = "is a StableDiffusionPipeline, which is given no image that it could improve"
    from_an_image = "is a StableDiffusionInstructPix2PixPipeline: it changes a given image"
    for changes, message in (
        ({"improvement.path": str(sd)}, f"seppo.improvement.path: {sd} {no_image}"),
        ({"model.path": str(improvement)}, f"seppo.model.path: {improvement} {from_an_image}"),
        ({"reference_model.path": str(improvement)}, f"seppo.reference_model.path: {improvement} {from_an_image}"),
        ({"reference_model.path": str(wide)}, "its network is another: "),
        ({"reference_model.path": str(wide)}, "The reference must be a model of the policy's architecture"),
        ({"model.path": str(video), "data.video.frames": 4}, "There are no improvement models of videos"),
    ):
        with pytest.raises(UserError) as error:
            dry_run(parse_config(stage_two(**{f"seppo.{key}": value for key, value in changes.items()})), 1)
        assert message in str(error.value)


def test_data_without_losers_are_named(stage_one: Any, demonstrations: Path) -> None:
    with pytest.raises(UserError, match="method 'improvement' needs pairs of images, but the image folder .* has one image a row"):
        dry_run(parse_config(stage_one(**{"seppo.data.source": str(demonstrations)})), 1)


def test_a_pair_with_an_unreadable_half_is_skipped_and_counted(stage_one: Any, train: Any, pickapic: Path, tmp_path: Path,
                                                               capsys: pytest.CaptureFixture) -> None:
    pairs = pq.read_table(pickapic).to_pylist()
    pairs[1]["jpg_0"] = pairs[1]["jpg_0"][:40]
    pq.write_table(pa.Table.from_pylist(pairs), tmp_path / "pairs.parquet")
    run = train(stage_one(**{"seppo.data.source": str(tmp_path / "pairs.parquet"), "seppo.data.max_skipped": 0.2,
                             "seppo.iterations": 1, "seppo.updates_per_iteration": 1}))
    output = "".join(capsys.readouterr())
    assert "11 preference pairs are usable" in output and len(rows(run)) == 1
    (skipped,) = (run / "skipped.jsonl").read_text().splitlines()
    assert "pairs.parquet:1" in skipped and "Truncated" in skipped


@pytest.fixture
def overflowing(improvement: Path, tmp_path: Path) -> Path:
    """An improvement model of finite weights, whose answers are not."""
    folder = tmp_path / "overflowing"
    shutil.copytree(improvement, folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"conv_out.weight": tensors["conv_out.weight"] * 1e38}, file, {"format": "pt"})
    return folder


def test_improved_samples_that_are_not_finite_are_said_and_end_the_run(stage_two: Any, overflowing: Path, train: Any,
                                                                       tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    raw = stage_two(**{"seppo.improvement.path": str(overflowing), "seppo.max_nonfinite": 2})
    with pytest.raises(UserError) as error:
        train(raw)
    assert "2 updates in a row" in str(error.value) and "Lower optimizer.params.lr" not in str(error.value)
    assert "Of its 8 samples 8 are not finite: 8 became so in the improvement model" in str(error.value)
    assert "update 1 is skipped: of its 8 samples 8 are not finite" in "".join(capsys.readouterr())
    with pytest.raises(UserError, match="only 0 of 8 samples are finite.* Of the others 8 became so in the improvement model"):
        train(stage_two(**{"seppo.improvement.path": str(overflowing), "seppo.output_dir": str(tmp_path / "set"), **SET}))


def test_one_improved_sample_that_is_not_finite_is_dropped_and_counted(stage_two: Any, train: Any, monkeypatch: Any,
                                                                       capsys: pytest.CaptureFixture) -> None:
    from seppo_fast.reference.improver import Improver

    improve = Improver.improve

    def broken(self: Improver, losers: Any, *rest: Any) -> Any:
        winners = improve(self, losers, *rest)
        winners[0, 0, 0, 0] = float("nan")
        return winners

    monkeypatch.setattr(Improver, "improve", broken)
    run = train(stage_two(**{"seppo.sampler.samples_per_iteration": 12, "seppo.sampler.batch_size": 12}))
    assert "iteration 1: 1 of 12 samples are not finite, and are dropped" in "".join(capsys.readouterr())
    assert all(row["loss"] is not None and row["skipped_steps"] == 0 for row in rows(run)) and len(rows(run)) == 4


@pytest.mark.parametrize("key", ["improvement", "reference_model"])
def test_a_run_goes_on_with_the_models_that_it_began_with(key: str, stage_two: Any, improvement: Path, sd: Path, train: Any,
                                                          tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(improvement if key == "improvement" else sd, model)
    train(stage_two(**{f"seppo.{key}.path": str(model), "seppo.iterations": 1}))
    longer = stage_two(**{f"seppo.{key}.path": str(model), "seppo.iterations": 2})
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    kept, tensors = file.read_bytes(), load_file(file)
    save_file(tensors | {"conv_out.bias": tensors["conv_out.bias"] + 1e-3}, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"was trained with other weights than those that seppo.{key}.path has now"):
        train(longer, "auto")
    file.write_bytes(kept)
    assert len(rows(train(longer, "auto"))) == 4


def test_samples_of_other_settings_in_the_same_folder_are_drawn_anew(stage_two: Any, train: Any, tmp_path: Path, monkeypatch: Any
                                                                     ) -> None:
    def stop(*_: Any) -> None:
        raise RuntimeError("before the first checkpoint")

    short = {**SET, "seppo.iterations": 1, "seppo.updates_per_iteration": 1}
    for changes in ({}, {"seppo.seed": 5}):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="before the first checkpoint"):
            patch.setattr(Trainer, "report", stop)
            train(stage_two(**short, **changes), "auto")
    changes = {"seppo.seed": 5, "seppo.improvement.guidance_scale": 2.0}
    there = train(stage_two(**short, **changes), "auto")
    fresh = train(stage_two(**short, **changes, **{"seppo.output_dir": str(tmp_path / "fresh")}))
    assert identical(weights(there), weights(fresh)) and steady_rows(there) == steady_rows(fresh)


def test_a_disk_that_is_full_leaves_the_last_checkpoint_to_go_on_from(stage_two: Any, forks: Any, train: Any,
                                                                      tmp_path: Path) -> None:
    large = {"seppo.sampler.samples_per_iteration": 64, "seppo.sampler.batch_size": 64, "seppo.updates_per_iteration": 1}
    train(stage_two(**large, **{"seppo.iterations": 1}))
    full = forks.run(stage_two(**large), "--resume", "auto", file_limit=60_000)
    assert full.status == 2 and "Traceback" not in full.output, full.output[-2000:]
    assert "the samples of iteration 2 cannot be written" in full.output and "make room under" in full.output
    assert not list((tmp_path / "run" / "rollouts").rglob("iteration_00002/*"))
    assert [row["iteration"] for row in rows(train(stage_two(**large), "auto"))] == [1, 2]


def test_zero_3_and_bf16_train_both_stages_on_two_ranks(stage_one: Any, stage_two: Any, train_on_ranks: Any,
                                                        tmp_path: Path) -> None:
    half = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 4,
            "seppo.updates_per_iteration": 1}
    runs = train_on_ranks([stage_one(**half, **{"seppo.output_dir": str(tmp_path / "one")}),
                           stage_two(**half, **{"seppo.output_dir": str(tmp_path / "two"), **SET})])
    for run in runs:
        assert [row["skipped_steps"] for row in rows(run)] == [0] * 2 and (run / "final" / "model_index.json").is_file()
    assert rows(runs[0])[-1]["image_weight_norm"] > 0


def test_a_runs_folder_in_place_of_its_model_is_named(stage_two: Any, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    for name in ("run.json", "config.json"):
        (tmp_path / "one" / name).write_text("{}")
    with pytest.raises(UserError, match="one has no model_index.json.* the trained model is in .*one/final"):
        dry_run(parse_config(stage_two(**{"seppo.improvement.path": str(tmp_path / "one")})), 1)


def test_the_plan_says_how_many_samples_of_a_set_are_never_used(stage_two: Any) -> None:
    plan = dry_run(parse_config(stage_two(**{"seppo.sampler.samples_per_iteration": 40})), 1)
    assert "80 in all, 40 an iteration, of which 24 are never used" in plan
