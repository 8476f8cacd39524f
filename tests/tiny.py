"""Tiny random diffusers pipelines on disk, made in about a second: what SD-1.5 and SDXL directories look like."""

import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    MotionAdapter,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNetMotionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

WORDS = ("a", "photo", "of", "the", "handwritten", "zero", "one", "two", "three", "red", "blue", "cat", "dog", "sky")
PIXELS, LATENTS = 16, (4, 8, 8)
CLIP_PIXELS, CLIP_WIDTH = 28, 24
# Three residual blocks and one transformer, for as little work as there is: hundreds of runs train it. Two channels in a group: a
# norm of one takes away what the bias before it adds, that bias's gradient is rounding alone, and Adam makes steps of it.
NARROW = dict(block_out_channels=(8,), mid_block_type=None, norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D",),
              up_block_types=("UpBlock2D",))
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def tokenizer(pad: str = EOS) -> CLIPTokenizer:
    """A CLIP byte-level BPE: every byte, and the merges that make each of WORDS one token; 77 tokens at most."""
    symbols = sorted(ByteLevel.alphabet())
    tokens = symbols + [symbol + "</w>" for symbol in symbols]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        prefix = pieces[0]
        for piece in pieces[1:]:
            if (prefix, piece) not in merges:
                merges.append((prefix, piece))
                tokens.append(prefix + piece)
            prefix += piece
    tokens += [BOS, EOS]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad, model_max_length=77)


def text_config(tokens: CLIPTokenizer, width: int, projection: int, act: str = "quick_gelu") -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=77, projection_dim=projection, hidden_act=act,
        bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id,
    )


def unet(**overrides) -> UNet2DConditionModel:
    settings = dict(
        sample_size=LATENTS[1], in_channels=LATENTS[0], out_channels=LATENTS[0], block_out_channels=(32, 64),
        layers_per_block=1, norm_num_groups=8, attention_head_dim=4, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return UNet2DConditionModel(**settings | overrides)


def vae(scaling_factor: float, force_upcast: bool, **overrides) -> AutoencoderKL:
    """Two levels, so that 16x16 pixels become 8x8 latents."""
    return AutoencoderKL(
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, latent_channels=LATENTS[0],
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=PIXELS, scaling_factor=scaling_factor, force_upcast=force_upcast, **overrides,
    )


def schedule(prediction_type: str) -> dict:
    """The noise schedule of SD-1.5 and of SDXL."""
    return dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
                steps_offset=1, prediction_type=prediction_type)


def tiny_sd(folder: Path | str, prediction_type: str = "epsilon", seed: int = 0, **unet_overrides) -> Path:
    """A random `StableDiffusionPipeline` directory: 16x16 pixels, (4, 8, 8) latents, prompt embeds (77, 32)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokens = tokenizer()
        pipeline = StableDiffusionPipeline(
            vae=vae(0.18215, False), text_encoder=CLIPTextModel(text_config(tokens, 32, 32)), tokenizer=tokens,
            unet=unet(**unet_overrides),
            scheduler=PNDMScheduler(**schedule(prediction_type), skip_prk_steps=True, set_alpha_to_one=False),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )
        pipeline.save_pretrained(folder)
    return Path(folder)


def tiny_sdxl(folder: Path | str, prediction_type: str = "epsilon", seed: int = 0, **unet_overrides) -> Path:
    """A random `StableDiffusionXLPipeline` directory: (4, 8, 8) latents, prompt embeds (77, 32 + 48), pooled (40)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, second = tokenizer(), tokenizer(pad="!")
        network = dict(
            cross_attention_dim=80, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=40 + 6 * 8, use_linear_projection=True,
            transformer_layers_per_block=(1, 1), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )
        pipeline = StableDiffusionXLPipeline(
            vae=vae(0.13025, True), text_encoder=CLIPTextModel(text_config(first, 32, 32)), tokenizer=first,
            text_encoder_2=CLIPTextModelWithProjection(text_config(second, 48, 40, act="gelu")), tokenizer_2=second,
            unet=unet(**network | unet_overrides),
            scheduler=EulerDiscreteScheduler(**schedule(prediction_type), timestep_spacing="leading"),
            force_zeros_for_empty_prompt=True, add_watermarker=False,
        )
        pipeline.save_pretrained(folder)
    return Path(folder)


def tiny_pix2pix(folder: Path | str, name: str = "sd", seed: int = 0, **overrides) -> Path:
    """A random InstructPix2Pix pipeline's directory of the shapes of `tiny_sd` or `tiny_sdxl`; its network sees the image."""
    make, kind = {"sd": (tiny_sd, StableDiffusionInstructPix2PixPipeline),
                  "sdxl": (tiny_sdxl, StableDiffusionXLInstructPix2PixPipeline)}[name]
    with tempfile.TemporaryDirectory() as parts:
        source = make(parts, seed=seed, **{"in_channels": 2 * LATENTS[0]} | overrides)
        kind.from_pretrained(source).save_pretrained(folder)
    return Path(folder)


def tiny_improvement(folder: Path | str, source: Path, seed: int = 3) -> Path:
    """A random InstructPix2Pix pipeline's directory with a NARROW network and the encoders of the `tiny_sd` in `source`."""
    return take_encoders(tiny_pix2pix(folder, seed=seed, **NARROW), source)


