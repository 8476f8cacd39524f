"""The plan's FLOPs and bytes of flow transformers against what the real thing takes, and those of the published models."""

import copy
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import CLOSE, allocated
from torch import Tensor, nn

from seppo_fast.config import Lora
from seppo_fast.configfile import load_config
from seppo_fast.models import Model
from seppo_fast.models.directory import Directory
from seppo_fast.models.families import FAMILIES
from seppo_fast.models.lora import add_lora, share_frozen
from seppo_fast.models.published import FLUX_DEV, INDEX, QWEN_IMAGE, SD35_MEDIUM, WAN_1_3B, WAN_TI2V, Configs, published_model
from seppo_fast.models.trial import blank_conditions
from seppo_fast.planning.cost import network_bytes
from seppo_fast.planning.dry_run import dry_run
from seppo_fast.planning.network_memory import inference, micro_batch

pytestmark = pytest.mark.slow

ENCODERS = {"text_encoder": {"hidden_size": 32, "projection_dim": 32}, "text_encoder_2": {"hidden_size": 32, "projection_dim": 32}}
SMALL: dict[str, tuple[Configs, dict[str, Any]]] = {  # two kinds of blocks each, 64 tokens of a picture
    "StableDiffusion3Pipeline": (SD35_MEDIUM | ENCODERS | {"text_encoder_3": {"d_model": 64}}, {
        "sample_size": 16, "num_layers": 3, "attention_head_dim": 32, "num_attention_heads": 4, "joint_attention_dim": 64,
        "caption_projection_dim": 128, "pooled_projection_dim": 64, "pos_embed_max_size": 24, "dual_attention_layers": [0, 1]}),
    "FluxPipeline": (FLUX_DEV | ENCODERS | {"text_encoder_2": {"d_model": 64}}, {
        "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 32, "num_attention_heads": 4, "joint_attention_dim": 64,
        "pooled_projection_dim": 32, "axes_dims_rope": [8, 12, 12]}),
    "WanPipeline": (WAN_1_3B | {"text_encoder": {"d_model": 64}}, {
        "num_layers": 3, "attention_head_dim": 32, "num_attention_heads": 4, "ffn_dim": 512, "text_dim": 64}),
    "WanPipeline with a time for each token": (WAN_TI2V | {"text_encoder": {"d_model": 64}}, {
        "num_layers": 3, "attention_head_dim": 32, "num_attention_heads": 4, "ffn_dim": 512, "text_dim": 64}),
    "QwenImagePipeline": (QWEN_IMAGE | {"text_encoder": {"hidden_size": 64}}, {
        "num_layers": 3, "attention_head_dim": 32, "num_attention_heads": 4, "joint_attention_dim": 64,
        "axes_dims_rope": [8, 12, 12]}),
}
both = pytest.mark.parametrize("pipeline", list(SMALL)[:2])
each = pytest.mark.parametrize("pipeline", SMALL)


def small(name: str) -> Model:
    configs, transformer = SMALL[name]
    parts, pipeline = configs | {"transformer": configs["transformer"] | transformer}, name.partition(" ")[0]
    return FAMILIES[pipeline](Directory(Path("small"), configs.get(INDEX, {}) | {"_class_name": pipeline}, parts, {}))


def network(model: Model, device: str, dtype: torch.dtype, checkpointing: bool = False, lora: bool = False) -> nn.Module:
    with torch.device(device):
        denoiser = nn.Module.to(model.empty_denoiser(), dtype)
    if lora:
        add_lora(denoiser, Lora(rank=4), 0)
    if checkpointing:
        denoiser.enable_gradient_checkpointing()
    return denoiser.train()


def call(model: Model, denoiser: nn.Module, device: str, dtype: torch.dtype, samples: int = 4) -> Tensor:
    shape = model.latent_shape(16 * model.vae_scale_factor, 5)  # of a video, two latent frames
    latents = torch.zeros(samples, *shape, device=device, dtype=dtype)
    return model.denoise(denoiser, latents, torch.full((samples,), 500.0, device=device), blank_conditions(model, latents))


@each
@pytest.mark.parametrize(("dtype", "checkpointing", "lora"), [
    (torch.float32, False, False), (torch.float32, True, True), (torch.bfloat16, True, False), (torch.bfloat16, False, True)])
