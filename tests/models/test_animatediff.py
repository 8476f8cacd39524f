"""AnimateDiff: what its axes mean, what is trained, and that plain diffusers takes what is saved."""

import json
import shutil
from functools import partial, partialmethod

import pytest
import torch
from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter, UNetMotionModel
from diffusers.models.attention_processor import Attention
from tiny import tiny_adapter

from seppo_fast.compiler import transformer_blocks
from seppo_fast.config import Lora, Model
from seppo_fast.errors import UserError
from seppo_fast.models import AnimateDiff, open_model
from seppo_fast.models.animatediff import motion_adapter
from seppo_fast.models.attention import layers
from seppo_fast.models.export import save_pipeline
from seppo_fast.models.lora import choose_trained, trainable_weights, trains_a_part
from seppo_fast.models.prepare import prepare_denoisers
from seppo_fast.models.published import published_model
from seppo_fast.models.trial import block_inputs, call_once
from seppo_fast.reference.guidance import classifier_free
from seppo_fast.reference.loop import sample
from seppo_fast.reference.solver import solver_table

FRAMES = 6
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(animatediff_folder):
    return open_model(str(animatediff_folder), frames=FRAMES)


@pytest.fixture(scope="module")
def of_parts(sd_folder, adapter_folder):
    return open_model(str(sd_folder), motion_adapter=str(adapter_folder), frames=FRAMES)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def predict(model, unet, frames=FRAMES):
    with torch.no_grad():
        return model.denoise(unet, random(2, 4, frames, 8, 8), torch.tensor([5, 800]), {"prompt_embeds": random(2, 77, 32, seed=1)})


def moved(model, lora=None, dtype=torch.float32):
    """A UNet whose trained weights have moved away from the source's."""
    unet = model.load_denoiser(dtype)
    choose_trained(unet, lora, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in trainable_weights(unet).values():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator).to(dtype))
    return unet


def test_a_pipeline_and_its_parts_are_the_same_network(model, of_parts):
    assert isinstance(model, AnimateDiff) and model.video and model.name == of_parts.name == "animatediff"
    one, other = model.load_denoiser(torch.float32).state_dict(), of_parts.load_denoiser(torch.float32).state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert any("motion_modules" in name for name in one)
    for given in (model, of_parts):
        config = given.scheduler_config
        assert (config["beta_schedule"], config["beta_start"], config["beta_end"]) == ("linear", 0.00085, 0.012)
        assert given.most_frames == 8


