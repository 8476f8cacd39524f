"""FLUX.2 klein does what diffusers' own pipeline does with the same directory; what does not fit is refused by name."""

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from captures import OnTheHost, gpu
from diffusers import (
    AutoencoderKLFlux2,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    UniPCMultistepScheduler,
)
from forked import Forks
from models import flow_samples
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from seppo_fast.config import Lora, Sampler
from seppo_fast.errors import UserError
from seppo_fast.models import Model, open_model
from seppo_fast.models.export import save_pipeline
from seppo_fast.models.improvement import check_reference_model
from seppo_fast.models.labels import OF_REFERENCE
from seppo_fast.models.lora import add_lora, trainable_weights
from seppo_fast.models.tokens import token_counter
from seppo_fast.models.trial import run_denoiser
from seppo_fast.reference import sampler
from seppo_fast.reference.guidance import guided
from seppo_fast.reference.solver import table_of

PROMPTS = ["a photo of the red cat", "two dogs", "", "sky " * 40]
TOKENS, LATENTS = 80, (16, 4, 4)
TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""  # of a user's message, Qwen3's own
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SOLVERS = {"unipc": UniPCMultistepScheduler, "dpmsolver++": DPMSolverMultistepScheduler}


def words() -> Qwen2Tokenizer:
    """Qwen's byte-level tokenizer without merges, with its chat template; 80 tokens at most."""
    symbols = sorted(ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(vocab={symbol: number for number, symbol in enumerate(symbols)}, merges=[], model_max_length=TOKENS,
                               extra_special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_klein(folder: Path, distilled: bool = False, seed: int = 0, dynamic: bool = True, **overrides: Any) -> Path:
    """A random `Flux2KleinPipeline` directory: 16x16 pixels, (4, 8, 8) latents in (16, 4, 4) patches, prompt embeds (80, 48)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = words()
        text = Qwen3Config(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=28, head_dim=8,
                           num_attention_heads=2, num_key_value_heads=1)
        vae = AutoencoderKLFlux2(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, latent_channels=4,
                                 down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.3, 3.0)
        settings = dict(in_channels=LATENTS[0], num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
                        joint_attention_dim=48, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False, mlp_ratio=2.0)
        Flux2KleinPipeline(
            vae=vae, tokenizer=tokenizer, text_encoder=Qwen3ForCausalLM(text), is_distilled=distilled,
            transformer=Flux2Transformer2DModel(**settings | overrides),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic),
        ).save_pretrained(folder)
    return folder


def pipeline_of(folder: Path) -> Flux2KleinPipeline:
    """diffusers' own pipeline of a directory."""
    pipeline = Flux2KleinPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("klein")
    return {"base": tiny_klein(root / "base"), "distilled": tiny_klein(root / "distilled", distilled=True),
            "static": tiny_klein(root / "static", dynamic=False)}


@pytest.fixture(scope="module")
def opened(folders: dict[str, Path]) -> Callable[[str], tuple[Model, Flux2KleinPipeline]]:
    """`opened("base")`: the model, and diffusers' pipeline."""
    return cache(lambda name: (open_model(str(folders[name])), pipeline_of(folders[name])))


def patches(latents: Tensor) -> Tensor:
    """(B, C, 2 h, 2 w) -> (B, 4 C, h, w): of each channel the upper two, then the lower two."""
    return torch.stack([latents[..., row::2, column::2] for row in (0, 1) for column in (0, 1)], dim=2).flatten(1, 2)


def normalised(pipeline: Flux2KleinPipeline, latents: Tensor) -> Tensor:
    """What the network sees of the VAE's latents: its batch norm itself, on their patches."""
    return pipeline.vae.eval().bn(patches(latents))


def test_facts_of_the_directory(opened: Any, folders: dict[str, Path]) -> None:
    model, _ = opened("base")
    assert (model.path, model.latent_channels, model.vae_scale_factor, model.multiple) == (folders["base"], 16, 4, 4)
    assert (model.denoiser, model.prediction_type, model.video, model.embeds_guidance) == ("transformer", "flow", False, False)
    assert model.latent_shape(16, 1) == LATENTS and model.sample_size * 16 == 1024  # pixels, with the published VAE
    assert model.guidance and not opened("distilled")[0].guidance
    assert {file.parent.name for file in model.fingerprint_files()} == {"base", "vae", "text_encoder", "tokenizer"}


@torch.no_grad()
def test_prompts_as_the_pipeline_encodes_them(opened: Any) -> None:
    model, pipeline = opened("base")
    wanted, _ = pipeline.encode_prompt(PROMPTS, device="cpu", max_sequence_length=TOKENS)
    got = model.load_text("cpu")(PROMPTS)
    assert model.condition_shapes == {"prompt_embeds": (TOKENS, 48)} and got["prompt_embeds"].shape == (len(PROMPTS), TOKENS, 48)
    assert torch.equal(got["prompt_embeds"], wanted) and len(wanted.unique(dim=0)) == len(PROMPTS)


def test_prompts_that_are_cut(opened: Any) -> None:
    """A prompt is seen whole where it and the template fit."""
    model, pipeline = opened("base")
    count, limit = token_counter(model)
    fitting = "x" * limit
    assert count([fitting, "y" + fitting]) == [limit, limit + 1]
    embed = model.load_text("cpu")
    for prompt, whole in ((fitting, True), ("y" + fitting, False)):
        text = pipeline.tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                                      add_generation_prompt=True, enable_thinking=False)
        assert (len(pipeline.tokenizer(text)["input_ids"]) <= TOKENS) == whole
        assert embed([prompt])["prompt_embeds"].shape == (1, TOKENS, 48)


@torch.no_grad()
def test_vae_both_ways(opened: Any) -> None:
    model, pipeline = opened("base")
    vae = model.load_vae("cpu")
    assert isinstance(vae, AutoencoderKLFlux2) and vae.dtype == torch.float32 and not vae.training
    pixels = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean, std = model.encode(vae, pixels, 2)
    posterior = pipeline.vae.encode(pixels).latent_dist
    torch.testing.assert_close((mean, std), (patches(posterior.mean), patches(posterior.std)))
    latents = model.latent_scale.scaled(mean)
    torch.testing.assert_close(latents, pipeline._encode_vae_image(pixels, None))  # as the pipeline sees an image
    torch.testing.assert_close(latents, normalised(pipeline, posterior.mean))
    image = pipeline.vae.decode(posterior.mean).sample
    torch.testing.assert_close(model.decode(vae, latents), pipeline.image_processor.denormalize(image))


def ours(model: Model, noise: Tensor, solver: str, steps: int, scale: float, denoiser: nn.Module | None = None) -> Tensor:
    """The sampler's latents for one prompt."""
    return flow_samples.ours(model, ["a red cat"], noise, solver, steps, scale, denoiser)


def theirs(pipeline: Flux2KleinPipeline, noise: Tensor, solver: str, steps: int, scale: float, output: str = "latent") -> Tensor:
    """The pipeline's sample for it, with the solver that a user of diffusers would put into it."""
    before, (height, width) = pipeline.scheduler, noise.shape[-2:]
    if solver != "euler":
        pipeline.scheduler = SOLVERS[solver].from_config(before.config, **FLOW, flow_shift=before.config.shift)
    try:
        found = pipeline(prompt=["a red cat"], latents=noise, num_inference_steps=steps, guidance_scale=scale, height=4 * height,
                         width=4 * width, max_sequence_length=TOKENS, output_type=output).images
    finally:
        pipeline.scheduler = before
    return normalised(pipeline, found) if output == "latent" else found


# The pipeline gives every scheduler a mu, which these two refuse without dynamic shifting.
CASES = [(*case, solver, steps) for case, solver, steps in product(
    [("base", 1.0), ("base", 4.0), ("distilled", 1.0), ("static", 4.0)], ["euler", *SOLVERS], [4, 10])
    if case[0] != "static" or solver == "euler"]


@pytest.mark.parametrize(("name", "scale", "solver", "steps"), CASES)
def test_samples_are_the_pipeline_s(name: str, scale: float, solver: str, steps: int, opened: Any) -> None:
    model, pipeline = opened(name)
    noise = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(3))
    got, wanted = ours(model, noise, solver, steps, scale), theirs(pipeline, noise, solver, steps, scale)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    assert (got - noise).abs().max() > 0.1


