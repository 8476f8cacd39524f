"""What the families share: loading components, encoding and decoding, the noise schedule, and checks that components fit."""

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, ModelMixin, SchedulerMixin, UNet2DConditionModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from seppo_fast.errors import UserError, few, reason
from seppo_fast.models.contract import Adapt, Vae
from seppo_fast.models.directory import Directory, kind_of
from seppo_fast.models.finite import check_finite
from seppo_fast.models.latents import LatentScale
from seppo_fast.models.pix2pix import has_image_condition, widen
from seppo_fast.models.quantize import quantize
from seppo_fast.models.values import ADVICE, check_values

TOKENS = 77  # of a prompt, in all published models
PREDICTIONS = ("epsilon", "v_prediction")
SCHEDULE_KEYS = {"beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr", "prediction_type",
                 "num_train_timesteps"}


def alphas_cumprod(scheduler_config: dict[str, Any]) -> Tensor:
    """The noise schedule's cumulative alphas, (T,) fp32, with `rescale_betas_zero_snr` where it is set."""
    return DDPMScheduler.from_config(scheduler_config).alphas_cumprod.float()


def check_schedule(directory: Directory) -> None:
    """Refuse schedules that have no betas (flow matching, EDM) and predictions other than epsilon and v."""
    config, file = directory.configs["scheduler"], directory.path / "scheduler" / "scheduler_config.json"
    if not ({"beta_start", "trained_betas"} & config.keys()):
        raise UserError(f"{file}: {config.get('_class_name')} has no beta schedule (beta_start, beta_end); "
                        "only DDPM-like noise schedules can be trained.")
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise UserError(f"{file}: prediction_type is {prediction!r}; it must be {' or '.join(PREDICTIONS)}.")
    check_values(file, config, DDPMScheduler)
    if config.get("use_flow_sigmas"):
        raise UserError(f"{file}: use_flow_sigmas is set, which makes a flow of a schedule with betas; remove it.")
    check_noise(config, file)
    value = directory.index.get("scheduler")
    name = (value[1] if isinstance(value, list) else None) or config.get("_class_name")
    if name is not None:
        check_reading(str(name), config, file)


def check_noise(config: dict[str, Any], file: Path) -> None:
    """Refuse betas that make no noise schedule, or a schedule that does not add noise from step to step."""
    try:
        alphas = alphas_cumprod(config)
    except Exception as error:  # the configuration is the only input
        raise UserError(f"{file}: no noise schedule can be made of it ({reason(error)}). {ADVICE}.") from error
    if not (alphas.isfinite().all() and (alphas.diff() < 0).all() and 0 < alphas[0] < 1 and alphas[-1] >= 0):
        raise UserError(f"{file}: its betas (beta_start {config.get('beta_start')}, beta_end {config.get('beta_end')},"
                        f" trained_betas) make no noise schedule; each must lie between 0 and 1. {ADVICE}.")
    if len(alphas) != (steps := config.get("num_train_timesteps", 1000)):
        raise UserError(f"{file}: trained_betas has {len(alphas)} values, and num_train_timesteps is {steps}. {ADVICE}.")


def check_reading(name: str, config: dict[str, Any], file: Path) -> None:
    """Refuse a schedule that the pipeline's scheduler, the class `name`, reads differently from training, which reads DDPM's."""
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise UserError(f"{file}: diffusers {diffusers.__version__} has no scheduler {name}, so its noise schedule is not known;"
                        " name another class there and in model_index.json.")
    check_values(file, config, kind)
    try:
        own = getattr(kind.from_config(config), "alphas_cumprod", None)
    except Exception as error:  # the configuration is the only input
        raise UserError(f"{file}: {name} cannot be made of it: {reason(error)}") from error
    if own is None:
        raise UserError(f"{file}: {name} has no DDPM-like noise schedule, which training needs; name another class there and in"
                        " model_index.json.")
    ignored = sorted(key for key in SCHEDULE_KEYS & config.keys() - inspect.signature(kind).parameters.keys() if config[key])
    ours = alphas_cumprod(config)
    # Some schedulers keep the last alpha of rescale_betas_zero_snr a little above 0.
    if "prediction_type" in ignored or len(own) != len(ours) or not torch.allclose(own.float(), ours, rtol=1e-4, atol=1e-6):
        why = f" (it does not know {', '.join(ignored)})" if ignored else ""
        raise UserError(f"{file}: {name} makes another noise schedule of these values than training would{why}, so that the model"
                        " would be trained at other noise levels than it is used at. Remove the keys that it ignores, or name a"
                        " class that follows them (DDIMScheduler) there and in model_index.json.")