def test_activations_and_gradients_are_what_the_cpu_allocates(pipeline: str, dtype: torch.dtype, checkpointing: bool, lora: bool
                                                              ) -> None:
    def really() -> None:
        prediction = call(model, real, "cpu", dtype)
        with torch.no_grad():
            call(model, real, "cpu", dtype)
        prediction.backward(torch.zeros_like(prediction))

    model = small(pipeline)
    planned, real = (network(model, device, dtype, checkpointing, lora) for device in ("meta", "cpu"))
    estimated = micro_batch(planned, lambda: call(model, planned, "meta", dtype), reference=True, gradient=lambda weight: None)
    assert estimated.peak == pytest.approx(allocated(really), rel=CLOSE)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_is_what_the_cpu_allocates(pipeline: str, dtype: torch.dtype) -> None:
    model = small(pipeline)
    planned, real = (network(model, device, dtype) for device in ("meta", "cpu"))
    estimated = inference(lambda: call(model, planned, "meta", dtype))
    assert estimated.peak == pytest.approx(allocated(torch.no_grad()(lambda: call(model, real, "cpu", dtype))), rel=CLOSE)


@each
@pytest.mark.parametrize("lora", [False, True])
def test_the_bytes_of_two_networks_are_those_of_their_weights_and_tables(pipeline: str, lora: bool) -> None:
    """SD3's table of positions is no parameter. With a LoRA, the reference shares what is frozen, and the table."""
    model = small(pipeline)
    policy = network(model, "cpu", torch.bfloat16, lora=lora)
    reference = copy.deepcopy(policy)
    if lora:
        share_frozen(reference, policy)
    whole, own = network_bytes(policy), network_bytes(policy, shared=lora)
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for module in (policy, reference) for tensor in (*module.parameters(), *module.buffers())}
    assert sum(held.values()) == whole + own and lora == (own < whole)


def textbook(model: Model, latents: tuple[int, ...]) -> float:
    """FLOPs of a forward on one sample: twice the weights for each token that meets them, and 4 n^2 d of each attention.

    Norms' weights and the small products of the time embedding, once a sample, count as others do.
    """
    config = model.empty_denoiser().config
    width = config.num_attention_heads * config.attention_head_dim
    picture, text = prod(latents[2:]) // 4, model.condition_shapes["prompt_embeds"][0]
    joint = 4 * (picture + text) ** 2 * width
    if model.name == "wan":
        own = 2 * picture * 4 * width**2 + 4 * picture**2 * width
        of_prompt = 2 * (2 * picture + 2 * text) * width**2 + 4 * picture * text * width
        block = own + of_prompt + 2 * picture * 2 * config.ffn_dim * width
        times = picture if model.expand_timesteps else 1
        ends = 2 * text * (config.text_dim + width) * width + 2 * times * (config.freq_dim + 7 * width) * width
        return config.num_layers * block + ends + 2 * picture * 4 * 2 * config.in_channels * width
    if model.name == "qwen-image":
        double = 2 * (picture + text) * (4 + 8) * width**2 + 2 * 12 * width**2 + joint  # as FLUX's
        return config.num_layers * double + 2 * text * config.joint_attention_dim * width
    if model.name == "flux2_klein":  # a latent is a token; feed-forwards of 3 times the width with a gate; one modulation for all
        tokens = prod(latents[2:]) + text
        block = 2 * tokens * (4 + 9) * width**2 + 4 * tokens**2 * width
        return (config.num_layers + config.num_single_layers) * block + 2 * text * config.joint_attention_dim * width
    if model.name == "flux":
        double = 2 * (picture + text) * (4 + 8) * width**2 + 2 * 12 * width**2 + joint  # of one sample: two modulations of 6
        single = 2 * (picture + text) * (3 + 4 + 5) * width**2 + 2 * 3 * width**2 + joint
        return config.num_layers * double + config.num_single_layers * single
    dual, layers = len(config.dual_attention_layers), config.num_layers
    blocks = layers * (2 * (picture + text) * 12 * width**2 + 2 * 12 * width**2 + joint)
    last = 2 * text * (1 + 8) * width**2  # the last block makes no text
    return blocks - last + dual * (2 * picture * 4 * width**2 + 2 * 3 * width**2 + 4 * picture**2 * width)