def test_pictures_are_the_pipeline_s(opened: Any) -> None:
    model, pipeline = opened("base")
    noise = torch.randn(1, *LATENTS, generator=torch.Generator().manual_seed(3))
    got = model.decode(model.load_vae("cpu"), ours(model, noise, "euler", 3, 4.0))
    torch.testing.assert_close(got, theirs(pipeline, noise, "euler", 3, 4.0, "pt"), atol=1e-4, rtol=1e-4)


def test_training_shifts_times_as_the_pipeline_s_own_number_of_steps_does(opened: Any) -> None:
    model, pipeline = opened("base")
    k = model.time_shift(LATENTS)
    pipeline(prompt="a cat", height=16, width=16, output_type="latent", max_sequence_length=TOKENS)
    even = torch.linspace(1.0, 1 / 50, 50)
    torch.testing.assert_close(pipeline.scheduler.sigmas[:-1], k * even / (1 + (k - 1) * even))
    assert opened("static")[0].time_shift(LATENTS) == 3.0


def test_a_distilled_model_has_no_guidance(opened: Any) -> None:
    with pytest.raises(UserError, match="seppo.sampler.guidance_scale: 4 has no effect on .*distilled: .* set it to 1"):
        guided(opened("distilled")[0], 4.0, ["prompt_embeds"])


