"""Values in a model's JSON files that parse and mean nothing: none gives a traceback, and none trains."""

import json
import math
import os
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from tiny import tiny_sd
from transformers import CLIPTextConfig

from seppo_fast.errors import UserError
from seppo_fast.models import open_model
from seppo_fast.models.published import SD15, SDXL
from seppo_fast.models.trial import run_denoiser
from seppo_fast.models.values import check_values
from seppo_fast.reference.solver import solver_table

HUGE = 10**12
VALUES = {
    "vae/config.json": {
        "scaling_factor": (0, -1, "0.18215", None, [], math.nan, math.inf, 1e308, True),
        "block_out_channels": ("16", 3, [], [None], [0]),
        "layers_per_block": (-1, HUGE, 0.5), "act_fn": ("x", 0), "norm_num_groups": (0, 5), "latent_channels": ("4", 0),
        "down_block_types": (["DownEncoderBlock2D", "x"], [0]), "force_upcast": ("false",), "use_quant_conv": (None, "no"),
    },
    "unet/config.json": {
        "block_out_channels": ("32", 0, [32, -1], [32], [[]]), "attention_head_dim": (0, -1, "8", HUGE, 3),
        "norm_eps": (0, -1, 1e308, "x"),
        "layers_per_block": (0, -1, HUGE, "2"), "transformer_layers_per_block": (HUGE, -1, None),
        "flip_sin_to_cos": (None, "true"),
        "freq_shift": (16, -1), "mid_block_scale_factor": (0, -1, math.nan), "cross_attention_dim": ("x", {}, 0),
        "dropout": (1, -1),
        "sample_size": (0, "8"), "mid_block_type": ("x", 1), "num_attention_heads": (4,), "conv_in_kernel": (HUGE, 0),
    },
    "text_encoder/config.json": {
        "hidden_size": ("x", 0), "num_hidden_layers": (HUGE, 0, "2"), "num_attention_heads": (0, 3), "hidden_act": ("x", []),
        "layer_norm_eps": (-1, "x", 0, None), "eos_token_id": (None, [0]), "projection_dim": (None, "x"),
        "max_position_embeddings": (0, None, HUGE), "vocab_size": (HUGE, -1, "552"),
    },
    "scheduler/scheduler_config.json": {
        "beta_start": ("x", 0, -1, 1e308, None, [], 2), "beta_end": ("0.012", 0, 3, math.nan),
        "num_train_timesteps": (0, HUGE, "1000", 0.5),
        "beta_schedule": ("x", 0), "trained_betas": (0.5, [], [0.5], ["x"]), "steps_offset": ("x", HUGE, -1),
        "timestep_spacing": ("x", 0), "set_alpha_to_one": ("no",),
    },
    "tokenizer/tokenizer_config.json": {"model_max_length": (0, -1, "x", [], 0.5), "pad_token": (0, []), "eos_token": (0, {})},
    "model_index.json": {
        "_class_name": (0, None, [], {}), "vae": ("AutoencoderKL", 0, [], [0, 0], ["diffusers"]), "scheduler": (0, ["x"]),
        "../outside": (["diffusers", "AutoencoderKL"],), "force_zeros_for_empty_prompt": ("false",),
    },
}


def use(folder):
    """All that is looked at before training begins."""
    model = open_model(str(folder))
    run_denoiser(model)
    solver_table(model.scheduler_config, "ddim", 5)
    return model


@pytest.mark.parametrize("name", VALUES)
def test_values_that_mean_nothing(own_sd, name):
    file = own_sd / name
    whole = json.loads(file.read_text())
    for key, values in VALUES[name].items():
        for value in values:
            file.write_text(json.dumps(whole | {key: value}))
            with pytest.raises(UserError) as caught:
                use(own_sd)
                raise AssertionError(f"{key} {value!r} passes")
            message = str(caught.value)
            assert "\n" not in message and (str(file.parent) in message or "scheduler config" in message), (key, value, message)
    file.write_text(json.dumps(whole))
    use(own_sd)


