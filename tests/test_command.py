"""What the person who runs the command sees: the literal commands, the plan, and every way in which it can end early."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, free_port, make_demonstrations
from forked import Forks, Strike


@pytest.fixture
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """`deepspeed` and `python` are those of this environment."""
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


def deepspeed(*arguments: str) -> Any:
    """The command as it is typed in the repository's root, but for a port that two tests can share a machine with."""
    import subprocess

    return subprocess.run(["deepspeed", "--master_port", free_port(), "seppo_fast/train.py", *arguments], cwd=ROOT, text=True,
                          capture_output=True, timeout=280)


def words(result: Any, *expected: str, status: int = 2) -> str:
    """The one message of a run that could not be done: no traceback, said once, with these words in it."""
    assert result.status == status, result.output[-3000:]
    assert "Traceback" not in result.output
    assert result.output.count("seppo_fast: ") == 1, result.output[-3000:]
    message = result.output[result.output.index("seppo_fast: "):]
    for word in expected:
        assert word in message, message
    return message


@pytest.mark.slow
def test_the_quickstarts_command(on_path: None, sd: Path, demonstrations: Path, cache_dir: Path, tmp_path: Path) -> None:
    result = deepspeed("--config", "quickstart.json", "--set", f"seppo.model.path={sd}", f"seppo.data.source={demonstrations}",
                       f"seppo.data.cache_dir={cache_dir}", f"seppo.output_dir={tmp_path / 'run'}", "seppo.iterations=2",
                       "seppo.updates_per_iteration=1", "seppo.sampler.steps=2", "train_batch_size=4",
                       "train_micro_batch_size_per_gpu=4")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert "seppo_fast 0.1.0: the plan" in result.stdout
    assert f"done: the trained model is in {tmp_path / 'run' / 'final'}" in result.stdout
    assert (tmp_path / "run" / "final" / "model_index.json").is_file()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    leaked = [file.name for file in Path("/dev/shm").glob("deepspeed_*")] if Path("/dev/shm").is_dir() else []
    assert not leaked, "DeepSpeed's shared memory outlives the run"


def test_the_a100_dry_run(forks: Forks, tmp_path: Path) -> None:
    result = forks.run("ds_a100.json", "--dry-run", "--set", f"seppo.output_dir={tmp_path / 'run'}")
    assert result.status == 0, result.output[-2000:]
    for line in ("effective batch    2048 pairs = 8 a rank x", "beta 2000", "all weights", "at 512 pixels",
                 "210 = 7 iterations x 30",
                 "5e-06 as it is, not scaled by the batch (AdamW, schedule constant, warm-up 0 updates)", "ddim, 50 steps",
                 "before you train: seppo.data.source is not set: --set seppo.data.source=PATH",
                 "before you train: seppo.model.path stable-diffusion-v1-5/stable-diffusion-v1-5 is no directory here",
                 "859.5 M parameters (859.5 M trained)", "0.803 TFLOP a forward", "memory a rank      about",
                 "time for 430080 pairs = 7 iterations x 61440 on", "NVIDIA A100: ", "reference_score rollout",
                 "dry run: nothing was trained or written"):
        assert line in result.output, result.output
    assert not (tmp_path / "run").exists()


def test_the_video_dry_run(forks: Forks, tmp_path: Path) -> None:
    raw = json.loads((ROOT / "seppo_fast/configs/ds_a100_video.json").read_text())
    raw["seppo"]["output_dir"] = str(tmp_path / "run")
    result = forks.run(raw, "--dry-run")
    assert result.status == 0, result.output[-2000:]
    for line in ("stable-diffusion-v1-5/stable-diffusion-v1-5 with guoyww/animatediff-motion-adapter-v1-5-2, 1318 M parameters",
                 "LoRA rank 16 on the temporal layers", "at 256 pixels, 16 frames (dynamic)", "1000 = 40 iterations x 25",
                 "4.13 TFLOP a forward", "before you train: seppo.data.source is not set",
                 "before you train: seppo.model.motion_adapter guoyww/animatediff-motion-adapter-v1-5-2 is no directory here"):
        assert line in result.output, result.output
    raw["seppo"]["data"]["video"]["frames"] = 33
    words(forks.run(raw, "--dry-run"), "seppo.data.video.frames: 33 are more than the 32 positions", "set it to 32 or fewer")


def test_the_a100_batch_on_eight_ranks() -> None:
    from seppo_fast.configfile import batch_plan, load_config

    batch = batch_plan(load_config("ds_a100.json").deepspeed, 8)
    assert (batch.size, batch.micro, batch.accumulation) == (2048, 8, 32)


def test_a_dry_run_with_model_and_data(settings: Callable[..., dict[str, Any]], forks: Forks, tmp_path: Path) -> None:
    result = forks.run(settings(**{"seppo.model.lora": {"rank": 4}}), "--dry-run")
    assert result.status == 0
    for line in ("M parameters", "M trained), LoRA rank 4", "24 demonstrations", "TFLOP a forward", "% of it for reference samples",
                 "memory a rank      about", "dry run: nothing was trained or written"):
        assert line in result.output, result.output
    assert "before you train" not in result.output
    assert not (tmp_path / "run").exists()