def check_unet(directory: Directory, text_width: int, addition: str | None) -> None:
    """Refuse a UNet whose channels, text width or extra conditions are not those of a text-to-image pipeline."""
    unet, vae = directory.configs["unet"], directory.configs["vae"]
    file = directory.path / "unet" / "config.json"
    latents = vae.get("latent_channels", 4)
    edits = has_image_condition(directory)
    for key, wanted in (("in_channels", 2 * latents if edits else latents), ("out_channels", latents)):
        channels = unet.get(key, 4)
        if channels != wanted:
            hint = {9: " (inpainting)", 8: " (image editing, or a predicted variance)"}.get(channels, "")
            kind = f"{directory.index['_class_name']} models" if edits else "text-to-image models"
            raise UserError(f"{file}: {key} is {channels}{hint}, but the VAE's latents have {latents} channels, so that {wanted}"
                            f" are needed. Only {kind} can be trained.")
    widths = unet.get("cross_attention_dim", 1280)
    if any(width != text_width for width in (widths if isinstance(widths, list) else [widths])):
        raise UserError(f"{file}: cross_attention_dim is {widths}, but the text encoding is {text_width} wide. "
                        "UNet and text encoder(s) come from different models.")
    expected = {"addition_embed_type": addition, "time_cond_proj_dim": None, "class_embed_type": None,
                "num_class_embeds": None, "encoder_hid_dim": None}
    for key, value in expected.items():
        if unet.get(key) != value:
            raise UserError(f"{file}: {key} is {unet.get(key)!r} where this family has {value!r}; "
                            "such a model is not supported.")
    check_scaling(directory, ("latents_mean", "latents_std", "shift_factor"), "a scaling_factor is")


def check_scaling(directory: Directory, ignored: Sequence[str], supported: str) -> None:
    """Refuse a VAE whose latents are scaled by what the pipelines of this kind ignore; `supported` is what they follow."""
    for key in ignored:
        if directory.configs["vae"].get(key) not in (None, 0):
            raise UserError(f"{directory.path / 'vae' / 'config.json'}: {key} is set, which this family's pipelines ignore; "
                            f"only {supported} supported.")


@contextlib.contextmanager
def explained(directory: Directory, component: str) -> Iterator[None]:
    """Turn whatever a library raises while it loads a component into a message that names it; without progress bars."""
    try:
        with without_bars():
            yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # libraries may raise anything about a damaged file
        raise UserError(f"cannot load {directory.path / component}: {reason(error)}") from error


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """No progress bars of transformers."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


def load_component(directory: Directory, component: str, kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    """A component from disk, on the CPU, in `dtype`; every weight must come from the files."""
    weights = directory.weights[component]
    precision = {"torch_dtype" if issubclass(kind, ModelMixin) else "dtype": dtype}  # diffusers, transformers
    with explained(directory, component):
        module, info = kind.from_pretrained(
            directory.path / component, variant=weights.variant, use_safetensors=weights.safetensors,
            local_files_only=True, output_loading_info=True, **precision,
        )
    missing = sorted(info["missing_keys"])
    if missing:  # the libraries only warn, and leave these random or on the meta device
        raise UserError(f"{directory.path / component / weights.entry} lacks {len(missing)} weights that its "
                        f"config.json calls for, e.g. {', '.join(missing[:3])}. Fetch the model again.")
    unexpected = info["unexpected_keys"] if issubclass(kind, ModelMixin) else ()  # a text encoder's file may hold more
    if unexpected:
        raise UserError(f"{directory.path / component / weights.entry} has {len(unexpected)} weights that its config.json has no"
                        f" place for, e.g. {few(unexpected)}. {ADVICE}.")
    check_finite(directory.path / component / weights.entry, module.named_parameters(), "Fetch the model again, or take another.")
    return module


def load_text_encoder(directory: Directory, component: str, device: torch.device | str, dtype: torch.dtype, adapt: Adapt
                      ) -> nn.Module:
    """A text encoder for inference on `device`, quantized where the directory says so; `adapt` changes it before it moves."""
    encoder = load_component(directory, component, kind_of(directory.index[component][1]), dtype)
    if directory.quantize_text:
        quantize(encoder, directory.quantize_text, device, dtype)
    adapt(component, encoder)
    return encoder.to(device).eval().requires_grad_(False)


def load_unet(directory: Directory, dtype: torch.dtype) -> UNet2DConditionModel:
    """The UNet from disk; with new input channels where the directory was given an image condition that its file has not."""
    unet = load_component(directory, "unet", UNet2DConditionModel, dtype)
    if directory.configs["unet"].get("in_channels", 4) != unet.config.in_channels:
        widen(unet)
    return unet


def empty_unet(directory: Directory) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_config(dict(directory.configs["unet"]))


def empty_text_encoder(directory: Directory, part: str) -> nn.Module:
    kind = kind_of(directory.index[part][1])
    return kind(kind.config_class.from_dict(directory.configs[part]))


def load_vae(directory: Directory, kind: type[nn.Module], device: torch.device | str) -> Vae:
    """The VAE in fp32, whatever the files hold: SDXL's overflows in half precision."""
    return load_component(directory, "vae", kind, torch.float32).to(device).eval().requires_grad_(False)


def load_tokenizer(directory: Directory, component: str) -> PreTrainedTokenizerBase:
    kind = kind_of(directory.index[component][1])
    with explained(directory, component):
        return kind.from_pretrained(directory.path / component, local_files_only=True)


