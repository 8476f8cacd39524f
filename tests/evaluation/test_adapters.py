"""LoRA files as people have them, beside the same change merged into the weights by hand; and those that are refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from evaluation.lora_files import (
    ALPHA,
    RANK,
    Layers,
    candidate,
    check_as_merged,
    kohya,
    layers,
    old_diffusers,
    peft,
    with_alphas,
)
from tiny import tiny_sd, tiny_sdxl
from torch import Tensor

from seppo_fast.errors import UserError
from seppo_fast.models import Model, open_model


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return open_model(str({"sd": tiny_sd, "sdxl": tiny_sdxl}[request.param](tmp_path_factory.mktemp("adapters") / request.param)))


@pytest.mark.parametrize(("form", "text", "scale"), [
    (peft, False, 1.0), (peft, True, 1.0), (old_diffusers, True, 1.0), (kohya, True, ALPHA / RANK),
    (with_alphas, True, ALPHA / RANK)])
def test_every_form_changes_the_model_as_merged_weights_do(model: Model, form: Callable[[Layers], dict[str, Tensor]], text: bool,
                                                           scale: float, tmp_path: Path) -> None:
    made = layers(model, text)
    check_as_merged(model, candidate(model, form(made), tmp_path), made, scale, text, "prompt_embeds", 1e-2)


def half_of_another_model(made: Layers) -> dict[str, Tensor]:
    return {name.replace("attentions.0", "attentions.7") if "down_blocks" in name else name: value
            for name, value in peft(made).items()}


def without_one(made: Layers) -> dict[str, Tensor]:
    tensors = peft(made)
    del tensors[next(name for name in tensors if name.startswith("unet.") and "lora_B" in name)]
    return tensors


REFUSED = {
    "half of the names": (half_of_another_model, "where this model's layers of these names have"),
    "an A without its B": (without_one, "it is another model's LoRA, or a part of one"),
    "DoRA": (lambda made: peft(made) | {f"{name}.lora_magnitude_vector": up.norm(dim=1) for name, (_, up) in made.items()}
             | {"unet.x.dora_scale": torch.ones(1)}, "is a DoRA"),
    "a stranger": (lambda made: peft(made) | {"transformer.x.lora_A.weight": torch.ones(1, 1)}, "are no LoRA of this model's unet"),
    "a full weight": (lambda made: peft(made) | {"unet.conv_in.weight": torch.ones(1)}, "conv_in.weight"),
    "kohya's with an unknown name": (lambda made: kohya(made) | {"lora_unet_x.hada_w1_a": torch.ones(1, 1)},
                                     "no LoRA that diffusers reads"),
    "an alpha without its layer": (lambda made: peft(made) | {"unet.nowhere.alpha": torch.tensor(1.0)},
                                   "alphas of layers .*nowhere"),
    "NaN": (lambda made: {k: v * float("nan") for k, v in peft(made).items()}, "tensors with NaN or infinity"),
    "an alpha of several numbers": (lambda made: peft(made) | {f"{name}.alpha": torch.ones(2) for name in made},
                                    "alphas that are no single numbers"),
    "an up that is no matrix": (lambda made: with_alphas(made) | {f"{name}.lora_B.weight": torch.ones(4) for name in made},
                                "no LoRA that diffusers reads"),
    "text encoders alone": (lambda made: {k: v for k, v in peft(made).items() if not k.startswith("unet.")},
                            "has no weights for a UNet"),
    "another rank of shapes": (lambda made: {k: v[:, :1] if "lora_A" in k else v for k, v in peft(made).items()}, "does not fit"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_left_out_is_refused(model: Model, name: str, tmp_path: Path) -> None:
    change, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as caught:
        candidate(model, change(layers(model)), tmp_path).load_denoiser(torch.float32)
    assert str(tmp_path / "mine.safetensors") in str(caught.value)


def test_what_the_wrong_family_calls_its_second_text_encoder_is_refused(tmp_path: Path) -> None:
    model, other = open_model(str(tiny_sd(tmp_path / "sd"))), open_model(str(tiny_sdxl(tmp_path / "sdxl")))
    tensors = peft(layers(model, text=False)) | {name: value for name, value in peft(layers(other)).items() if "encoder_2" in name}
    with pytest.raises(UserError, match="are no LoRA of this model's unet, text_encoder: text_encoder_2"):
        candidate(model, tensors, tmp_path)