def test_rates_of_ones_own(settings: Callable[..., dict[str, Any]], forks: Forks, tmp_path: Path) -> None:
    rates = {"device": "NVIDIA H200", "matmul_tflops": 700.0, "sampling_fraction": 0.5, "training_fraction": 0.25, "source": "own"}
    (tmp_path / "rates.json").write_text(json.dumps({"rates": rates}))
    result = forks.run(settings(), "--dry-run", "--rates", str(tmp_path / "rates.json"))
    assert result.status == 0
    assert "700 TFLOP/s; sampling 50% of it (8 at a time); training 25% of it (4 pairs at a time)" in result.output, result.output
    words(forks.run(settings(), "--dry-run", "--rates", str(tmp_path / "none.json")), "--rates", "none.json")


def test_a_dry_run_says_it_once_on_two_ranks(settings: Callable[..., dict[str, Any]], forks: Forks) -> None:
    result = forks.run(settings(), "--dry-run", ranks=2)
    assert result.statuses == [0, 0] and result.output.count("the plan") == 1
    assert "8 pairs = 4 a rank x 1 accumulated x 2 ranks" in result.output


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(("path", "value", "expected"), [
    ("seppo.model.path", "/nowhere/model", ["seppo.model.path", "/nowhere/model", "does not exist"]),
    ("seppo.data.source", "/nowhere/data", ["seppo.data.source", "/nowhere/data", "no such file or folder"]),
    ("seppo.sampler.steps", 2000, ["seppo.sampler.steps", "2000"]),
    ("seppo.betta", 1.0, ["seppo.betta: unknown key; did you mean seppo.beta?"]),
    ("train_batch_size", 9, ["train_batch_size 9 is not", "multiply out"]),
])
def test_what_is_wrong_stops_a_run_and_a_dry_run(path: str, value: Any, expected: list[str], dry: bool, forks: Forks,
                                                 settings: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    words(forks.run(settings(**{path: value}), *(["--dry-run"] if dry else [])), *expected)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_two_ranks_say_once_what_is_wrong(settings: Callable[..., dict[str, Any]], forks: Forks) -> None:
    for _ in range(3):  # whoever comes first
        result = forks.run(settings(**{"seppo.betta": 1.0}), ranks=2)
        assert result.statuses == [2, 2]
        words(result, "seppo.betta: unknown key")


def test_no_data_source(settings: Callable[..., dict[str, Any]], forks: Forks) -> None:
    words(forks.run(settings(**{"seppo.data.source": None})), "seppo.data.source is not set", "--set seppo.data.source=PATH")


def test_an_empty_data_set(settings: Callable[..., dict[str, Any]], forks: Forks, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    raw = settings(**{"seppo.data.source": str(tmp_path / "data")})
    words(forks.run(raw), str(tmp_path / "data"), "it is empty")
    (tmp_path / "data" / "metadata.jsonl").write_text("")
    words(forks.run(raw), str(tmp_path / "data"), "no rows")


def test_too_many_bad_rows_and_then_mended(settings: Callable[..., dict[str, Any]], forks: Forks, tmp_path: Path) -> None:
    data = make_demonstrations(tmp_path / "data", 10)
    (data / "3.png").write_bytes(b"")
    (data / "4.png").write_bytes((data / "4.png").read_bytes()[:200])
    raw = settings(**{"seppo.data.source": str(data), "seppo.iterations": 1, "seppo.updates_per_iteration": 1})
    message = words(forks.run(raw), "2 of 10 rows (20.0%) cannot be used; seppo.data.max_skipped allows 5.0%", "metadata.jsonl:",
                    str(tmp_path / "run" / "skipped.jsonl"))
    assert len(message.strip().splitlines()) == 4
    assert len((tmp_path / "run" / "skipped.jsonl").read_text().splitlines()) == 2
    raw["seppo"]["data"]["max_skipped"] = 0.2
    assert forks.run(raw).status == 0, "the folder of a run that never began need not be resumed"
    assert {"key", "reason"} == json.loads((tmp_path / "run" / "skipped.jsonl").read_text().splitlines()[0]).keys()


@pytest.mark.parametrize(("file", "damage"), [
    ("unet/diffusion_pytorch_model.safetensors", "remove"), ("unet/diffusion_pytorch_model.safetensors", "cut"),
    ("vae/config.json", "remove"), ("text_encoder", "remove"), ("model_index.json", "remove"), ("model_index.json", "cut"),
])
def test_a_half_downloaded_model(file: str, damage: str, settings: Callable[..., dict[str, Any]], forks: Forks, sd: Path,
                                 tmp_path: Path) -> None:
    path = Path(shutil.copytree(sd, tmp_path / "model")) / file
    if damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    else:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    words(forks.run(settings(**{"seppo.model.path": str(tmp_path / "model")})), str(tmp_path / "model"), path.name)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_output_folder_that_cannot_be_written(settings: Callable[..., dict[str, Any]], forks: Forks, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    words(forks.run(settings(**{"seppo.output_dir": str(tmp_path / "file" / "run")})), "seppo.output_dir", "cannot be written")


def test_a_second_run_is_refused_by_the_name_of_the_first(settings: Callable[..., dict[str, Any]], forks: Forks,
                                                           tmp_path: Path) -> None:
    from seppo_fast.lock import locked
    from seppo_fast.training.folder import LOCK

    folder = tmp_path / "run"
    folder.mkdir()
    with locked(folder / LOCK):
        for arguments in ((), ("--resume", "auto")):
            result = forks.run(settings(), *arguments, ranks=2)
            assert result.status == 2 and result.statuses[1] != 0, result.output
            words(result, f"{folder} (seppo.output_dir) is in use by another run: process {os.getpid()} on ",
                  "Wait for its end, stop it, or choose another seppo.output_dir")
        assert [file.name for file in folder.iterdir()] == [LOCK]


def test_a_run_that_cannot_begin_leaves_no_folder(settings: Callable[..., dict[str, Any]], forks: Forks, tmp_path: Path) -> None:
    result = forks.run(settings(**{"seppo.model.path": "/nowhere", "seppo.output_dir": str(tmp_path / "new" / "run")}))
    assert result.status == 2 and not (tmp_path / "new").exists()


def test_sigterm_before_the_ranks_have_joined(settings: Callable[..., dict[str, Any]], forks: Forks, tmp_path: Path) -> None:
    result = forks.run(settings(), strike=Strike("seppo_fast.ranks:meet", 1, signal.SIGTERM))
    assert result.status == 143, result.output
    assert result.output.splitlines()[-1] == "stopped by SIGTERM before training began; what is cached is kept"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["seppo_fast.data.cache:encoded", "seppo_fast.reference.sampler:Sampler.draw",
                                   "seppo_fast.training.objective:Objective.__call__",
                                   "seppo_fast.training.engine_state:write_flat"])
def test_one_rank_killed_ends_the_other_with_a_word(place: str, settings: Callable[..., dict[str, Any]], forks: Forks,
                                                    tmp_path: Path) -> None:
    anew = {}
    if place.startswith("seppo_fast.data"):
        data = make_demonstrations(tmp_path / "data", 300)  # two parts, so that both ranks encode
        anew = {"seppo.data.source": str(data), "seppo.data.cache_dir": str(tmp_path / "cache")}
    result = forks.run(settings(**anew), ranks=2, strike=Strike(place, 1, rank=1, alone=True), timeout=60)
    assert result.statuses == [1, -signal.SIGKILL], result.output[-3000:]
    words(result, "rank 0 lost another rank, which was killed (out of memory?)", "--resume auto", status=1)


def test_the_launcher_prints_the_first_cause_once_and_does_not_hang(settings: Callable[..., dict[str, Any]], launch: Any,
                                                                    tmp_path: Path) -> None:
    """Rank 1 alone meets what is wrong: the second half of the images, which it encodes, are torn. By the module's name."""
    data = make_demonstrations(tmp_path / "data", 1024)
    for number in range(256, 512):
        (data / f"{number}.png").write_bytes(b"torn")
    raw = settings(**{"seppo.data.source": str(data), "seppo.data.cache_dir": str(tmp_path / "cache")})
    result = launch(raw, ranks=2, program=("--module", "seppo_fast.train"))
    output = result.stdout + result.stderr
    assert result.returncode == 2, output[-3000:]
    assert "seppo_fast 0.1.0: the plan" in result.stdout
    assert output.count("seppo_fast: ") == 1 and "cannot be used" in output and "Traceback" not in output
    assert "rows so far cannot be used, so the rest was not read" in output


def test_an_error_of_ours_is_shown_with_its_traceback_once(settings: Callable[..., dict[str, Any]], forks: Forks,
                                                           tmp_path: Path) -> None:
    """What nobody foresaw, here a file where the folder of sample grids should be."""
    raw = settings(**{"seppo.samples.every": 1})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples").write_text("mine")
    result = forks.run(raw, ranks=2)
    assert 0 not in result.statuses and result.output.count("seppo_fast: ") == 1, result.output[-3000:]
    assert result.output.count("Traceback") == 1 and (tmp_path / "run" / "samples").read_text() == "mine"


def test_help_names_every_argument(forks: Forks) -> None:
    import subprocess

    result = subprocess.run([sys.executable, "seppo_fast/train.py", "--help"], cwd=ROOT, text=True, capture_output=True)
    assert result.returncode == 0
    for argument in ("--config", "--set", "--resume auto|PATH", "--dry-run", "--rates FILE", "--gpus N"):
        assert argument in result.stdout
