"""Whether an improvement or reference model goes with a policy: the same latents, prompts and noise levels."""

import copy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from seppo_fast.checksums import checksum
from seppo_fast.config import OtherModel
from seppo_fast.errors import UserError
from seppo_fast.models import AnimateDiff, Model, StableDiffusionXL, open_improvement_model, open_model
from seppo_fast.models.common import alphas_cumprod
from seppo_fast.models.labels import OF_IMPROVEMENT, OF_REFERENCE
from seppo_fast.models.schedules import is_flow

PROMPT = "a photograph of a red bicycle in front of a white house"
SAME = 0.01  # of the norm: weights that are stored in half precision make less difference, other weights more


def improvement_model(given: OtherModel, policy: Model | None, device: torch.device | str = "cpu") -> Model:
    """The improvement model that `seppo.improvement` names; it fits the policy's model, if that is given."""
    model = open_improvement_model(str(given.path), revision=given.revision, variant=given.variant, labels=OF_IMPROVEMENT)
    if policy is not None:
        check_improvement_model(model, policy, device)
    return model


def reference_model(given: OtherModel, policy: Model | None, device: torch.device | str = "cpu") -> Model:
    """The model that `seppo.reference_model` names; it fits the policy's model, if that is given."""
    model = open_model(str(given.path), revision=given.revision, variant=given.variant, labels=OF_REFERENCE)
    if policy is not None:
        check_reference_model(model, policy, device)
    return model


def check_improvement_model(model: Model, policy: Model, device: torch.device | str = "cpu") -> None:
    """`UserError` that names all in which the improvement `model` does not fit the policy's model."""
    advice = ("There are no improvement models of videos: train an image model, or by another method" if policy.video else
              'Train an improvement model from the policy\'s own base (method "improvement")')
    _refuse(model, policy, _differences(model, policy, device), advice)


def check_reference_model(model: Model, policy: Model, device: torch.device | str = "cpu") -> None:
    """`UserError` that names all in which the reference `model`, of which the network is used, does not fit the policy's model."""
    if isinstance(policy, AnimateDiff):
        raise UserError(f"{model.directory.labels.path}: {policy.path} is an AnimateDiff, of which only the motion modules are"
                        " trained: policy and reference share all other weights, and no other model can be the reference")
    _refuse(model, policy, _differences(model, policy, device) + _architecture(model, policy),
            "The reference must be a model of the policy's architecture, with its VAE and text encoders")


def network_files(model: Model) -> list[Path]:
    """The files that decide what a model's network answers."""
    return [model.path / model.denoiser / "config.json", *model.directory.weights[model.denoiser].files]


def _refuse(model: Model, policy: Model, problems: list[str], advice: str) -> None:
    if problems:
        raise UserError(f"{model.directory.labels.path}: {model.path} does not fit the policy's model {policy.path}: "
                        f"{'; '.join(problems)}. {advice}")


def _differences(model: Model, policy: Model, device: torch.device | str) -> list[str]:
    """What is to be said of configurations, noise schedule, VAE and text encoders.

    VAE and text encoders are the same where their files are. Otherwise both are loaded, and what counts is whether they make
    the same of a picture and a prompt: a published model's files may be of another format or precision.
    """
    problems = [f"{name} is {_short(own)} and not {_short(other)}" for name, own, other in _facts(model, policy) if own != other]
    problems += _schedule(model, policy)
    return problems + (_encoders(model, policy, device) if model.name == policy.name else [])


