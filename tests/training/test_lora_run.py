"""What comes out of a run is what plain diffusers loads: pipelines, LoRA files, for SD and SDXL."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from outcomes import apart, column, identical, rows, unet_of, weights
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import tiny_sd, tiny_sdxl

from seppo_fast.config import Lora
from seppo_fast.models import open_model
from seppo_fast.models.lora import add_lora, trainable_weights
from seppo_fast.training.trainer import Trainer

Trained = Callable[..., Path]
LORA = {"rank": 2, "alpha": 6.0, "targets": ["to_q", "to_v", "conv1"]}


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sdxl(tmp_path_factory.mktemp("models") / "sdxl")


def draw(pipeline: DiffusionPipeline) -> np.ndarray:
    """A picture (16, 16, 3) in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline("a handwritten two", num_inference_steps=3, guidance_scale=2.0, height=16, width=16, output_type="np",
                    generator=torch.Generator().manual_seed(0)).images[0]


def predict(unet: torch.nn.Module, width: int = 32) -> torch.Tensor:
    """The network's output for fixed random inputs."""
    random = torch.Generator().manual_seed(1)
    latents, embeds = torch.randn(2, 4, 8, 8, generator=random), torch.randn(2, 77, width, generator=random)
    added = {"text_embeds": torch.randn(2, 40, generator=random), "time_ids": torch.tensor([[16, 16, 0, 0, 16, 16]] * 2)}
    with torch.no_grad():
        return unet.eval()(latents, torch.tensor([7, 900]), embeds, added_cond_kwargs=added if width == 80 else None).sample


def trained_policy(run: Path, source: Path, lora: dict[str, Any]) -> UNet2DConditionModel:
    """The policy as it was trained: the base, the adapter, the checkpoint's weights."""
    unet = open_model(str(source)).load_denoiser(torch.float32)
    add_lora(unet, Lora(**lora), seed=0)
    latest = max((run / "checkpoints").iterdir()) / "policy.safetensors"
    result = unet.load_state_dict(load_file(latest), strict=False)
    assert not result.unexpected_keys and set(load_file(latest)) == set(trainable_weights(unet))
    return unet


def test_full_run_loads_and_draws(trained: Trained, sd: Path) -> None:
    run = trained()
    pipeline = StableDiffusionPipeline.from_pretrained(run / "final")
    assert identical(pipeline.unet.state_dict(), weights(run)) and apart(weights(run), unet_of(sd)) > 1e-3
    picture, before = draw(pipeline), draw(StableDiffusionPipeline.from_pretrained(sd))
    assert picture.shape == (16, 16, 3) and np.isfinite(picture).all() and picture.std() > 0
    assert np.abs(picture - before).max() > 1e-3
    for name in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "scheduler/scheduler_config.json"):
        assert (run / "final" / name).read_bytes() == (sd / name).read_bytes()


def test_final_is_the_last_checkpoint_and_past_policy(trained: Trained) -> None:
    run = trained()
    assert identical(weights(run), load_file(max((run / "checkpoints").iterdir()) / "policy.safetensors"))
    assert identical(weights(run), load_file(run / "pool" / "policy_00002.safetensors"))


def test_equal_runs_write_equal_bytes(trained: Trained, tmp_path: Path) -> None:
    one, other = trained(), trained(**{"seppo.output_dir": str(tmp_path / "again")})
    files = sorted(path.relative_to(one / "final") for path in (one / "final").rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(other / "final") for path in (other / "final").rglob("*") if path.is_file())
    for name in files:
        assert (one / "final" / name).read_bytes() == (other / "final" / name).read_bytes(), name


