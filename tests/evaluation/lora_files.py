"""LoRA files as people have them, and the same change merged into weights by hand."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from seppo_fast.evaluation.candidates import Candidate, open_candidates
from seppo_fast.models import Model

RANK, ALPHA = 2, 6.0
PROMPTS = ["a red cat", ""]
Layers = dict[str, tuple[Tensor, Tensor]]  # component and layer -> A, B
LAYERS = {"unet": ("attn1.to_q", "attn2.to_v", "attn1.to_out.0"), "transformer": ("attn.to_q", "attn.to_out.0", "ff.net.2")}


def layers(model: Model, text: bool = True) -> Layers:
    """A LoRA on some layers of the network and of each CLIP text encoder."""
    generator = torch.Generator().manual_seed(0)
    made = {}

    def add(part: str, module: nn.Module, endings: tuple[str, ...]) -> None:
        for name, layer in module.named_modules():
            if name.endswith(endings):
                made[f"{part}.{name}"] = (torch.randn(RANK, layer.in_features, generator=generator),
                                          torch.randn(layer.out_features, RANK, generator=generator))

    add(model.denoiser, model.load_denoiser(torch.float32), LAYERS[model.denoiser])
    if text:
        model.load_text("cpu", adapt=lambda part, encoder: add(part, encoder, ("self_attn.q_proj", "self_attn.out_proj")))
    return made


def merge(made: Layers, part: str, module: nn.Module, scale: float) -> None:
    for name, (down, up) in made.items():
        if name.startswith(f"{part}."):
            module.get_submodule(name.removeprefix(f"{part}.")).weight.data += scale * up @ down


def peft(made: Layers) -> dict[str, Tensor]:
    return {f"{name}.lora_{which}.weight": value for name, pair in made.items() for which, value in zip("AB", pair, strict=True)}


def old_diffusers(made: Layers) -> dict[str, Tensor]:
    """As diffusers saved it before it used PEFT."""
    return {f"{name}.{'lora' if name.startswith(('unet', 'transformer')) else 'lora_linear_layer'}.{which}.weight": value
            for name, pair in made.items() for which, value in zip(("down", "up"), pair, strict=True)}


def kohya(made: Layers) -> dict[str, Tensor]:
    """lora_unet_..., lora_te_ or lora_te1_ and lora_te2_, an alpha beside each; the text encoder as it was called for years."""
    two = any(name.startswith("text_encoder_2.") for name in made)
    found = {}
    for name, (down, up) in made.items():
        part, layer = name.split(".", 1)
        prefix = {"unet": "unet", "text_encoder": "te1" if two else "te", "text_encoder_2": "te2"}[part]
        if part != "unet" and not layer.startswith("text_model."):
            layer = f"text_model.{layer}"
        stem = f"lora_{prefix}_{layer.replace('.', '_')}"
        found |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(ALPHA)}
    return found


def with_alphas(made: Layers) -> dict[str, Tensor]:
    return peft(made) | {f"{name}.alpha": torch.tensor(ALPHA) for name in made}


def candidate(model: Model, tensors: dict[str, Tensor], folder: Path, **metadata: str) -> Candidate:
    """The model with this LoRA, as --models opens it."""
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "mine.safetensors",
              metadata={"format": "pt"} | metadata)
    return open_candidates([f"tuned={model.path}+{folder / 'mine.safetensors'}"], None, None, 16)[0]


def predicted(model: Model, denoiser: nn.Module, conditions: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(1)
    return model.denoise(denoiser, torch.randn(len(PROMPTS), model.latent_channels, 8, 8), torch.tensor([3, 700]), conditions)


@torch.no_grad()
def check_as_merged(model: Model, tuned: Candidate, made: Layers, scale: float, text: bool, told: str, least: float) -> None:
    """The conditions and the network's answer are those of weights with `made` merged into them, and differ from the model's.

    `told` is the condition that tells whether text encoders changed; the answer differs by `least` at least.
    """
    denoiser, plain = model.load_denoiser(torch.float32).eval(), model.load_text("cpu")(PROMPTS)
    before = predicted(model, denoiser, plain)
    merge(made, model.denoiser, denoiser, scale)
    wanted = model.load_text("cpu", adapt=lambda part, encoder: merge(made, part, encoder, scale))(PROMPTS)
    conditions = tuned.load_text(torch.device("cpu"))(PROMPTS)
    for name, value in wanted.items():
        torch.testing.assert_close(conditions[name], value, rtol=1e-4, atol=1e-5)
    assert torch.equal(plain[told], wanted[told]) != text, "the text encoders' part is seen"
    got = predicted(model, tuned.load_denoiser(torch.float32), conditions)
    torch.testing.assert_close(got, predicted(model, denoiser, wanted), rtol=1e-4, atol=1e-4)
    assert (got - before).abs().max() > least
