"""LoRA files for Stable Diffusion 3 and FLUX.1: ours, diffusers' own and kohya's, and those of another family."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from evaluation.lora_files import (
    ALPHA,
    PROMPTS,
    RANK,
    Layers,
    candidate,
    check_as_merged,
    layers,
    merge,
    old_diffusers,
    peft,
    predicted,
    with_alphas,
)
from tiny import tiny_flux, tiny_sd, tiny_sd3
from tiny_qwen import tiny_qwen
from torch import Tensor

from seppo_fast.config import Lora
from seppo_fast.errors import UserError
from seppo_fast.evaluation.candidates import open_candidates
from seppo_fast.models import Model, open_model
from seppo_fast.models.export import save_lora
from seppo_fast.models.lora import ADAPTER

Form = Callable[[Layers], dict[str, Tensor]]
BLOCK = "transformer.transformer_blocks.0"
# kohya's names of what LAYERS has
DOUBLE = {f"{BLOCK}.attn.to_out.0": "double_blocks_0_img_attn_proj", f"{BLOCK}.ff.net.2": "double_blocks_0_img_mlp_2"}


@pytest.fixture(scope="module", params=["sd3", "flux"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    make = {"sd3": tiny_sd3, "flux": tiny_flux}[request.param]
    return open_model(str(make(tmp_path_factory.mktemp("adapters") / request.param)))


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return open_model(str(tiny_flux(tmp_path_factory.mktemp("kohya") / "flux")))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return open_model(str(tiny_qwen(tmp_path_factory.mktemp("adapters") / "qwen")))


def clip_stem(name: str) -> str:
    """Other trainers' name of a layer of CLIP, with the part that transformers left out lately."""
    layer = name.removeprefix("text_encoder.").removeprefix("text_model.")
    return f"lora_te1_text_model_{layer}".replace(".", "_")


def kohya(made: Layers) -> dict[str, Tensor]:
    """FLUX.1's: q, k and v are one layer, of which to_q has the first rows."""
    found = {}
    for name, (down, up) in made.items():
        if name.startswith("text_encoder."):
            stem = clip_stem(name)
        elif name.startswith("transformer.single"):
            continue
        else:
            stem = "lora_unet_" + DOUBLE.get(name, "double_blocks_0_img_attn_qkv")
        if stem.endswith("qkv"):
            up = torch.cat([up, 2 * up, 3 * up])
        found |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(ALPHA)}
    return found


def onetrainer(made: Layers) -> dict[str, Tensor]:
    """diffusers' names with underscores."""
    found = {}
    for name, (down, up) in made.items():
        part, layer = name.split(".", 1)
        if part == "transformer" and (layer.startswith("single") or ".ff." in layer):
            continue  # which the conversion does not know
        stem = f"lora_transformer_{layer.replace('.', '_')}" if part == "transformer" else clip_stem(name)
        found |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(ALPHA)}
    return found


def seen(made: Layers, form: Form) -> Layers:
    """The layers that a form of file says."""
    if form is kohya:
        down, up = made[f"{BLOCK}.attn.to_q"]
        made = {name: pair for name, pair in made.items() if not name.startswith("transformer.single")}
        return made | {f"{BLOCK}.attn.{which}": (down, factor * up) for which, factor in (("to_k", 2), ("to_v", 3))}
    if form is onetrainer:
        made = {name: pair for name, pair in made.items() if not name.startswith("transformer.single") and ".ff." not in name}
    return made


def check(model: Model, form: Form, text: bool, scale: float, folder: Path) -> None:
    """A file in this form changes the model as merged weights do."""
    made = {name: (0.3 * down, up) for name, (down, up) in layers(model, text).items()}  # else rounding grows with the weights
    check_as_merged(model, candidate(model, form(made), folder), seen(made, form), scale, text, "pooled", 1e-3)


@pytest.mark.parametrize(("form", "text", "scale"), [
    (peft, False, 1.0), (peft, True, 1.0), (old_diffusers, True, 1.0), (with_alphas, True, ALPHA / RANK)])
def test_every_form_changes_the_model_as_merged_weights_do(model: Model, form: Form, text: bool, scale: float, tmp_path: Path
                                                           ) -> None:
    check(model, form, text, scale, tmp_path)