def test_card_says_how_it_was_trained(trained: Trained, sd: Path, demonstrations: Path) -> None:
    card = (trained() / "final" / "README.md").read_text()
    assert card.startswith("---\n") and f"base_model: {sd}\n" in card and "library_name: diffusers" in card
    assert f"24 demonstrations from `{demonstrations}`" in card and "at 16 pixels" in card
    assert "past policies (`uniform`)" in card and "flipper `aaf`" in card
    assert "4 optimizer updates of 8 pairs, 0 of them skipped" in card
    for package in ("torch", "diffusers", "transformers", "peft", "deepspeed"):
        assert re.search(rf"^- {package} \d", card, re.MULTILINE)
    settings = json.loads(re.search(r"```json\n(.*?)```", card, re.DOTALL)[1])
    assert settings["seppo"]["beta"] == 2000 and settings["optimizer"]["params"]["lr"] == 1e-3
    assert "output_dir" not in settings["seppo"] and "cache_dir" not in settings["seppo"]["data"]
    # the usage that the card shows works
    found = {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace("FOLDER", repr(str(trained() / "final"))), found)
    assert draw(found["pipeline"]).shape == (16, 16, 3)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_lora_loads_and_reproduces_the_policy(family: str, trained: Trained, sd: Path, sdxl: Path) -> None:
    source, cls, width = (sd, StableDiffusionPipeline, 32) if family == "sd" else (sdxl, StableDiffusionXLPipeline, 80)
    run = trained(**{"seppo.model.lora": LORA, "seppo.model.path": str(source)})
    assert sorted(path.name for path in (run / "final").iterdir()) == ["README.md", "pytorch_lora_weights.safetensors"]
    pipeline = cls.from_pretrained(source)
    base = predict(pipeline.unet, width)
    pipeline.load_lora_weights(run / "final")
    policy = predict(trained_policy(run, source, LORA), width)
    assert (policy - base).abs().max() > 1e-3
    assert torch.equal(predict(pipeline.unet, width), policy)
    assert draw(pipeline).shape == (16, 16, 3)
    card = (run / "final" / "README.md").read_text()
    assert "load_lora_weights" in card and "lora" in card.split("---")[1]


def test_pool_keeps_adapters_only(trained: Trained, tmp_path: Path) -> None:
    wide = {"seppo.model.path": str(tiny_sd(tmp_path / "wide"))}  # beside its weights, adapters are small
    run, full = trained(**wide, **{"seppo.model.lora": LORA}), trained(**wide)
    for k in range(3):
        with safe_open(run / "pool" / f"policy_{k:05}.safetensors", "pt") as file:
            assert file.keys() and all("lora_" in name for name in file.keys())
    size, full_size = ((folder / "pool" / "policy_00001.safetensors").stat().st_size for folder in (run, full))
    assert size < full_size / 10
    assert column(run, "reference") == [0, 0, 0, 0]
    assert column(run, "logit_p95")[0] == 0 != column(run, "logit_p95")[1]


def test_reference_shares_the_base(settings: Callable[..., dict[str, Any]], train: Trained,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """One base, two adapters: frozen weights have one storage, adapters one each, and the base never changes."""
    trainers, loop = [], Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self: (trainers.append(self), loop(self)))
    train(settings(**{"seppo.model.lora": LORA}))
    (trainer,) = trainers
    policy, reference = dict(trainer.engine.module.named_parameters()), dict(trainer.reference.module.named_parameters())
    assert policy.keys() == reference.keys()
    for name, weight in policy.items():
        assert (weight.data_ptr() == reference[name].data_ptr()) == (not weight.requires_grad), name
        assert weight.requires_grad == ("lora_" in name)
    base = unet_of(Path(trainer.settings.model.path))
    kept = {name.replace(".base_layer", ""): weight.detach() for name, weight in policy.items() if "lora_" not in name}
    assert identical(kept, base)


def test_sdxl_trains_and_loads(trained: Trained, sdxl: Path) -> None:
    run = trained(**{"seppo.model.path": str(sdxl), "seppo.sampler.solver": "euler"})
    first = rows(run)[0]
    assert first["logit_p05"] == first["logit_p95"] == 0 and column(run, "skipped_steps") == [0] * 4
    pipeline = StableDiffusionXLPipeline.from_pretrained(run / "final")
    assert identical(pipeline.unet.state_dict(), weights(run)) and apart(weights(run), unet_of(sdxl)) > 1e-3
    picture = draw(pipeline)
    assert picture.shape == (16, 16, 3) and np.isfinite(picture).all()