def text_config(directory: Directory, part: str, kind: Any) -> Any:
    """The configuration of a text encoder, a `kind`, with its class's values for what the file leaves out."""
    with explained(directory, part):
        return kind.config_class.from_dict(directory.configs[part])


def check_vocabulary(directory: Directory, encoder: str, pooled: bool = False, most: int = TOKENS) -> int:
    """How many tokens of a prompt the encoder sees. Refuses a tokenizer of another model, which does not fit the encoder.

    `pooled`: the encoder's embedding of a prompt's end is used. `most`: where the encoder has no number of positions (T5).
    """
    tokenizer = encoder.replace("text_encoder", "tokenizer")
    if not directory.weights:  # a model whose shape alone is known
        return most
    own = text_config(directory, encoder, kind_of(directory.index[encoder][1]))
    embedded = own.get_text_config().vocab_size  # the class's where none is given
    loaded = load_tokenizer(directory, tokenizer)
    place = directory.path / tokenizer
    if not isinstance(loaded.model_max_length, int) or loaded.model_max_length < 3:
        raise UserError(f"{place}: its model_max_length is {loaded.model_max_length!r}, where the number of tokens of a prompt, 77,"
                        f" is expected. {ADVICE}.")
    largest = max(loaded.get_vocab().values(), default=-1)
    if largest >= embedded:
        word = next(token for token, number in loaded.get_vocab().items() if number == largest)
        raise UserError(f"{place}: its token {word!r} has the number {largest}, but {encoder} has embeddings for {embedded} tokens,"
                        f" 0 to {embedded - 1}. Tokenizer and text encoder come from different models.")
    if loaded.pad_token_id is None:
        raise UserError(f"{place}: it has no pad_token to fill prompts up with; take the published model's tokenizer.")
    end = directory.configs[encoder].get("eos_token_id", 49407)
    # The pooled embedding is read at this token. The published models have 2, which stands for the token of the largest number.
    if pooled and end not in (2, loaded.eos_token_id):
        raise UserError(f"{place}: its token for a prompt's end has the number {loaded.eos_token_id}, and {encoder}'s"
                        f" eos_token_id is {end}. Tokenizer and text encoder come from different models.")
    return most_tokens(loaded, directory.configs[encoder].get("max_position_embeddings", most))


def check_lengths(directory: Directory, tokens: Mapping[str, int]) -> None:
    """Refuse text encoders that see different numbers of `tokens`, where their embeddings lie side by side."""
    if len(set(tokens.values())) > 1:
        seen = " and ".join(map(str, tokens.values()))
        raise UserError(f"{directory.path}: the text encoders see prompts of different lengths ({seen} tokens), and their"
                        " embeddings lie side by side. Look at the tokenizers' model_max_length and the text encoders'"
                        " max_position_embeddings.")


def token_ids(tokenizer: PreTrainedTokenizerBase, text_config: Any, prompts: list[str]) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, (B, 77) on the CPU, truncated and padded as the diffusers pipelines do."""
    length = most_tokens(tokenizer, text_config.max_position_embeddings)
    return tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")


def most_tokens(tokenizer: PreTrainedTokenizerBase, positions: int) -> int:
    """How many tokens of a prompt an encoder with so many positions sees."""
    return min(tokenizer.model_max_length, positions)  # a tokenizer saved without its model_max_length claims 1e30


@torch.no_grad()
def encode(vae: Vae, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels (B, 3, [F,] H, W) in [-1, 1] -> the posterior's mean and standard deviation, (B, C, [F',] h, w) fp32, not scaled."""
    posterior = vae.encode(pixels.to(vae.device, torch.float32)).latent_dist
    return posterior.mean, posterior.std


@torch.no_grad()
def decode(vae: Vae, latents: Tensor, scale: LatentScale) -> Tensor:
    """Latents (B, C, [F',] h, w) in the network's `scale` -> pixels (B, 3, [F,] H, W) fp32 in [0, 1]."""
    pixels = vae.decode(scale.unscaled(latents.to(vae.device, torch.float32)), return_dict=False)[0]
    return (pixels / 2 + 0.5).clamp(0, 1)


def vae_facts(directory: Directory) -> tuple[int, int, LatentScale]:
    """Latent channels, pixels per latent along a side, and how latents are scaled."""
    config = directory.configs["vae"]
    levels = len(config.get("block_out_channels", (64,)))
    scale = LatentScale(config.get("scaling_factor", 0.18215), config.get("shift_factor") or 0.0)
    return config.get("latent_channels", 4), 2 ** (levels - 1), scale


def encoding_files(directory: Directory) -> list[Path]:
    """The files that decide latents and embeddings: VAE, text encoders, tokenizers and the pipeline's index."""
    files = [directory.path / "model_index.json"]
    for component in sorted(directory.index):
        folder = directory.path / component
        if component == "vae" or component.startswith("text_encoder") and component in directory.weights:
            files += [folder / "config.json", *directory.weights[component].files]
        elif component.startswith("tokenizer"):
            files += sorted(file for file in folder.iterdir() if file.is_file())
    return files
