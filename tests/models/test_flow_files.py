"""How the files of flow models are published: weights in shards, and T5's tokenizer as a sentencepiece model alone."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from tiny import tiny_flux
from transformers import T5EncoderModel

from seppo_fast.errors import UserError
from seppo_fast.models import open_model
from seppo_fast.models.export import save_pipeline
from seppo_fast.models.lora import trainable_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux(tmp_path_factory.mktemp("files") / "flux")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_are_read_fingerprinted_and_exported(variant: str | None, folder: Path, tmp_path: Path) -> None:
    sharded, final = tmp_path / "flux", tmp_path / "final"
    shutil.copytree(folder, sharded)
    for part, kind in (("transformer", FluxTransformer2DModel), ("text_encoder_2", T5EncoderModel)):
        module = kind.from_pretrained(folder / part)
        for file in (sharded / part).glob("*.safetensors"):
            file.unlink()
        module.save_pretrained(sharded / part, max_shard_size="20KB", variant=variant)
        assert len(list((sharded / part).glob("*-of-*.safetensors"))) > 1
    model, plain = open_model(str(sharded), variant=variant), open_model(str(folder))
    one, other = model.load_denoiser(torch.float32), plain.load_denoiser(torch.float32)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    conditions = model.load_text("cpu")(["a cat"])
    assert all(torch.equal(conditions[name], value) for name, value in plain.load_text("cpu")(["a cat"]).items())
    shards = {file.name for file in (sharded / "text_encoder_2").glob("*-of-*")}
    assert shards <= {file.name for file in model.fingerprint_files()}
    assert {file.name for file in (sharded / "transformer").glob("*-of-*")} <= {
        file.name for file in model.directory.weights["transformer"].files}

    with torch.no_grad():
        one.x_embedder.bias.add_(1)
    save_pipeline(model, trainable_weights(one), final, None, "card")
    assert shards <= {file.name for file in (final / "text_encoder_2").iterdir()}
    pipeline = FluxPipeline.from_pretrained(final)
    assert torch.equal(pipeline.transformer.x_embedder.bias, one.x_embedder.bias)
    t5 = T5EncoderModel.from_pretrained(folder / "text_encoder_2").state_dict()
    assert all(torch.equal(value, t5[name]) for name, value in pipeline.text_encoder_2.state_dict().items())


def test_a_missing_shard_is_named(folder: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "flux"
    shutil.copytree(folder, sharded)
    (sharded / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    FluxTransformer2DModel.from_pretrained(folder / "transformer").save_pretrained(sharded / "transformer", max_shard_size="20KB")
    last = max((sharded / "transformer").glob("*-of-*"))
    last.unlink()
    with pytest.raises(UserError, match=f"shards, of which 1 are missing: {last.name}"):
        open_model(str(sharded))


def test_a_tokenizer_that_needs_another_package_is_named(folder: Path, tmp_path: Path) -> None:
    """A sentencepiece model alone; this one is damaged, too, where the package is installed."""
    broken = tmp_path / "flux"
    shutil.copytree(folder, broken)
    (broken / "tokenizer_2" / "tokenizer.json").unlink()
    (broken / "tokenizer_2" / "spiece.model").write_bytes(b"no model")
    with pytest.raises(UserError, match="cannot load .*flux/tokenizer_2: "):
        open_model(str(broken))