@pytest.mark.parametrize("lora", [None, Lora(rank=2, alpha=6.0, targets=["to_q", "to_qkv_mlp_proj"])])
def test_what_is_exported_is_loaded_by_diffusers(lora: Lora | None, opened: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    model, before = opened("base")
    denoiser = model.load_denoiser(torch.float32)
    if lora is not None:
        add_lora(denoiser, lora, seed=0)
    random, weights = torch.Generator().manual_seed(5), trainable_weights(denoiser)
    with torch.no_grad():
        for weight in weights.values():
            weight += 0.05 * torch.randn(weight.shape, generator=random)
    save_pipeline(model, weights, tmp_path / "final", lora, "")
    pipeline = pipeline_of(folders["base"] if lora else tmp_path / "final")
    if lora is not None:
        pipeline.load_lora_weights(tmp_path / "final")
    noise = torch.randn(1, *LATENTS, generator=torch.Generator().manual_seed(3))
    got, wanted = theirs(pipeline, noise, "euler", 3, 2.0), ours(model, noise, "euler", 3, 2.0, denoiser)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    assert (got - theirs(before, noise, "euler", 3, 2.0)).abs().max() > 1e-3
    if lora is None:
        assert pipeline.tokenizer.chat_template == TEMPLATE


def test_a_run_by_the_command(forks: Forks, settings: Callable[..., dict[str, Any]], folders: dict[str, Path], tmp_path: Path
                              ) -> None:
    lora = {"rank": 2, "alpha": 4.0, "targets": ["to_q", "to_out.0", "to_qkv_mlp_proj", "linear_in"]}
    raw = settings(**{"seppo.model.path": str(folders["base"]), "seppo.model.lora": lora, "seppo.sampler.solver": "euler",
                      "seppo.sampler.guidance_scale": 4.0, "seppo.beta": 100.0, "seppo.data.cache_dir": str(tmp_path / "cache"),
                      "train_batch_size": 4, "train_micro_batch_size_per_gpu": 2, "seppo.samples.every": 2})
    result = forks.run(raw)
    assert result.status == 0, result.output[-3000:]
    run = Path(raw["seppo"]["output_dir"])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all(row["grad_norm"] > 0 for row in rows)
    pipeline = pipeline_of(folders["base"])
    noise = torch.randn(1, *LATENTS, generator=torch.Generator().manual_seed(3))
    before = theirs(pipeline, noise, "euler", 3, 4.0)
    pipeline.load_lora_weights(run / "final")
    assert (theirs(pipeline, noise, "euler", 3, 4.0) - before).abs().max() > 1e-6


@torch.no_grad()
def test_a_step_stays_on_the_device(opened: Any) -> None:
    model, _ = opened("base")
    with torch.device("meta"):
        denoiser, latents, times = model.empty_denoiser().eval(), torch.empty(2, *LATENTS), torch.empty(2)
        conditions = {"prompt_embeds": torch.empty(2, *model.condition_shapes["prompt_embeds"])}
    with OnTheHost() as mode:
        model.denoise(denoiser, latents, times, conditions)
    assert mode.names == []


@gpu
@torch.no_grad()
def test_a_captured_step_draws_what_a_plain_one_does(opened: Any) -> None:
    model, said = opened("base")[0], []
    denoiser = model.load_denoiser(torch.float32).eval().requires_grad_(False).to("cuda")
    shapes = model.condition_shapes.items()
    empty, given = ({name: torch.randn(size, *shape, device="cuda") for name, shape in shapes} for size in (1, 3))
    noise = torch.randn(3, *LATENTS, device="cuda")
    denoise, guidance = guided(model, 4.0, empty)
    table = table_of(model, "euler", 5, LATENTS).to("cuda")
    settings = (Sampler(solver="euler", steps=5, guidance_scale=4.0, batch_size=2, cuda_graph=graph) for graph in (False, True))
    plain, captured = (sampler.Sampler(denoiser, denoise, table, empty, guidance, each, torch.float32, say=said.append).draw(
        noise, given) for each in settings)
    torch.testing.assert_close(captured, plain, rtol=1e-4, atol=1e-4)
    assert any("capture" in line for line in said), "it fell back to plain steps"


@pytest.fixture
def own(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(folders["base"], tmp_path / "own")


def edit(file: Path, without: tuple[str, ...] = (), **changes: Any) -> None:
    found = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in found.items() if key not in without}))


