"""Improvement models in an evaluation: what diffusers' pipelines make of the same sample, resumed, damaged, refused."""

import json
import re
import shlex
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionXLInstructPix2PixPipeline
from PIL import Image
from safetensors.torch import save_file
from tiny import NARROW, tiny_pix2pix, tiny_sd, tiny_sdxl

from seppo_fast import evaluation
from seppo_fast.errors import UserError
from seppo_fast.evaluate import parse_arguments
from seppo_fast.evaluation.arguments import request_of
from seppo_fast.evaluation.candidates import open_candidates
from seppo_fast.evaluation.files import keep
from seppo_fast.evaluation.generate import initial_noise
from seppo_fast.models.common import load_unet
from seppo_fast.models.families import open_directory
from seppo_fast.reference.solver import open_scheduler

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-to-image model, two that improve, prompts."""
    root = tmp_path_factory.mktemp("improvement")
    tiny_sd(root / "base", **NARROW)
    for seed, name in enumerate(("better", "best"), 1):
        tiny_pix2pix(root / name, seed=seed, **NARROW)
    tiny_pix2pix(root / "small", sample_size=4, **NARROW)
    (root / "prompts.txt").write_text("a red cat\nthe sky\n")
    return root


@pytest.fixture
def run(folders: Path, evaluated: Any) -> Any:
    """`run(out, *models, more=())`: the result; a model is NAME, or NAME=PATH with {root} for the folder of the models."""

    def call(out: Path, *models: str, more: tuple[str, ...] = ()) -> dict[str, Any]:
        paths = (model.format(root=folders) if "=" in model else f"{model}={folders / model}" for model in models)
        return evaluated(["--models", *paths, "--prompts", str(folders / "prompts.txt"), "--out", str(out), "--steps", "2",
                          "--batch-size", "2", "--scores", "pickscore", *more])

    return call


BETTER = "better={root}/better@base"


def files(out: Path, model: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "samples" / model).glob("*.png"))}


def problems(result: dict[str, Any], model: str) -> list[str]:
    return [sample["problem"] for sample in result["samples"] if sample["model"] == model and sample["problem"]]


@pytest.mark.parametrize(("text", "pix2pix", "pipeline"), [
    (tiny_sd, "sd", StableDiffusionInstructPix2PixPipeline), (tiny_sdxl, "sdxl", StableDiffusionXLInstructPix2PixPipeline)])
def test_an_improved_sample_is_what_diffusers_makes_of_the_file(
        text: Any, pix2pix: str, pipeline: Any, evaluated: Any, tmp_path: Path) -> None:
    base, better, out = text(tmp_path / "base"), tiny_pix2pix(tmp_path / "better", pix2pix, seed=1), tmp_path / "out"
    (tmp_path / "prompts.txt").write_text("a red cat\n")
    result = evaluated(["--models", f"base={base}", f"better={better}@base", "--prompts", str(tmp_path / "prompts.txt"),
                        "--out", str(out), "--steps", "4", "--scores", "pickscore"])
    theirs = pipeline.from_pretrained(better)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = open_scheduler(dict(theirs.scheduler.config), "ddim")
    (drawn,), (improved,) = ((out / "samples" / name).glob("*.png") for name in ("base", "better"))
    size = {"height": 16, "width": 16} if pix2pix == "sdxl" else {}

    def improvement(image: Image.Image) -> np.ndarray:
        noise = initial_noise((4, 8, 8), 0, "a red cat", 0, turns=1)[None]
        made = theirs("a red cat", image=image, num_inference_steps=4, guidance_scale=3.5, image_guidance_scale=3.0, latents=noise,
                      output_type="np", **size).images[0]
        return 255 * made

    ours = np.array(Image.open(improved)).astype(float)
    assert np.abs(improvement(Image.open(drawn)) - ours).max() < 0.6  # of a grey level: rounded once
    assert np.abs(improvement(Image.new("RGB", (16, 16))) - ours).max() > 2
    assert result["about"]["settings"]["image_guidance_scale"] == 3.0
    assert [model["improves"] for model in result["models"]] == [None, "base"]


def test_only_improvements_of_the_present_samples_are_found_again(run: Any, tmp_path: Path) -> None:
    run(tmp_path, "base", BETTER)
    first, second = sorted((tmp_path / "samples" / "base").glob("*.png"))
    before, written = files(tmp_path, "better"), {file.name: file.stat().st_mtime_ns for file in tmp_path.rglob("better/*.png")}
    run(tmp_path, "base", BETTER)
    assert {file.name: file.stat().st_mtime_ns for file in tmp_path.rglob("better/*.png")} == written
    original = first.read_bytes()
    Image.new("RGB", (16, 16), "red").save(first)
    run(tmp_path, "base", BETTER)
    after = files(tmp_path, "better")
    assert after[first.name] != before[first.name] and after[second.name] == before[second.name]
    first.unlink()  # drawn again, and improved again
    run(tmp_path, "base", BETTER)
    assert first.read_bytes() == original and files(tmp_path, "better") == before


def test_a_missing_damaged_or_cropped_sample_costs_only_its_improvement(run: Any, tmp_path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, "base")
    first, second = sorted((tmp_path / "samples" / "base").glob("*.png"))
    first.write_bytes(first.read_bytes()[:60])
    Image.new("RGB", (16, 24)).save(second)
    result = run(tmp_path, "base", BETTER)
    damaged, cropped = sorted(problems(result, "better"), key=lambda text: second.name in text)
    assert f"{first} cannot be read" in damaged and "remove it" in damaged
    assert f"{second} has 16x24 pixels, and was to have 16x16" in cropped
    assert not files(tmp_path, "better")
    for file in (first, second):
        file.unlink()
    monkeypatch.setattr("seppo_fast.evaluation.generate.keep", lambda pixels, path, rate, source=None: (
        None if path == second else keep(pixels, path, rate, source)))  # as if the model's sample were not finite
    result = run(tmp_path, "base", BETTER)
    assert problems(result, "better") == [f"there is no samples/base/{second.name} that it could improve"]
    assert list(files(tmp_path, "better")) == [first.name]


def test_a_model_that_gives_nan_has_no_improvement(run: Any, folders: Path, tmp_path: Path) -> None:
    unet = load_unet(open_directory(folders / "base"), torch.float32)
    broken = tiny_sd(tmp_path / "broken")
    with torch.no_grad():
        unet.conv_out.weight.mul_(1e38)
    unet.save_pretrained(broken / "unet")
    result = run(tmp_path / "out", f"broken={broken}", "better={root}/better@broken")
    assert problems(result, "broken") == ["the model's sample is not finite (NaN or Inf)"] * 2
    assert ["that it could improve" in problem for problem in problems(result, "better")] == [True, True]
    page = (tmp_path / "out" / "index.html").read_text()
    assert "that it could improve" in page


def test_an_improvement_can_be_improved(run: Any, tmp_path: Path) -> None:
    run(tmp_path, "base", "once={root}/better@base", "same={root}/better@base", "twice={root}/better@once", "best={root}/best@base",
        more=("--batch-size", "1"))
    base, once, same, twice, best = (files(tmp_path, name) for name in ("base", "once", "same", "twice", "best"))
    assert once == {name: same[name] for name in base}  # the same noise
    assert len({*base.values(), *once.values(), *twice.values(), *best.values()}) == 8


def test_a_folder_of_other_improvements_is_refused(run: Any, tmp_path: Path) -> None:
    run(tmp_path, "base")
    run(tmp_path, "base", BETTER)  # the scales had no use before
    with pytest.raises(UserError, match="holds samples with image_guidance_scale 3.0, and now it is 1.5"):
        run(tmp_path, "base", BETTER, more=("--image-guidance-scale", "1.5"))
    run(tmp_path, "base")
    assert json.loads((tmp_path / "evaluation.json").read_text())["drawing"]["improvement_guidance_scale"] == 3.5
    for other in ("better={root}/best@base", "better={root}/better@other"):
        with pytest.raises(UserError, match="samples of another model called 'better'"):
            run(tmp_path, "base", "other={root}/best@base", other)


@pytest.mark.parametrize(("models", "more", "message"), [
    (("base", "better={root}/better@bas"), (), "the samples of 'bas', and there is no model of that name before it .*: base"),
    (("better={root}/better@base", "base"), (), "no model of that name before it .*: none"),
    (("base", "better={root}/base@base"), (), "is a StableDiffusionPipeline, which is given no image that it could improve"),
    (("base", "better"), (), "StableDiffusionInstructPix2PixPipeline: .* NAME=PATH@OTHER, where OTHER is the name"),
    (("better",), (), "NAME=PATH@OTHER"),
    (("base", "better={root}/best@{root}/better@base"), (), "once=.*/better@base twice=.*/best@once"),
    (("base", "once={root}/better@base", "twice={root}/best@once@base"), (), "there can be one @NAME"),
    (("base", "better={root}/better@"), (), "better@' does not exist"),
    (("base", "better=@base"), (), "'@base' does not exist"),
    (("base", "small={root}/small@base"), (), "images of 8 pixels along a side, and base draws 16: give a --resolution"),
    (("base",), ("--image-guidance-scale", "2"), "--image-guidance-scale 2.0: no model improves another's samples"),
    (("base",), ("--improvement-guidance-scale", "2"), "--improvement-guidance-scale 2.0: no model"),
])
def test_what_cannot_be_improved_is_named_before_anything_is_drawn(
        run: Any, tmp_path: Path, models: tuple[str, ...], more: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(tmp_path / "out", *models, more=more)
    assert not (tmp_path / "out").exists()


def test_a_resolution_fits_models_of_other_sizes(run: Any, tmp_path: Path) -> None:
    result = run(tmp_path, "base", "small={root}/small@base", more=("--resolution", "24"))
    assert not problems(result, "small") and len(files(tmp_path, "small")) == 2
    assert {Image.open(file).size for file in tmp_path.rglob("*.png")} == {(24, 24)}


def test_clips_are_not_improved(videos: Path, folders: Path) -> None:
    with pytest.raises(UserError, match="base makes videos, and an improvement model is one of images"):
        open_candidates([f"base={videos / 'base'}", f"better={folders / 'better'}@base"], None, str(videos / "adapter"), 8)


def test_a_lora_goes_on_an_improvement_model_that_is_named_with_it(folders: Path, tmp_path: Path) -> None:
    base, lora = f"base={folders / 'base'}", tmp_path / "lora.safetensors"
    layer = "unet.up_blocks.0.resnets.0.time_emb_proj"
    save_file({f"{layer}.lora_A.weight": torch.ones(1, 32), f"{layer}.lora_B.weight": torch.ones(8, 1)}, lora)
    _, better = open_candidates([base, f"better={folders / 'better'}+{lora}@base"], None, None, 16)
    assert better.lora == lora and better.source is not None and better.local
    with pytest.raises(UserError, match=f"improve: say better=PIPELINE.{lora}@base"):
        open_candidates([base, f"better={lora}@base"], None, None, 16)


def test_a_folder_with_an_at_is_a_folder(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "sd@base").symlink_to(folders / "base")
    (tmp_path / "a@b").symlink_to(folders / "better")
    found = open_candidates([f"base={folders / 'base'}", f"other={tmp_path / 'sd@base'}", f"better={tmp_path / 'a@b'}@base"],
                            None, None, 16)
    assert [(each.source and each.source.name, each.local) for each in found] == [(None, True), (None, True), ("base", True)]


@pytest.mark.parametrize("flag", ["--image-guidance-scale", "--improvement-guidance-scale", "--guidance-scale"])
@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
def test_scales_that_are_none_are_refused(flag: str, value: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(["--models", "a=b", "--prompts", "c", "--out", "d", f"{flag}={value}"])
    assert f"{flag} {float(value)}: a number of at least 0 is needed" in capsys.readouterr().err


def test_the_papers_tables_are_commands_that_work(folders: Path, ranks: Any, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    block = re.search(r"```bash\n(SD15=.*?)```", (Path(evaluation.__file__).parent / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    for name in ("dpo", "spin", "iterative_dpo", "n2560", "n12800", "n38400", "improvement"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "final").symlink_to(folders / ("better" if name == "improvement" else "base"))
    (tmp_path / "pickapic").mkdir()
    for name, words in (("train", "a red cat"), ("test", "the sky")):
        pq.write_table(pa.table({"caption": [f"{words} {i // 2}" for i in range(1200)]}), tmp_path / "pickapic" / f"{name}.parquet")
    first, samples, *rest = block.replace("\\\n", "").splitlines()
    values = {"$SD15": str(folders / "base"), "$SAMPLES": samples.partition("=")[2].strip('"')}
    assert first.startswith("SD15=")
    commands = [shlex.split(reduce(lambda text, name: text.replace(name, values[name]), values, line))
                for line in rest if line.startswith("python -m seppo_fast.evaluate ")]
    asked = [request_of(parse_arguments(command[3:]), ranks, print) for command in commands]
    assert [len(request.candidates) for request in asked] == [4, 4, 4, 4]
    assert all(len(request.prompts) == 1000 and request.drawing.per_prompt == 64 for request in asked)
    assert asked[0].scores == ["pickscore", "hpsv2", "aesthetic", "vendi_prompt"]
    assert [candidate.turns for candidate in asked[2].candidates] == [0, 0, 1, 0]