def take_encoders(folder: Path, source: Path) -> Path:
    """Give a pipeline's directory the VAE and the text encoder of another's."""
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.rmtree(folder / part)
        shutil.copytree(source / part, folder / part)
    return folder


def tiny_adapter(folder: Path | str, seed: int = 0, **overrides) -> Path:
    """A random motion adapter's directory for `unet()`, with positions for 8 frames."""
    settings = dict(block_out_channels=(32, 64), motion_layers_per_block=1, motion_norm_num_groups=8, motion_num_attention_heads=4,
                    motion_max_seq_length=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 100)
        MotionAdapter(**settings | overrides).save_pretrained(folder)
    return Path(folder)


def tiny_animatediff(folder: Path | str, seed: int = 0, channels: tuple[int, ...] = (32, 64), **unet_overrides) -> Path:
    """A random `AnimateDiffPipeline` directory, of `tiny_sd` and `tiny_adapter`: up to 8 frames of 16x16, (4, F, 8, 8) latents."""
    with tempfile.TemporaryDirectory() as parts:
        image = StableDiffusionPipeline.from_pretrained(tiny_sd(Path(parts) / "sd", seed=seed, block_out_channels=channels,
                                                                **unet_overrides), safety_checker=None)
        adapter = MotionAdapter.from_pretrained(tiny_adapter(Path(parts) / "adapter", seed, block_out_channels=channels))
    with torch.random.fork_rng(devices=[]):
        unet = UNetMotionModel.from_unet2d(image.unet, adapter)
    scheduler = DDIMScheduler(**schedule("epsilon") | {"beta_schedule": "linear"}, clip_sample=False, timestep_spacing="linspace",
                              set_alpha_to_one=False)
    AnimateDiffPipeline(vae=image.vae, text_encoder=image.text_encoder, tokenizer=image.tokenizer, unet=unet,
                        motion_adapter=adapter, scheduler=scheduler).save_pretrained(folder)
    return Path(folder)


def tiny_clip(folder: Path, pad: str = "<|endoftext|>", end: int | None = None) -> Path:
    """A folder as published: CLIP with weights large enough to tell pictures apart, and its tokenizer."""
    words = tokenizer(pad)
    torch.manual_seed(1)
    model = CLIPModel(CLIPConfig(
        text_config=dict(vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         hidden_act="gelu", bos_token_id=words.bos_token_id, eos_token_id=end or words.eos_token_id),
        vision_config=dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, hidden_act="gelu",
                           image_size=CLIP_PIXELS, patch_size=7),
        projection_dim=CLIP_WIDTH,
    ))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def t5_tokenizer() -> T5TokenizerFast:
    """A T5 tokenizer of WORDS and letters; 512 tokens at most."""
    pieces = ["<pad>", "</s>", "<unk>", *("\u2581" + word for word in WORDS), "\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = [(piece, -float(number)) for number, piece in enumerate(pieces)]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512)


def t5(tokens: T5TokenizerFast, width: int) -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=len(tokens), d_model=width, d_kv=8, d_ff=2 * width, num_layers=1, num_heads=2))


def flow_vae(scaling_factor: float, shift_factor: float) -> AutoencoderKL:
    """As `vae`, with the shift and without the extra convolutions that the flow models' VAEs have."""
    return vae(scaling_factor, False, shift_factor=shift_factor, use_quant_conv=False, use_post_quant_conv=False)


def tiny_sd3(folder: Path | str, seed: int = 0, t5_width: int = 64, shift: float = 3.0, **overrides) -> Path:
    """A random `StableDiffusion3Pipeline` directory: 16x16 pixels, (4, 8, 8) latents, prompt embeds (77 + 256, 64), pooled (56)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, second, third = tokenizer(), tokenizer(pad="!"), t5_tokenizer()
        settings = dict(
            sample_size=LATENTS[1], patch_size=2, in_channels=LATENTS[0], out_channels=LATENTS[0], num_layers=2,
            attention_head_dim=8, num_attention_heads=2, joint_attention_dim=t5_width, caption_projection_dim=16,
            pooled_projection_dim=16 + 40, pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,),
        )
        pipeline = StableDiffusion3Pipeline(
            vae=flow_vae(1.5305, 0.0609), tokenizer=first, tokenizer_2=second, tokenizer_3=third,
            text_encoder=CLIPTextModelWithProjection(text_config(first, 16, 16)),
            text_encoder_2=CLIPTextModelWithProjection(text_config(second, 48, 40, act="gelu")),
            text_encoder_3=t5(third, t5_width), transformer=SD3Transformer2DModel(**settings | overrides),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        )
        pipeline.save_pretrained(folder)
    return Path(folder)


def tiny_flux(folder: Path | str, seed: int = 0, dynamic: bool = True, **overrides) -> Path:
    """A random `FluxPipeline` directory: 16x16 pixels, (4, 8, 8) latents, prompt embeds (512, 32), pooled (16)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, second = tokenizer(), t5_tokenizer()
        settings = dict(
            patch_size=1, in_channels=4 * LATENTS[0], num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
        )
        pipeline = FluxPipeline(
            vae=flow_vae(0.3611, 0.1159), tokenizer=first, tokenizer_2=second, text_encoder_2=t5(second, 32),
            text_encoder=CLIPTextModel(text_config(first, 16, 16)), transformer=FluxTransformer2DModel(**settings | overrides),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if dynamic else 1.0, use_dynamic_shifting=dynamic),
        )
        pipeline.save_pretrained(folder)
    return Path(folder)
