"""The quickstart with a flow: its base, hardly trained, through plain diffusers and through the trainer; its configuration."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import save_file

from seppo_fast.configfile import batch_plan, load_config
from seppo_fast.models import open_model
from seppo_fast.quickstart.__main__ import OUT, main
from seppo_fast.quickstart.base import encode_all
from seppo_fast.quickstart.demonstrations import write_demonstrations
from seppo_fast.quickstart.digits import CAPTIONS, Digits, sloppy_crawl, split_digits
from seppo_fast.quickstart.flow import RECIPE, TOKENS, make_base, train_transformer
from seppo_fast.quickstart.judge import draw
from seppo_fast.quickstart.models import KINDS
from seppo_fast.quickstart.report import read_metrics
from seppo_fast.quickstart.steps import overrides

FEW = replace(RECIPE, vae_steps=3, text_steps=3, denoiser_steps=3, batch_size=8, copies=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart") / "base"
    assert make_base(folder, FEW) and not make_base(folder, FEW)
    return folder


@pytest.fixture(scope="module")
def pipeline(base: Path) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline.from_pretrained(base)


def test_is_a_complete_pipeline_that_diffusers_runs(base: Path, pipeline: StableDiffusion3Pipeline) -> None:
    assert all(part is not None for name, part in pipeline.components.items() if name not in ("image_encoder", "feature_extractor"))
    assert 1.2e6 < sum(weight.numel() for weight in pipeline.transformer.parameters()) < 1.4e6
    together = draw(base, [7, 3, 7], seed=0, steps=2, guidance_scale=2.0)
    assert together.shape == (3, 3, 16, 16) and together.isfinite().all() and 0 <= together.min() and together.max() <= 1
    torch.testing.assert_close(draw(base, [7, 3, 7], 0, 2, 2.0, batch_size=1), together, atol=1e-4, rtol=0)


def test_past_policies_weights_go_to_the_transformer(base: Path, pipeline: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    """A policy's file has parameters alone, and not the table of positions."""
    before, file = draw(base, [1, 2], 0, 2, 2.0), tmp_path / "policy.safetensors"
    for scale in (1.0, 1.1):
        save_file({name: scale * weight.detach() for name, weight in pipeline.transformer.named_parameters()}, file)
        assert torch.allclose(draw(base, [1, 2], 0, 2, 2.0, weights=file), before, atol=1e-3) == (scale == 1)


def test_latents_have_mean_0_and_deviation_1(base: Path) -> None:
    model = open_model(str(base))
    crawl = sloppy_crawl(split_digits(FEW.seed)[0], FEW.seed, 1, FEW.wrong_captions, FEW.degraded)
    scaled = model.latent_scale.scaled(encode_all(model.load_vae("cpu"), crawl))
    assert scaled.mean().item() == pytest.approx(0, abs=0.01) and scaled.std().item() == pytest.approx(1, abs=0.01)


def test_the_trainer_opens_it_and_gives_each_text_encoder_as_many_tokens_as_the_base_has_learnt_with(
        base: Path, pipeline: StableDiffusion3Pipeline) -> None:
    model = open_model(str(base))
    found = model.load_text("cpu")([*CAPTIONS, ""])
    assert model.name == "sd3" and {name: tuple(value.shape[1:]) for name, value in found.items()} == model.condition_shapes
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt([*CAPTIONS, ""], None, None, do_classifier_free_guidance=False,
                                                      max_sequence_length=TOKENS)
    torch.testing.assert_close(found, {"prompt_embeds": embeds, "pooled": pooled})
    assert len(found["pooled"].unique(dim=0)) == len(embeds[:, TOKENS:].unique(dim=0)) == 11  # CLIP and T5 tell all apart


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2", "tokenizer_3"])
def test_captions_are_words_and_fit(pipeline: StableDiffusion3Pipeline, part: str) -> None:
    tokenizer = getattr(pipeline, part)
    for caption in CAPTIONS:
        ids = tokenizer(caption).input_ids
        assert len(ids) <= tokenizer.model_max_length == TOKENS and tokenizer.unk_token_id not in ids[:-1]
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == caption


def test_the_base_learns_the_velocity_from_noise_to_sample(pipeline: StableDiffusion3Pipeline) -> None:
    """Of a point at 0 the best answer is the noise, of which the noisy latents are sigma times: exactly known."""
    learner, random = deepcopy(pipeline.transformer), torch.Generator().manual_seed(0)
    embeds, pooled = torch.zeros(11, 4, 64), torch.zeros(11, 64)
    train_transformer(learner, embeds, pooled, torch.zeros(8, 4, 8, 8), torch.arange(8),
                      replace(FEW, denoiser_steps=25, denoiser_lr=5e-3))
    noise = torch.randn(8, 4, 8, 8, generator=random)
    with torch.no_grad():
        found = learner(0.8 * noise, timestep=torch.full((8,), 800.0), encoder_hidden_states=embeds[:8],
                        pooled_projections=pooled[:8], return_dict=False)[0]
    assert torch.nn.functional.cosine_similarity(found.flatten(), noise.flatten(), dim=0) > 0.5


def test_four_updates_by_the_shipped_configuration(base: Path, train: Any, tmp_path: Path) -> None:
    digits, _ = split_digits(0)
    write_demonstrations(tmp_path / "demonstrations", Digits(digits.pixels[:8], digits.labels[:8]))
    config = load_config("quickstart_flow.json", [
        *overrides(tmp_path, seed=0), f"seppo.model.path={base}", "train_batch_size=4", "train_micro_batch_size_per_gpu=4",
        "scheduler.params.total_num_steps=4", "scheduler.params.warmup_num_steps=1", "seppo.iterations=1",
        "seppo.updates_per_iteration=4", "seppo.sampler.steps=2"])
    run = train(config.deepspeed | {"seppo": config.as_dict()["seppo"]})
    after = draw(run / "final", [4], 0, 2, 2.0)
    torch.testing.assert_close(after, draw(base, [4], 0, 2, 2.0, weights=run / "pool" / "policy_00001.safetensors"))
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["update"] for row in rows] == [1, 2, 3, 4] and rows[-1]["abs_logit_p50"] > 0
    assert rows[0]["beta"] == 2000 and rows[-1]["beta"] != 2000  # "auto": 2000 until policy and reference differ


def test_the_shipped_configuration_is_the_quickstarts_but_for_solver_and_beta(tmp_path: Path) -> None:
    flow, unet = (load_config(KINDS[model].config, overrides(tmp_path, seed=3)) for model in ("flow", "unet"))
    assert batch_plan(flow.deepspeed, 1).size == 64
    assert flow.deepspeed["scheduler"]["params"]["total_num_steps"] == flow.seppo.updates
    differing = {key for key, value in flow.as_dict()["seppo"].items() if unet.as_dict()["seppo"][key] != value}
    assert differing <= {"sampler", "beta"} and flow.seppo.sampler.solver == "euler"


def test_the_models_of_the_command_are_those_that_can_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert OUT.keys() == KINDS.keys() and len({*OUT.values()}) == len(OUT)
    (tmp_path / "file").write_text("")
    assert main(["--model", "flow", "--out", str(tmp_path / "file" / "out")]) == 2
    with pytest.raises(SystemExit) as end:
        main(["--model", "gan"])
    assert end.value.code == 2 and "'unet', 'flow'" in capsys.readouterr().err.replace("unet, flow", "'unet', 'flow'")