def change(folder: Path, name: str, value: Tensor | None) -> None:
    """Put another tensor into the VAE's weights, or take one out."""
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = {key: tensor for key, tensor in (load_file(file) | {name: value}).items() if tensor is not None}
    save_file(weights, file)


@pytest.mark.parametrize("kind", ["Flux2KleinKVPipeline", "Flux2KleinInpaintPipeline", "Flux2Pipeline"])
def test_its_other_pipelines_are_refused(kind: str, own: Path) -> None:
    edit(own / "model_index.json", _class_name=kind)
    with pytest.raises(UserError, match=f"_class_name is '{kind}'.*; what can be trained is .*Flux2KleinPipeline"):
        open_model(str(own))


@pytest.mark.parametrize(("file", "changes", "message"), [
    ("transformer/config.json", {"in_channels": 8}, "in_channels is 8, but the VAE, of whose latents .* makes it 16"),
    ("transformer/config.json", {"out_channels": 32}, "out_channels is 32, but the VAE, .* makes it 16"),
    ("transformer/config.json", {"patch_size": 2}, "patch_size is 2, but .* makes it 1"),
    ("transformer/config.json", {"joint_attention_dim": 96}, "joint_attention_dim is 96, but text_encoder, .* makes it 48"),
    ("transformer/config.json", {"without": ["guidance_embeds"]}, "guidance_embeds is True, but the pipeline, .* makes it False"),
    ("transformer/config.json", {"axes_dims_rope": [4, 4, 4, 8]}, "the network that it describes does not work"),
    ("text_encoder/config.json", {"num_hidden_layers": 26, "layer_types": None}, "num_hidden_layers is 26, and .* takes .* 27"),
    ("text_encoder/config.json", {"num_hidden_layers": 26}, "cannot load .*/text_encoder: .*layer_type"),
    ("vae/config.json", {"patch_size": [1, 1]}, r"patch_size is \[1, 1\], and the pipeline makes patches of 2 x 2"),
    ("vae/config.json", {"batch_norm_eps": 0.0}, "batch_norm_eps is 0.0, where a small number above 0"),
    ("vae/config.json", {"latent_channels": 8}, "in_channels is 16, but the VAE, .* makes it 32"),
    ("model_index.json", {"is_distilled": "false"}, "is_distilled is 'false', where true or false"),
    ("model_index.json", {"vae": ["diffusers", "AutoencoderKL"]}, "vae is .*, where AutoencoderKLFlux2 is needed"),
    ("model_index.json", {"text_encoder": ["transformers", "T5EncoderModel"]}, "where Qwen3ForCausalLM is needed"),
])
def test_parts_that_do_not_fit(file: str, changes: dict[str, Any], message: str, own: Path) -> None:
    edit(own / file, **changes)
    with pytest.raises(UserError, match=message) as caught:
        run_denoiser(open_model(str(own)))
    assert str(own) in str(caught.value)