@pytest.mark.parametrize("form", [kohya, onetrainer])
def test_names_of_other_trainers_for_flux(flux: Model, form: Form, tmp_path: Path) -> None:
    check(flux, form, True, ALPHA / RANK, tmp_path)


@pytest.mark.parametrize(("form", "scale"), [(peft, 1.0), (with_alphas, ALPHA / RANK)])
def test_forms_for_qwen_image(form: Form, scale: float, qwen: Model, tmp_path: Path) -> None:
    """Of the transformer alone: diffusers puts no LoRA on its text encoder."""
    made = {name: (0.3 * down, up) for name, (down, up) in layers(qwen, False).items()}
    check_as_merged(qwen, candidate(qwen, form(made), tmp_path), made, scale, False, "prompt_embeds", 1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd3", "flux", "qwen"])
def test_our_own_file_and_its_alpha(name: str, qwen: Model, flux: Model, tmp_path: Path) -> None:
    model = {"qwen": qwen, "flux": flux}.get(name) or open_model(str(tiny_sd3(tmp_path / "sd3")))
    targets = ["attn.to_q"]
    made = {name: pair for name, pair in layers(model, text=False).items() if name.endswith("attn.to_q")}
    weights = {f"{name.removeprefix('transformer.')}.lora_{which}.{ADAPTER}.weight": value for name, pair in made.items()
               for which, value in zip("AB", pair, strict=True)}
    save_lora(model, weights, tmp_path, Lora(rank=RANK, alpha=ALPHA, targets=targets))
    (tuned,) = open_candidates([f"tuned={model.path}+{tmp_path}"], None, None, 16)
    denoiser, conditions = model.load_denoiser(torch.float32).eval(), model.load_text("cpu")(PROMPTS)
    merge(made, "transformer", denoiser, ALPHA / RANK)
    torch.testing.assert_close(predicted(model, tuned.load_denoiser(torch.float32), conditions),
                               predicted(model, denoiser, conditions), rtol=1e-4, atol=1e-4)


def beside(made: Layers, name: str) -> dict[str, Tensor]:
    return kohya(made) | {f"{name}.lora_down.weight": torch.ones(RANK, 4), f"{name}.lora_up.weight": torch.ones(4, RANK)}


@pytest.mark.parametrize(("change", "message"), [
    (lambda made: {f"text_encoder_2.encoder.x.lora_{which}.weight": torch.ones(2, 2) for which in "AB"} | peft(made),
     "are no LoRA of this model's transformer, text_encoder: text_encoder_2.encoder"),
    (lambda made: beside(made, "lora_te2_encoder_block_0_layer_0_SelfAttention_k"), "has tensors that diffusers leaves out"),
    (lambda made: beside(made, "text_encoders.t5xxl.transformer.encoder.x"), "has tensors that diffusers leaves out"),
    (lambda made: beside(made, "lora_unet_nothing_known"), "is no LoRA that diffusers reads"),
], ids=["T5 by diffusers' name", "T5 by kohya's", "T5 by ComfyUI's", "unknown"])
def test_what_diffusers_leaves_out_is_refused(flux: Model, change: Form, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        candidate(flux, change(layers(flux)), tmp_path)
    assert str(tmp_path / "mine.safetensors") in str(caught.value)


def test_another_familys_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    models = {name: open_model(str(make(tmp_path / name))) for name, make in
              {"sd": tiny_sd, "sd3": tiny_sd3, "flux": tiny_flux}.items()}
    files = {name: peft(layers(model, text=False)) for name, model in models.items()}
    for (own, of), message in {("sd3", "sd"): "no LoRA of this model's transformer, text_encoder, text_encoder_2: unet.",
                               ("sd", "sd3"): "no LoRA of this model's unet, text_encoder: transformer.",
                               ("sd3", "flux"): "does not fit the model's transformer",
                               ("flux", "sd3"): "does not fit the model's transformer"}.items():
        with pytest.raises(UserError, match=message) as caught:
            candidate(models[own], files[of], tmp_path)
        assert "mine.safetensors" in str(caught.value)