@pytest.mark.parametrize("path", [
    "stabilityai/stable-diffusion-3.5-medium", "black-forest-labs/FLUX.1-dev", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers", "Qwen/Qwen-Image", "black-forest-labs/FLUX.2-klein-4B"])
def test_flops_are_those_of_the_textbook(path: str) -> None:
    model = published_model(path)
    latents = torch.empty(1, *model.latent_shape(512, 17), device="meta", dtype=torch.bfloat16)
    with torch.device("meta"):
        denoiser = nn.Module.to(model.empty_denoiser(), torch.bfloat16)
        expected = textbook(model, tuple(latents.shape))
    times = torch.empty(1, device="meta")
    counted = inference(lambda: model.denoise(denoiser, latents, times, blank_conditions(model, latents))).flops
    assert counted == pytest.approx(expected, rel=0.01)


def test_the_published_transformers() -> None:
    published = {"stabilityai/stable-diffusion-3-medium-diffusers": 2_028_328_000, "black-forest-labs/FLUX.1-dev": 11_901_408_320,
                 "stabilityai/stable-diffusion-3.5-medium": 2_243_171_520, "stabilityai/stable-diffusion-3.5-large": 8_056_627_520,
                 "black-forest-labs/FLUX.1-schnell": 11_891_178_560, "Qwen/Qwen-Image": 20_430_401_088,
                 "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": 1_418_996_800, "Wan-AI/Wan2.1-T2V-14B-Diffusers": 14_288_491_584,
                 "Wan-AI/Wan2.2-TI2V-5B-Diffusers": 4_999_787_712, "black-forest-labs/FLUX.2-klein-base-4B": 3_875_544_576}
    for path, parameters in published.items():
        model = published_model(path)
        with torch.device("meta"):
            transformer = model.empty_denoiser()
        assert sum(weight.numel() for weight in transformer.parameters()) == parameters, path
        sizes = (48, 16, 32) if "5B" in path else (128, 16, 16) if "klein" in path else (16, 8, 16)
        assert (model.latent_channels, model.vae_scale_factor, model.multiple) == sizes, path
    assert published_model("black-forest-labs/FLUX.1-dev", "guoyww/animatediff-motion-adapter-v1-5-2") is None


FOUR = "128 pairs = 4 a rank x 4 accumulated x 8 ranks"


@pytest.mark.parametrize(("name", "said", "most"), [
    ("sd35", ["2267 M parameters (23.89 M trained)", "2.48 TFLOP a forward", "euler, 20 steps, guidance 4.5", FOUR], 45),
    ("flux", ["12.01 B parameters (104.6 M trained)", "21.7 TFLOP a forward", "euler, 28 steps, guidance 3.5", FOUR], 45),
    ("qwen", ["20.52 B parameters (94.37 M trained)", "22.8 TFLOP a forward", "euler, 20 steps, guidance 4", FOUR], 60),
    ("wan", ["1443 M parameters (23.59 M trained)", "56.2 TFLOP a forward", "unipc, 20 steps, guidance 5", "49 frames (window)",
             "32 pairs = 4 a rank x 1 accumulated x 8 ranks", "encoded while it trains", "LoRA rank 32\n"], 45),
])
def test_the_shipped_configurations_fit_an_a100(name: str, said: list[str], most: int, tmp_path: Path) -> None:
    """Eight of 80 GB, without a download."""
    plan = dry_run(load_config(f"ds_a100_{name}.json", [f"seppo.output_dir={tmp_path / 'run'}"]), 8)
    for words in (*said, "beta auto", "NVIDIA A100", "the model published under"):
        assert words in plan, plan
    assert "advice" not in plan and not (tmp_path / "run").exists()
    assert plan.endswith("dry run: nothing was trained or written")
    memory = float(plan.split("memory a rank")[1].split("about ")[1].split(" GB")[0])
    assert 30 < memory < most, "of 80; sd35's and FLUX's text encoders need 22 in fp32 where they embed prompts later, too"