def test_loading_draws_nothing_from_the_global_generator(of_parts):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    of_parts.load_denoiser(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


def test_frames_are_the_third_axis(of_parts, sd_folder):
    """Without what the motion modules add, each frame of the video is what the image model makes of it alone."""
    image = open_model(str(sd_folder))
    unet, still = of_parts.load_denoiser(torch.float32), image.load_denoiser(torch.float32)
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if "motion_modules" in name and "proj_out" in name:
                weight.zero_()
    video = predict(of_parts, unet)
    latents, prompt = random(2, 4, FRAMES, 8, 8), {"prompt_embeds": random(2, 77, 32, seed=1)}
    with torch.no_grad():
        for frame in range(FRAMES):
            alone = image.denoise(still, latents[:, :, frame], torch.tensor([5, 800]), prompt)
            torch.testing.assert_close(video[:, :, frame], alone, rtol=1e-4, atol=1e-5)
    assert (predict(of_parts, of_parts.load_denoiser(torch.float32)) - video).abs().max() > 1e-3, "the motion modules do something"


def test_the_vae_sees_and_makes_frame_after_frame(model, sd_folder):
    vae, latents = model.load_vae("cpu"), random(2, 4, FRAMES, 8, 8)
    video = model.decode(vae, latents)
    assert video.shape == (2, FRAMES, 3, 16, 16)
    alone = open_model(str(sd_folder)).decode(vae, latents[:, :, 4])
    torch.testing.assert_close(video[:, 4], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_samples_are_those_of_the_pipeline(model, animatediff_folder):
    """The solver's table, one timestep a video and guidance give what `AnimateDiffPipeline` makes of the same noise."""
    pipeline = AnimateDiffPipeline.from_pretrained(animatediff_folder)
    pipeline.set_progress_bar_config(disable=True)
    noise, prompts = random(2, 4, FRAMES, 8, 8), ["a red cat", "the sky"]
    theirs = pipeline(prompts, num_frames=FRAMES, height=16, width=16, num_inference_steps=4, guidance_scale=3.0, latents=noise,
                      output_type="latent").frames
    embed, unet = model.load_text("cpu"), model.load_denoiser(torch.float32).eval()
    table = solver_table(model.scheduler_config, "ddim", 4)
    ours = sample(lambda *given: model.denoise(unet, *given), table, noise, embed(prompts), embed([""]),
                  classifier_free(3.0, embed([""])), torch.float32)
    assert ours.shape == theirs.shape == (2, 4, FRAMES, 8, 8)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_more_frames_than_positions_are_refused(animatediff_folder, sd_folder, adapter_folder):
    for path, adapter, names in ((animatediff_folder, None, "unet"), (sd_folder, adapter_folder, "adapter")):
        with pytest.raises(UserError, match=f"seppo.data.video.frames: 9 are more than the 8 positions .*{names}.*set it to 8"):
            open_model(str(path), motion_adapter=adapter and str(adapter), frames=9)
        assert open_model(str(path), motion_adapter=adapter and str(adapter), frames=8).most_frames == 8


def test_adapters_that_do_not_fit_are_refused(sd_folder, sdxl_folder, animatediff_folder, adapter_folder, tmp_path):
    def refused(message, path=sd_folder, adapter=adapter_folder):
        with pytest.raises(UserError, match=message):
            open_model(str(path), motion_adapter=str(adapter)).load_denoiser(torch.float32)

    refused("motion_adapter: .* is a StableDiffusionXLPipeline; motion adapters go with Stable Diffusion 1.x", sdxl_folder)
    refused("has its motion modules already: leave it out", animatediff_folder)
    refused("motion_adapter: .* is a whole pipeline; give an AnimateDiff pipeline as seppo.model.path", adapter=animatediff_folder)
    refused("is of a 'UNet2DConditionModel', where a 'MotionAdapter' is needed", adapter=sd_folder / "unet")
    refused("seppo.model.motion_adapter '.*nowhere' does not exist: give a MotionAdapter directory", adapter=tmp_path / "nowhere")
    refused(r"block_out_channels is \[32, 32\], but .* has \[32, 64\]",
            adapter=tiny_adapter(tmp_path / "narrow", block_out_channels=(32, 32)))
    refused("does not fit .*unet: Incompatible Motion Adapter, got different number of layers per block",
            adapter=tiny_adapter(tmp_path / "deep", motion_layers_per_block=2))
    refused(r"conv_in_channels is 9, .*\(PIA\)", adapter=tiny_adapter(tmp_path / "pia", conv_in_channels=9))
    cut = shutil.copytree(adapter_folder, tmp_path / "cut")
    with open(cut / "diffusion_pytorch_model.safetensors", "r+b") as file:
        file.truncate(1000)
    refused("cut/diffusion_pytorch_model.safetensors", adapter=cut)


@pytest.mark.slow
@pytest.mark.parametrize(("part", "motion"), [(None, {True}), ("temporal", {True}), ("spatial", {False}), ("all", {True, False})])
def test_lora_goes_where_it_is_asked_for(part, motion, model, animatediff_folder, tmp_path):
    lora = Lora(rank=2, alpha=3.0, layers=part)
    before, unet = predict(model, model.load_denoiser(torch.float32)), moved(model, lora)
    weights = trainable_weights(unet)
    assert {"motion_modules" in name for name in weights} == motion
    assert {name.split(".lora_")[0].split("attn")[-1][2:] for name in weights} == {"to_q", "to_k", "to_v", "to_out.0"}
    adapted = {name.split(".lora_")[0] for name in weights}
    attentions = {name for name, layer in unet.named_modules() if isinstance(layer, Attention)
                  and ("motion_modules" in name) in motion}
    assert len(adapted) == 4 * len(attentions), "every attention layer of these, and no other"
    policy = predict(model, unet)
    assert (policy - before).abs().max() > 1e-3

    save_pipeline(model, weights, tmp_path / "final", lora, "card")
    pipeline = AnimateDiffPipeline.from_pretrained(animatediff_folder)
    pipeline.load_lora_weights(tmp_path / "final")
    assert torch.equal(predict(model, pipeline.unet), policy)


def test_targets_are_looked_for_in_that_part_alone(model, sd_folder):
    with pytest.raises(UserError, match=r"'conv1' matches no linear or convolution layer of the UNet's temporal part"):
        choose_trained(model.load_denoiser(torch.float32), Lora(targets=["conv1"]), 0)
    choose_trained(model.load_denoiser(torch.float32), Lora(targets=["conv1"], layers="spatial"), 0)
    with pytest.raises(UserError, match="seppo.model.lora.layers: 'temporal' is for video models, and this is an image model"):
        choose_trained(open_model(str(sd_folder)).load_denoiser(torch.float32), Lora(layers="temporal"), 0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", ["model", "of_parts"])
def test_without_lora_the_motion_modules_are_trained_and_a_pipeline_is_saved(source, dtype, request, tmp_path):
    model = request.getfixturevalue(source)
    unet = moved(model, dtype=dtype)
    weights = trainable_weights(unet)
    assert trains_a_part(unet) and all("motion_modules" in name for name in weights)
    assert len(weights) == sum("motion_modules" in name for name, _ in unet.named_parameters())
    save_pipeline(model, weights, tmp_path / "final", None, "card")
    pipeline = AnimateDiffPipeline.from_pretrained(tmp_path / "final", torch_dtype=dtype)
    state = unet.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in pipeline.unet.state_dict().items())
    assert isinstance(pipeline.scheduler, DDIMScheduler) and pipeline.scheduler.config.beta_schedule == "linear"
    frames = pipeline("a cat", num_frames=4, height=16, width=16, num_inference_steps=2, output_type="pt").frames
    assert frames.shape == (1, 4, 3, 16, 16)
    alone = MotionAdapter.from_pretrained(tmp_path / "final" / "motion_adapter", torch_dtype=dtype)
    assert all(torch.equal(value, state[name]) for name, value in alone.state_dict().items())
    again = open_model(str(tmp_path / "final"))
    assert again.most_frames == 8 and again.scheduler_config["timestep_spacing"] == "linspace"
    index = json.loads((tmp_path / "final" / "model_index.json").read_text())
    assert index["_class_name"] == "AnimateDiffPipeline" and "safety_checker" not in index


@pytest.mark.slow
def test_an_adapter_made_of_the_network_has_all_its_settings():
    """diffusers' own `save_motion_modules` forgets how many layers the modules have."""
    unet = UNetMotionModel(
        sample_size=8, block_out_channels=(32, 64), norm_num_groups=8, cross_attention_dim=32, num_attention_heads=4,
        layers_per_block=1, down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        motion_num_attention_heads=4, motion_max_seq_length=8, temporal_transformer_layers_per_block=2, use_motion_mid_block=False)
    weights = motion_adapter(unet).state_dict()
    assert all(torch.equal(value, unet.state_dict()[name]) for name, value in weights.items())
    assert weights.keys() == {name for name in unet.state_dict() if "motion_modules" in name}


def test_the_attention_layers_that_are_measured_are_the_networks_own(model):
    unet, seen = model.load_denoiser(torch.float32), []
    for module in unet.modules():
        if isinstance(module, Attention):
            module.register_forward_pre_hook(lambda layer, given: seen.append((*given[0].shape, layer.heads)))
    predict(model, unet)
    found = layers(unet, (FRAMES, 8, 8))
    assert sorted(seen) == sorted((2 * layer.sequences, layer.tokens, layer.channels, layer.heads) for layer in found.elements())
    assert {layer.tokens for layer in found} > {FRAMES, 64}


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(model, monkeypatch):
    """Traced, differentiated and taken apart, but no kernels are made: test_prepare makes them, of the same transformer block."""
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    torch.manual_seed(0)
    make = partial(
        UNetMotionModel, sample_size=8, block_out_channels=(32,), norm_num_groups=8, cross_attention_dim=32, num_attention_heads=4,
        layers_per_block=1, down_block_types=("DownBlockMotion",), up_block_types=("UpBlockMotion",),
        motion_num_attention_heads=4, motion_max_seq_length=8)
    unet = make().eval()
    before, graphs = predict(model, unet), torch._dynamo.utils.counters["stats"]["unique_graphs"]
    prepare_denoisers([unet], Model(path="x", compile="regional"), (FRAMES, 8, 8), torch.float32, CPU,
                      inputs=partial(block_inputs, make, partial(call_once, model)))
    assert all(block._compiled_call_impl is not None for block in transformer_blocks(unet))
    torch.testing.assert_close(predict(model, unet), before, rtol=1e-3, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs


@pytest.mark.slow
def test_gradient_checkpointing_gives_the_same_gradients(model):
    gradients = []
    for checkpointed in (False, True):
        unet = model.load_denoiser(torch.float32).train()
        choose_trained(unet, Lora(rank=2), 0)
        if checkpointed:
            unet.enable_gradient_checkpointing()
        prediction = model.denoise(unet, random(1, 4, FRAMES, 8, 8), torch.tensor([5]), {"prompt_embeds": random(1, 77, 32)})
        prediction.square().mean().backward()
        gradients.append([weight.grad for weight in trainable_weights(unet).values()])
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*gradients, strict=True))


def test_published_shapes_are_known_without_a_download():
    base, adapter = "stable-diffusion-v1-5/stable-diffusion-v1-5", "guoyww/animatediff-motion-adapter-v1-5-2"
    model = published_model(base, adapter)
    with torch.device("meta"):
        unet = model.empty_denoiser()
    count = sum(weight.numel() for weight in unet.parameters())
    motion = sum(weight.numel() for name, weight in unet.named_parameters() if "motion_modules" in name)
    assert count - motion == 859_520_964 and 440e6 < motion < 460e6 and model.most_frames == 32
    assert published_model(base, "somebody/else") is None
    assert published_model("stabilityai/stable-diffusion-xl-base-1.0", adapter) is None
