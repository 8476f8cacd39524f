"""What is written at the end loads in plain diffusers and computes what the policy computed."""

import hashlib
import json
import resource
import shutil
import signal

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from tiny import LATENTS

from seppo_fast.config import Lora
from seppo_fast.errors import UserError
from seppo_fast.models import open_model
from seppo_fast.models.export import save_pipeline
from seppo_fast.models.lora import add_lora, trainable_weights

PIPELINES = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


def trained(model, lora=None, dtype=torch.float32):
    """A UNet whose trainable weights have moved away from the source's."""
    unet = model.load_denoiser(dtype)
    if lora is not None:
        add_lora(unet, lora, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in trainable_weights(unet).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(dtype))
    return unet


def outputs(model, unet, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    widths = {"prompt_embeds": (2, 77, 32)}
    if model.name == "sdxl":
        widths = {"prompt_embeds": (2, 77, 80), "pooled": (2, 40)}
    conditions = {key: torch.randn(shape, generator=g).to(dtype) for key, shape in widths.items()}
    with torch.no_grad():
        return model.denoise(unet, torch.randn(2, *LATENTS, generator=g).to(dtype), torch.tensor([5, 800]), conditions)


def digests(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_pipeline(name, dtype, request, tmp_path):
    source = request.getfixturevalue(f"{name}_folder")
    model = open_model(str(source))
    unet = trained(model, dtype=dtype)
    final = tmp_path / "run" / "final"
    save_pipeline(model, trainable_weights(unet), final, None, "# A card\n")
    assert (final / "README.md").read_text() == "# A card\n"

    written, original = digests(final), digests(source)
    assert {key: value for key, value in written.items() if not key.startswith("unet") and key != "README.md"} == \
        {key: value for key, value in original.items() if not key.startswith("unet")}
    stored = load_file(final / "unet/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert all(torch.equal(stored[key], value) for key, value in unet.state_dict().items())

    pipeline = PIPELINES[name].from_pretrained(final, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    assert torch.equal(outputs(model, pipeline.unet, dtype), outputs(model, unet, dtype))
    assert not torch.equal(outputs(model, model.load_denoiser(dtype), dtype), outputs(model, unet, dtype))
    if dtype == torch.float32:
        images = pipeline("a cat", num_inference_steps=2, height=16, width=16, output_type="np").images
        assert images.shape == (1, 16, 16, 3)
    assert [path.name for path in final.parent.iterdir()] == ["final"]
    again = open_model(str(final))  # and can be trained further
    assert torch.equal(again.load_denoiser(dtype).conv_in.weight, unet.conv_in.weight)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("rank, alpha", [(4, 4.0), (4, 10.0), (3, 0.5)])
def test_lora_weights(name, rank, alpha, request, tmp_path):
    source = request.getfixturevalue(f"{name}_folder")
    model = open_model(str(source))
    lora = Lora(rank=rank, alpha=alpha, dropout=0.1, targets=["to_q", "to_k", "to_v", "to_out.0", "conv1"])
    unet = trained(model, lora).eval()
    final = tmp_path / "final"
    save_pipeline(model, trainable_weights(unet), final, lora, "card")
    assert sorted(digests(final)) == ["README.md", "pytorch_lora_weights.safetensors"]

    pipeline = PIPELINES[name].from_pretrained(source)
    before = outputs(model, pipeline.unet)
    pipeline.load_lora_weights(final)
    assert torch.equal(outputs(model, pipeline.unet), outputs(model, unet))
    assert not torch.allclose(outputs(model, unet), before, atol=1e-4)
    config = next(iter(pipeline.unet.peft_config.values()))
    assert (config.r, config.lora_alpha) == (rank, alpha)


@pytest.mark.parametrize("lora", [None, Lora(rank=2, alpha=3.0)])
def test_bytes_do_not_depend_on_the_day_or_the_order(sd_folder, tmp_path, lora):
    model = open_model(str(sd_folder))
    weights = trainable_weights(trained(model, lora))
    save_pipeline(model, weights, tmp_path / "a", lora, "card")
    save_pipeline(model, dict(reversed(weights.items())), tmp_path / "elsewhere" / "b", lora, "card")
    assert digests(tmp_path / "a") == digests(tmp_path / "elsewhere" / "b")


def test_replaces_an_earlier_export_and_the_rest_of_a_crashed_one(sd_folder, tmp_path):
    model = open_model(str(sd_folder))
    final, leftover = tmp_path / "final", tmp_path / ".final.tmp"
    for folder in (final, leftover):
        folder.mkdir()
        (folder / "stale.txt").write_text("old")
    save_pipeline(model, trainable_weights(trained(model)), final, None, "new card")
    assert not (final / "stale.txt").exists() and (final / "README.md").read_text() == "new card"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_nothing_is_left_of_an_export_that_fails(sd_folder, tmp_path):
    model = open_model(str(sd_folder))
    weights = dict(trainable_weights(trained(model)))
    weights.pop("conv_in.weight")
    with pytest.raises(RuntimeError, match="conv_in.weight"):
        save_pipeline(model, weights, tmp_path / "final", None, "card")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("limit", [300_000, 1_500_000])
def test_a_write_that_fails_keeps_the_earlier_export(sd_folder, tmp_path, limit):
    """The operating system refuses to write beyond a size: first in a copied component, then in the UNet."""
    final = tmp_path / "final"
    final.mkdir()
    (final / "README.md").write_text("old")
    model = open_model(str(sd_folder))
    weights = dict(model.load_denoiser(torch.float32).named_parameters())
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(UserError, match=f"cannot write {final}"):
            save_pipeline(model, weights, final, None, "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert (final / "README.md").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_variant_is_exported_under_the_plain_name(own_sd, tmp_path):
    """fp16 files beside fp32 ones, one component in shards: exported is what was read, and it loads with no variant."""
    for component in ("unet", "vae"):
        path = own_sd / component / "diffusion_pytorch_model.safetensors"
        halves = {key: value.half() for key, value in load_file(path).items()}
        save_file(halves, path.with_name("diffusion_pytorch_model.fp16.safetensors"), metadata={"format": "pt"})
    text = StableDiffusionPipeline.from_pretrained(own_sd).text_encoder
    text.half().save_pretrained(own_sd / "text_encoder", variant="fp16", max_shard_size="60KB")
    assert list((own_sd / "text_encoder").glob("model.fp16-*-of-*.safetensors"))

    model = open_model(str(own_sd), variant="fp16")
    model.load_text("cpu")
    unet = trained(model, dtype=torch.float16)
    save_pipeline(model, trainable_weights(unet), tmp_path / "final", None, "card")
    names = set(digests(tmp_path / "final"))
    assert "vae/diffusion_pytorch_model.safetensors" in names and "text_encoder/model.safetensors.index.json" in names
    assert "vae/diffusion_pytorch_model.fp16.safetensors" not in names and "text_encoder/model.safetensors" not in names
    vae, source = (folder / "vae" for folder in (tmp_path / "final", own_sd))
    assert (vae / "diffusion_pytorch_model.safetensors").read_bytes() == \
        (source / "diffusion_pytorch_model.fp16.safetensors").read_bytes()
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "final", torch_dtype=torch.float16)
    for loaded, wanted in ((pipeline.text_encoder, text), (pipeline.unet, unet)):
        assert all(torch.equal(value, wanted.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_pipeline_with_a_safety_checker_that_is_not_there(own_sd, tmp_path):
    index = json.loads((own_sd / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    (own_sd / "model_index.json").write_text(json.dumps(index))
    model = open_model(str(own_sd))
    save_pipeline(model, trainable_weights(trained(model)), tmp_path / "final", None, "card")
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "final").safety_checker is None


def test_foreign_files_of_the_source_stay_behind(own_sd, tmp_path):
    (own_sd / "v1-5-pruned.ckpt").write_bytes(b"x" * 10)
    (own_sd / "text_encoder" / "flax_model.msgpack").write_bytes(b"x" * 10)
    (own_sd / "README.md").write_text("the source's card")
    model = open_model(str(own_sd))
    save_pipeline(model, trainable_weights(trained(model)), tmp_path / "final", None, "card")
    names = digests(tmp_path / "final")
    assert not {"v1-5-pruned.ckpt", "text_encoder/flax_model.msgpack"} & set(names)
    assert (tmp_path / "final" / "README.md").read_text() == "card"


def test_source_that_has_vanished(own_sd, tmp_path):
    model = open_model(str(own_sd))
    weights = trainable_weights(trained(model))
    shutil.rmtree(own_sd / "vae")
    with pytest.raises(UserError, match="vae"):
        save_pipeline(model, weights, tmp_path / "final", None, "card")
    assert not (tmp_path / "final").exists()
