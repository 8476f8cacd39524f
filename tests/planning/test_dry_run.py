"""What a dry run says beside the plan: what is still missing, sizes of pictures, times of this machine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from seppo_fast.configfile import load_config, parse_config
from seppo_fast.data.sizes import enlarged, is_blurred, size_of
from seppo_fast.errors import UserError
from seppo_fast.machine import machine
from seppo_fast.models.families import FAMILIES
from seppo_fast.models.published import PUBLISHED, supported
from seppo_fast.planning.dry_run import dry_run
from seppo_fast.planning.this_machine import SIDE, own_rate
from seppo_fast.planning.time_plan import Rate, duration, load_rates

Settings = Callable[..., dict[str, Any]]


def pictures(folder: Path, **sizes: tuple[int, int]) -> Path:
    """A folder of pictures with their captions beside them."""
    folder.mkdir()
    for name, size in sizes.items():
        Image.new("RGB", size).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("a cat")
    return folder


def test_a_folder_without_results_holds_no_run(settings: Settings, train: Any, tmp_path: Path) -> None:
    """A run that too many unusable rows stopped leaves its folder to the next one."""
    source = pictures(tmp_path / "d", a=(16, 16))
    (source / "b.png").write_bytes(b"no picture")
    (source / "b.txt").write_text("a dog")
    raw = settings(**{"seppo.data.source": str(source)})
    with pytest.raises(UserError, match="seppo.data.max_skipped"):
        train(raw)
    run = Path(raw["seppo"]["output_dir"])
    assert (run / "run.json").exists() and "already holds a run" not in dry_run(parse_config(raw), 1)
    (run / "metrics.jsonl").write_text("")
    assert "already holds a run: go on with it by --resume auto" in dry_run(parse_config(raw), 1)


@pytest.mark.parametrize(("path", "words"), [
    ("PixArt-alpha/PixArt-Sigma", "by its name it is a PixArt model, and no StableDiffusion or StableDiffusionXL or"),
    ("Qwen/Qwen-Image-Edit", "a Qwen-Image-Edit model"), ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "a Wan 2.2 A14B model"),
    ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "a Wan image-to-video model"),
    ("someone/something", "what can be trained is a StableDiffusion or StableDiffusionXL or AnimateDiff or StableDiffusion3"),
])
def test_families_that_are_not_known_are_said(path: str, words: str, settings: Settings) -> None:
    said = dry_run(parse_config(settings(**{"seppo.model.path": path})), 1)
    assert f"before you train: seppo.model.path {path}: " in said and words in said


def test_known_models_are_of_no_other_family() -> None:
    assert all("by its name" not in supported(path) for path in PUBLISHED)
    assert all(family.removesuffix("Pipeline") in supported("someone/something") for family in FAMILIES)


def test_pictures_that_are_enlarged_are_counted(settings: Settings, train: Any, tmp_path: Path,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    """In the dry run, and when a run starts: more than twice, by the shorter side."""
    source = pictures(tmp_path / "d", large=(64, 64), just=(8, 40), small=(30, 7), tiny=(5, 5))
    raw = settings(**{"seppo.data.source": str(source), "seppo.iterations": 1, "seppo.updates_per_iteration": 1})
    words = ("2 of 4 enlarged more than 2 times to 16 pixels, the smallest is tiny.png (5x5); leave them out, or lower"
             " seppo.data.resolution")
    assert words in dry_run(parse_config(raw), 1)
    train(raw)
    assert words in capsys.readouterr().out
    assert "enlarged" not in dry_run(parse_config(settings()), 1)


def test_a_method_that_needs_losers_says_that_there_are_none(settings: Settings, tmp_path: Path) -> None:
    source = pictures(tmp_path / "d", a=(16, 16), b=(32, 16))
    raw = settings(**{"seppo.data.source": str(source), "seppo.method": "dpo", "seppo.data.resolution": 32})
    with pytest.raises(UserError, match="method 'dpo' needs pairs of images, but .* has one image a row: put winners with their"):
        dry_run(parse_config(raw), 1)
    (tmp_path / "pairs").mkdir()
    source.rename(tmp_path / "pairs" / "chosen")
    pictures(tmp_path / "pairs" / "rejected", a=(16, 16), b=(8, 8))
    raw["seppo"]["data"]["source"] = str(tmp_path / "pairs")
    said = dry_run(parse_config(raw), 1)
    assert "1 of 4 enlarged more than 2 times to 32 pixels, the smallest is the loser of chosen/b.png (8x8)" in said


def test_sizes_are_read_from_headers(tmp_path: Path) -> None:
    file = pictures(tmp_path / "d", a=(30, 20)) / "a.png"
    content = file.read_bytes()
    (tmp_path / "torn.png").write_bytes(content[:60])
    assert size_of(file) == size_of(content) == size_of(Image.open(file)) == size_of(tmp_path / "torn.png") == (30, 20)
    assert size_of(tmp_path / "missing.png") is size_of(tmp_path) is size_of(b"no picture") is None
    assert is_blurred((255, 900), 512) and not is_blurred((256, 900), 512)
    assert enlarged({"a": (512, 512)}, 512) == enlarged({}, 512) == ""


@pytest.mark.parametrize(("hours", "said"), [
    (1.46e-07, "less than a second"), (0.0, "0 seconds"), (1 / 3600, "1 seconds"), (0.01, "36 seconds"), (0.5, "30 minutes"),
    (3.25, "3.25 hours"), (47, "47 hours"), (60, "2.5 days"),
    (17_000, "708 days"), (350_400, "40 years")])
def test_times_as_people_say_them(hours: float, said: str) -> None:
    assert duration(hours) == said


def test_the_machine_at_hand_has_a_line(settings: Settings) -> None:
    said = dry_run(parse_config(settings()), 1)
    line = next(line for line in said.splitlines() if machine()["cpu"] in line)
    assert line.startswith("  this machine's processor (") and "second" in line
    assert not any("e-0" in line for line in said.splitlines() if "hours" in line or "second" in line)
    assert "matrix products were timed just now" in said


def test_a_rate_that_is_known_is_not_tried_again(tmp_path: Path) -> None:
    rates = load_rates(None)
    (own,) = own_rate(rates, "", torch.float32)
    assert own.matmul_tflops > 0 and own.sampling_fraction is None
    known = Rate(device=machine()["cpu"], matmul_tflops=1.0, source="measured")
    assert own_rate([known, *rates], "", torch.float32) == own_rate(rates, "NVIDIA A100-SXM4-80GB", torch.bfloat16) == []


@pytest.mark.parametrize(("gpu", "dtype", "device", "tried"), [
    ("NVIDIA L40S", torch.float16, "cuda", torch.float16), ("NVIDIA L40S", torch.float32, "cuda", torch.float32),
    ("", torch.float16, "cpu", torch.float32), ("", torch.bfloat16, "cpu", torch.bfloat16)])
def test_what_is_tried_on_which_device(gpu: str, dtype: torch.dtype, device: str, tried: torch.dtype) -> None:
    asked = []
    (rate,) = own_rate(load_rates(None), gpu, dtype, lambda *given: asked.append(given) or 181.44)
    assert asked == [(torch.device(device), tried)] and rate.matmul_tflops == 180
    assert rate.device == gpu or machine()["cpu"] in rate.device
    assert rate.source.startswith(f"its {SIDE[device]}x{SIDE[device]} matrix products were timed just now")


def test_a_gpu_that_has_no_room_is_left_out() -> None:
    def full(device: torch.device, dtype: torch.dtype) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 128.00 MiB.\nGPU 0 has ...")

    with pytest.warns(UserWarning, match="no line for this machine's NVIDIA L40S, .*: OutOfMemoryError: CUDA"):
        assert own_rate(load_rates(None), "NVIDIA L40S", torch.bfloat16, full) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_timed() -> None:
    name = torch.cuda.get_device_name()
    (rate,) = own_rate([], name, torch.bfloat16)
    assert rate.device == name and 1 < rate.matmul_tflops < 100_000, "less means that the clock does not wait for the device"


@pytest.mark.slow
def test_the_shipped_configuration_for_a_folder(tmp_path: Path) -> None:
    source = pictures(tmp_path / "d", **{f"p{number:02}": (512, 512) for number in range(30)})
    config = load_config("lora_folder.json", [f"seppo.data.source={source}", f"seppo.output_dir={tmp_path / 'run'}"])
    said = dry_run(config, 1)
    assert "3 of 30 demonstrations, never trained on; heldout_winner_gain, heldout_implicit_acc every 20 updates" in said
    assert "32 pairs = 4 a rank x 8 accumulated x 1 rank" in said and "LoRA rank 16" in said and "advice" not in said
    assert "ends after 4 without a better heldout_winner_gain; the checkpoint of the best heldout_winner_gain stays" in said
    memory = next(line for line in said.splitlines() if line.strip().startswith("memory a rank")).split("about ")[1]
    assert float(memory.split(" GB")[0]) < 16, "of 25.8 GB, for the driver, workspaces and the allocator need some"
