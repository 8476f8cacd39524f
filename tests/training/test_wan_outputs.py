"""What a run of Wan leaves behind, for plain diffusers, beside grids, scores, and the command that evaluates; what is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from outcomes import rows
from PIL import Image
from tiny_wan import WAN_FRAMES, WAN_PIXELS, tiny_wan
from torch import Tensor

from seppo_fast.configfile import parse_config
from seppo_fast.errors import UserError
from seppo_fast.evaluate import parse_arguments
from seppo_fast.evaluation.arguments import request_of
from seppo_fast.evaluation.files import read_video
from seppo_fast.evaluation.generate import initial_noise
from seppo_fast.evaluation.run import evaluate
from seppo_fast.planning.dry_run import dry_run

LORA = {"seppo.model.lora": {"rank": 2, "alpha": 4.0}, "optimizer.params.lr": 3e-2}
TOKENS = dict(expand_timesteps=True, vae=dict(channels=6, patch_size=2, in_channels=12, out_channels=12, is_residual=True,
                                              decoder_base_dim=12, scale_factor_spatial=8))  # as TI2V-5B of Wan 2.2


def asked(out: Path, prompts: Path, *more: object) -> Any:
    return parse_arguments(["--prompts", str(prompts), "--out", str(out), "--steps", "3", "--guidance-scale", "2", "--solver",
                            "unipc", "--resolution", str(WAN_PIXELS), "--scores", "psnr", *map(str, more)])


@pytest.mark.parametrize("kind", ["2.1", "2.2"])
def test_everyone_draws_the_same_clip(kind: str, of_wan: Any, wan: Path, wan_clips: Path, train: Any, ranks: Any, tmp_path: Path,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation while it trains, the command, and the code on the model's card."""
    base = wan if kind == "2.1" else tiny_wan(tmp_path / "base", num_layers=1, **TOKENS)
    run = train(of_wan(**LORA, **{
        "seppo.model.path": str(base), "seppo.iterations": 1, "seppo.samples": {"every": 2, "prompts": ["a dog"]},
        "seppo.evaluation": {"every": 2, "prompts": str(wan_clips), "limit": 1, "scores": ["psnr"],
                             "real": str(wan_clips.parent)}}))
    with Image.open(run / "samples" / "update_00000002.webp") as sheet:
        assert sheet.n_frames == WAN_FRAMES
    arguments = asked(tmp_path / "out", wan_clips, "--models", f"base={base}", f"tuned={run / 'final'}", "--frames", WAN_FRAMES,
                      "--limit", 1, "--real", wan_clips.parent)
    result = evaluate(request_of(arguments, ranks, print), ranks, print)
    means = [row["mean"] for row in result["table"]]
    measured = [row["eval_psnr"] for row in rows(run) if "loss" not in row]
    assert measured == pytest.approx(means, rel=1e-4) and means[0] != means[1]

    exported: list[Any] = []
    monkeypatch.setattr("diffusers.utils.export_to_video", lambda *given, **named: exported.append((*given, named)))
    usage = (run / "final" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    found: dict[str, Any] = {"PROMPT": "a red cat"}
    exec(usage.replace("FOLDER", repr(str(run / "final"))), found)
    (frames, _, named), = exported
    assert len(frames) == WAN_FRAMES and named == {"fps": 16 if kind == "2.1" else 24}
    pipeline: DiffusionPipeline = found["pipeline"]
    (file,) = (tmp_path / "out" / "samples" / "tuned").glob("*.webp")
    shape = (pipeline.vae.config.z_dim, 2, *[WAN_PIXELS // pipeline.vae.config.scale_factor_spatial] * 2)
    theirs: Tensor = torch.from_numpy(pipeline(
        "a red cat", latents=initial_noise(shape, 0, "a red cat", 0)[None], num_frames=WAN_FRAMES, height=WAN_PIXELS,
        width=WAN_PIXELS, num_inference_steps=3, guidance_scale=2.0, max_sequence_length=32).frames[0]).permute(0, 3, 1, 2)
    assert (theirs - read_video(file, WAN_FRAMES)).abs().max() < 0.6 / 255  # rounded once


def test_the_frames_of_an_evaluation(wan: Path, wan_clips: Path, ranks: Any, tmp_path: Path) -> None:
    given = ("--models", f"base={wan}")
    assert request_of(asked(tmp_path, wan_clips, *given), ranks, print).drawing.frames == 17
    with pytest.raises(UserError, match=r"--models base=.*: --frames: 16, but .* videos of 4k \+ 1 frames: set it to 13 or 17"):
        request_of(asked(tmp_path, wan_clips, *given, "--frames", 16), ranks, print)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"seppo.data.video": {"choice": "uniform"}}, r"seppo.data.video.frames: 16, but .* set it to 13 or 17"),
    ({"seppo.data.resolution": 40}, "seppo.data.resolution=40 is no multiple of 16"),
    ({"seppo.model.motion_adapter": "/nowhere"}, "is a WanPipeline; motion adapters go with Stable Diffusion 1.x"),
    ({"seppo.model.lora": {"layers": "temporal"}}, "'temporal' is for video models, and this is an image model, or one without"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_refused_in_a_dry_run_and_in_a_run(changes: dict[str, Any], message: str, of_wan: Any, train: Any) -> None:
    raw = of_wan(**changes)
    for run in (lambda: dry_run(parse_config(raw), 1), lambda: train(raw)):
        with pytest.raises(UserError, match=message):
            run()


def test_the_plan_says_what_is_trained(of_wan: Any) -> None:
    assert re.search(r"model .*, all weights\n", dry_run(parse_config(of_wan()), 1))


def test_another_wan_as_the_reference(of_wan: Any, train: Any, tmp_path: Path) -> None:
    """With a VAE of its own, which makes other latents."""
    other = tiny_wan(tmp_path / "other", seed=5, num_layers=1)
    with pytest.raises(UserError, match="seppo.reference_model.path: .*its VAE makes other latents"):
        train(of_wan(**{"seppo.method": "ditto", "seppo.reference_model.path": str(other)}))