@pytest.mark.parametrize(("name", "value", "message"), [
    ("bn.running_mean", None, "lacks bn.running_mean, by which the pipeline normalises latents"),
    ("bn.running_var", None, "lacks bn.running_var, by which"),
    ("bn.running_var", torch.full((16,), -1.0), "not finite, or a negative variance"),
    ("bn.running_mean", torch.full((16,), float("nan")), "not finite, or a negative variance"),
    ("bn.running_mean", torch.tensor(0.0), r"bn.running_mean has the shape \(\), and .* makes it \(16,\)"),
])
def test_statistics_of_the_vae(name: str, value: Tensor | None, message: str, own: Path) -> None:
    change(own, name, value)
    with pytest.raises(UserError, match=f"{re.escape(str(own))}/vae.*{message}"):
        open_model(str(own))


def test_a_reference_with_other_statistics(opened: Any, own: Path) -> None:
    change(own, "bn.running_mean", torch.linspace(-1, 1, 16) / 3)
    with pytest.raises(UserError, match=r"its VAE's shift_factor is \(-0.33\S+ \S+ .*\.\.\. and not \(.*\.\.\.") as caught:
        check_reference_model(open_model(str(own), labels=OF_REFERENCE), opened("base")[0])
    assert len(str(caught.value)) < 700


def test_statistics_in_shards_or_pickles(opened: Any, own: Path) -> None:
    wanted, vae = opened("base")[0].latent_scale, AutoencoderKLFlux2.from_pretrained(own / "vae")
    for given in ({"max_shard_size": "50KB"}, {"safe_serialization": False}):
        shutil.rmtree(own / "vae")
        vae.save_pretrained(own / "vae", **given)
        assert open_model(str(own)).latent_scale == wanted


@pytest.mark.parametrize(("template", "message"), [
    (None, "cannot load .*/tokenizer: .*chat template"), ("{% for", "cannot load .*/tokenizer: "),
    ("{{ messages[0]['role'] }}", "its chat template leaves the prompt out"), 
    (TEMPLATE + "." * 60, "so that none is left for a prompt"),
])
def test_chat_templates(template: str | None, message: str, own: Path) -> None:
    (own / "tokenizer" / "chat_template.jinja").unlink()
    if template:
        (own / "tokenizer" / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=message):
        open_model(str(own))
