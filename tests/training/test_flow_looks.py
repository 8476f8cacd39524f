"""Evaluation while a flow is trained: scores, samples and held-out errors are those of the commands and of plain diffusers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from outcomes import rows
from tiny import tiny_clip, tiny_sd3
from training.test_validation import PROMPTS, ROUNDING, assert_alike

from seppo_fast.data.latents import LatentCache
from seppo_fast.data.order import Order, split
from seppo_fast.evaluate import parse_arguments
from seppo_fast.evaluation.arguments import request_of
from seppo_fast.evaluation.run import evaluate
from seppo_fast.seeds import generator, normal
from seppo_fast.training.held_out import DRAWS

FACTOR, SHIFT = 1.5305, 0.0609  # of the tiny VAE
LORA = {"seppo.model.lora": {"rank": 2, "targets": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2"]},
        "optimizer.params.lr": 3e-2}


def test_the_looks_at_a_run_of_stable_diffusion_3(settings: Any, train: Any, ranks: Any, monkeypatch: pytest.MonkeyPatch,
                                                  tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base, clip, cache = tiny_sd3(tmp_path / "base"), tiny_clip(tmp_path / "clip"), tmp_path / "cache"
    weights = {"pickscore": str(clip), "pickscore.tokenizer": str(clip)}
    run = train(settings(**LORA, **{
        "seppo.model.path": str(base), "seppo.sampler.solver": "euler", "seppo.iterations": 1, "seppo.samples": {"every": 2},
        "seppo.data.hold_out": 5, "seppo.data.flip": False, "seppo.data.posterior": "mean", "seppo.data.cache_dir": str(cache),
        "seppo.evaluation": {"prompts": PROMPTS, "weights": weights, "scores": ["pickscore"], "every": 2}}))
    looks = {row["update"]: row for row in rows(run) if "loss" not in row}
    assert list(looks) == [0, 2] and len(list((run / "samples").glob("*.png"))) >= 1

    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    arguments = ["--models", f"base={base}", f"tuned={run / 'final'}", "--prompts", str(tmp_path / "prompts.txt"), "--out",
                 str(tmp_path / "out"), "--steps", "3", "--guidance-scale", "2", "--resolution", "16", "--scores", "pickscore",
                 "--weights", *(f"{name}={path}" for name, path in weights.items())]
    result = evaluate(request_of(parse_arguments(arguments), ranks, print), ranks, lambda line: None)
    by_command = [row["mean"] for row in result["table"]]
    assert [looks[update]["eval_pickscore"] for update in (0, 2)] == pytest.approx(by_command, rel=ROUNDING)
    assert_alike(run / "evaluation" / "samples" / "update_00000002", tmp_path / "out" / "samples" / "tuned", 3)
    assert looks[2]["heldout_winner_gain"] == pytest.approx(gain_by_diffusers(base, run / "final", cache), abs=2e-6)
    assert abs(looks[2]["heldout_winner_gain"]) > 1e-4
    card = (run / "final" / "README.md").read_text()
    assert "tags: [text-to-image, stable-diffusion-3, seppo, preference-optimization, lora]" in card
    assert f"pipeline = DiffusionPipeline.from_pretrained({str(base)!r})\npipeline.load_lora_weights(FOLDER)" in card


@torch.no_grad()
def gain_by_diffusers(base: Path, lora: Path, cache_dir: Path) -> float:
    """How much smaller the velocity's error on the held-out pictures is with the LoRA."""
    (folder,) = cache_dir.iterdir()
    cache, seed = LatentCache(folder), generator(0, "held out").initial_seed()
    order = Order(24, seed, split(24, 5, 0)[1])
    errors = []
    for tuned in (False, True):
        pipeline = StableDiffusion3Pipeline.from_pretrained(base)
        if tuned:
            pipeline.load_lora_weights(lora)
        transformer = pipeline.transformer.eval()
        total = 0.0
        for slot in range(DRAWS * 5):
            row, noise = cache.rows([order.row(slot)]), normal(cache.shape, seed, "noise", [slot])
            given, latents = cache.embeddings(row.prompts), (row.mean - SHIFT) * FACTOR
            sigma = torch.sigmoid(torch.randn((), generator=generator(seed, "timestep", slot)))
            sigma = 3 * sigma / (1 + 2 * sigma)
            answer = transformer((1 - sigma) * latents + sigma * noise, timestep=1000 * sigma[None],
                                 encoder_hidden_states=given["prompt_embeds"], pooled_projections=given["pooled"]).sample
            total += (answer - (noise - latents)).square().mean().item()
        errors.append(total / (DRAWS * 5))
    return errors[0] - errors[1]
