"""A LoRA run of an improvement model: its folder is a pix2pix pipeline that its card's lines load and use."""

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from edits import call, images
from outcomes import rows
from PIL import Image
from safetensors.torch import load_file

from seppo_fast.config import Lora
from seppo_fast.models import open_model
from seppo_fast.models.lora import choose_trained

LORA = {"rank": 2, "alpha": 8.0}


def test_a_lora_run(settings: Any, train: Any, sd: Path, pickapic: Path, tmp_path: Path) -> None:
    raw = settings(**{"seppo.method": "improvement", "seppo.data.source": str(pickapic), "seppo.model.lora": LORA,
                      "seppo.data.cache_dir": str(tmp_path / "cache")})
    run = train(raw)
    checkpoint = max((run / "checkpoints").iterdir())
    card, weights = (run / "final" / "README.md").read_text(), load_file(checkpoint / "policy.safetensors")
    assert weights["conv_in.weight"].shape[1] == 8 and weights["conv_in.weight"][:, 4:].abs().max() > 0
    assert len(rows(run)) == 4 and all(".lora_" in name or name.startswith("conv_in.") for name in weights)

    assert "tags: [image-to-image, stable-diffusion, seppo, preference-optimization, lora]" in card
    assert "trained on preference pairs to improve a given picture by seppo_fast" in card
    assert "to be loaded with diffusers' `from_pretrained`; the LoRA is merged into the UNet" in card
    assert "12 preference pairs from" in card and "choose:" not in card and "load_lora_weights" not in card
    Image.effect_noise((20, 24), 90).convert("RGB").save(tmp_path / "picture.png")
    found: dict[str, Any] = {}
    lines = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]  # type: ignore[index]
    assert "guidance_scale=3.5, image_guidance_scale=3.0" in lines
    for name, value in {"FOLDER": str(run / "final"), "PICTURE": str(tmp_path / "picture.png"), "PROMPT": "a cat"}.items():
        lines = lines.replace(name, repr(value))
    exec(lines.replace("image=picture,", "image=picture, num_inference_steps=2,"), found)
    assert type(found["pipeline"]) is StableDiffusionInstructPix2PixPipeline and found["improved"].size == (16, 16)

    model = open_model(str(sd), image_condition=True)
    policy = model.load_denoiser(torch.float32)
    choose_trained(policy, Lora(**LORA), seed=0)
    assert not policy.load_state_dict(weights, strict=False).unexpected_keys
    theirs = call(model, found["pipeline"].unet, images())
    torch.testing.assert_close(theirs, call(model, policy, images()), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(theirs, call(model, model.load_denoiser(torch.float32), images()), atol=1e-3)

    again = train(settings(**{"seppo.method": "improvement", "seppo.data.source": str(pickapic), "seppo.model.lora": LORA,
                              "seppo.data.cache_dir": str(tmp_path / "cache"), "seppo.output_dir": str(tmp_path / "again"),
                              "seppo.iterations": 1, "seppo.updates_per_iteration": 1,
                              "seppo.model.start_from": str(checkpoint)}))
    assert "Training began with the policy of" in (again / "final" / "README.md").read_text()