def _short(value: object) -> str:
    """A value as text, without the end of one number a channel."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _architecture(model: Model, policy: Model) -> list[str]:
    """What is to be said where the networks have other weights, by name or shape."""
    with torch.device("meta"):
        own, other = ({name: tuple(weight.shape) for name, weight in each.empty_denoiser().state_dict().items()}
                      for each in (model, policy))
    names = [name for name in {**other, **own} if own.get(name) != other.get(name)]
    return [f"its network is another: {len(names)} weights are missing or of another shape, the first {names[0]}"] if names else []


def _facts(model: Model, policy: Model) -> list[tuple[str, object, object]]:
    """What the configurations say that must be equal: its name, the improvement model's value, the policy's."""
    facts: list[tuple[str, object, object]] = [
        ("its kind", model.name, policy.name),
        ("the number of its latent channels", model.latent_channels, policy.latent_channels),
        ("its VAE's pixels a latent", model.vae_scale_factor, policy.vae_scale_factor),
        ("its VAE's scaling_factor", model.latent_scale.factor, policy.latent_scale.factor),
        ("its VAE's shift_factor", model.latent_scale.shift, policy.latent_scale.shift),
        ("its prediction_type", model.prediction_type, policy.prediction_type),
    ]
    own, other = (each.directory.configs[each.denoiser] for each in (model, policy))
    facts.append(("its text width (cross_attention_dim)", own.get("cross_attention_dim"), other.get("cross_attention_dim")))
    if own.get("sample_size") and other.get("sample_size"):
        network = "UNet" if model.denoiser == "unet" else model.denoiser
        facts.append((f"its image size (the {network}'s sample_size)", own["sample_size"], other["sample_size"]))
    if isinstance(model, StableDiffusionXL) and isinstance(policy, StableDiffusionXL):
        facts.append(("its force_zeros_for_empty_prompt", model.zeros_for_empty_prompt, policy.zeros_for_empty_prompt))
    return facts


def _schedule(model: Model, policy: Model) -> list[str]:
    """What is to be said where a time stands for another noise level; a flow's shift only says which times are trained."""
    if any(is_flow(each.scheduler_config) for each in (model, policy)):
        alike = model.num_train_timesteps == policy.num_train_timesteps or model.prediction_type != policy.prediction_type
        return [] if alike else [f"its num_train_timesteps is {model.num_train_timesteps} and not {policy.num_train_timesteps}"]
    own, other = alphas_cumprod(model.scheduler_config), alphas_cumprod(policy.scheduler_config)
    alike = len(own) == len(other) and torch.allclose(own, other, rtol=1e-4, atol=1e-6)
    return [] if alike else ["its noise schedule (scheduler_config.json) has other noise levels"]


def _encoders(model: Model, policy: Model, device: torch.device | str) -> list[str]:
    """What is to be said where latents or embeddings differ."""
    problems = []
    model, policy = map(unquantized, (model, policy))
    own, other = _files(model), _files(policy)
    if own["vae"] != other["vae"] and not _alike(*({"": _latents(each, device)} for each in (model, policy))):
        problems.append("its VAE makes other latents of a picture")
    if own["text"] != other["text"] and not _alike(*(each.load_text(device)([PROMPT]) for each in (model, policy))):
        problems.append("its text encoder or tokenizer makes other embeddings of a prompt")
    return problems


def unquantized(model: Model) -> Model:
    """The model with text encoders of full precision: what quantization changes is no difference between two models."""
    plain = copy.copy(model)
    plain.directory = replace(model.directory, quantize_text=None)
    return plain


def _files(model: Model) -> dict[str, dict[Path, str]]:
    """The checksums of the files that decide latents ("vae") and embeddings ("text")."""
    named = {file.relative_to(model.path): file for file in model.fingerprint_files()}
    parts: dict[str, dict[Path, str]] = {"vae": {}, "text": {}}
    for name, file in named.items():
        if len(name.parts) > 1:  # not model_index.json
            parts["vae" if name.parts[0] == "vae" else "text"][name] = checksum(file)
    return parts


def _latents(model: Model, device: torch.device | str) -> Tensor:
    """The latents of one picture of noise, or a clip of one frame."""
    side = 8 * model.vae_scale_factor
    picture = 2 * torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) - 1
    return model.encode(model.load_vae(device), picture[:, None] if model.video else picture)[0]


def _alike(own: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(own[name].shape == value.shape and bool((own[name] - value).norm() <= SAME * value.norm())
               for name, value in other.items())