def test_a_number_beyond_all_numbers(own_sd):
    file = own_sd / "vae/config.json"
    file.write_text(file.read_text().replace("0.18215", "1e400"))
    with pytest.raises(UserError, match=r"vae/config\.json: scaling_factor is Infinity, and no finite number"):
        open_model(str(own_sd))


def test_keys_given_twice(own_sd):
    file = own_sd / "unet/config.json"
    file.write_text(file.read_text().replace("{", '{"in_channels": 8, ', 1))
    with pytest.raises(UserError, match=r"unet/config\.json is not valid JSON \(in_channels is given twice"):
        open_model(str(own_sd))


def test_values_that_published_models_have(own_sd):
    """Switches that are null, a scheduler's -Infinity, whole numbers for others, keys that nobody reads."""
    for name, values in (("unet/config.json", {"upcast_attention": None, "mid_block_scale_factor": 1, "dropout": 0, "x": [None]}),
                         ("scheduler/scheduler_config.json", {"lambda_min_clipped": -math.inf, "trained_betas": None,
                                                              "solver_type": "midpoint", "algorithm_type": "dpmsolver++"})):
        file = own_sd / name
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
    use(own_sd)


@pytest.mark.parametrize("configs", [SD15, SDXL], ids=["sd15", "sdxl"])
def test_published_configurations(configs, tmp_path):
    for part, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL), ("text_encoder", CLIPTextConfig)):
        check_values(tmp_path, configs[part], kind)


def test_a_list_may_be_empty_where_that_is_the_default(tmp_path):
    """SD3.5 Large has no dual_attention_layers, and says so."""
    check_values(tmp_path, {"dual_attention_layers": []}, SD3Transformer2DModel)
    for value in (0, [[]], [0.5], None):
        with pytest.raises(UserError, match="dual_attention_layers"):
            check_values(tmp_path, {"dual_attention_layers": value}, SD3Transformer2DModel)


def test_weights_that_the_configuration_has_no_place_for(own_sd):
    file = own_sd / "unet/config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"mid_block_type": None}))
    with pytest.raises(UserError, match=r"_model\.safetensors has \d+ weights that its config\.json has no place for"):
        open_model(str(own_sd)).load_denoiser(torch.float32)


@pytest.mark.parametrize("name", ["tokenizer/added_tokens.json", "text_encoder/generation_config.json", "vae/config.json",
                                  "unet/diffusion_pytorch_model.safetensors", "model_index.json"])
def test_named_pipes_in_a_model(own_sd, name):
    (own_sd / name).unlink(missing_ok=True)
    os.mkfifo(own_sd / name)
    with pytest.raises(UserError, match=f"{name}.*named pipe"):
        open_model(str(own_sd))


def test_sdxl_knows_what_decoding_a_grid_takes(sdxl_folder):
    from seppo_fast.planning.encoders import vae_bytes

    weights, decoding = vae_bytes(open_model(str(sdxl_folder)), (4, 8, 8))
    assert weights > 0 and decoding > 0


def test_text_encoders_of_sdxl_that_differ(own_sdxl):
    file = own_sdxl / "tokenizer_2/tokenizer_config.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps(whole | {"model_max_length": 40}))
    with pytest.raises(UserError, match=r"prompts of different lengths \(77 and 40 tokens\)"):
        open_model(str(own_sdxl))
    file.write_text(json.dumps(whole | {"eos_token": "x"}))
    with pytest.raises(UserError, match=r"tokenizer_2: its token for a prompt's end has the number \d+, and text_encoder_2's"):
        open_model(str(own_sdxl))


def test_wide_models_are_not_taken_for_narrow_ones(tmp_path, own_sd):
    """What was tried is remembered by its configuration."""
    open_model(str(own_sd))
    wide = tiny_sd(tmp_path / "wide", block_out_channels=(64, 64))
    open_model(str(wide))
    shutil.copy(wide / "unet/config.json", own_sd / "unet/config.json")
    with pytest.raises(UserError, match="has the shape"):
        open_model(str(own_sd))
