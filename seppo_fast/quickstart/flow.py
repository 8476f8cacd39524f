"""The base of `--model flow`: a complete, tiny Stable Diffusion 3 pipeline directory, a flow that learns from the same crawl."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

from seppo_fast.models.latents import LatentScale
from seppo_fast.quickstart.base import Recipe, encode_all, new_vae, train_denoiser, train_text_encoder, train_vae
from seppo_fast.quickstart.digits import CAPTIONS, RESOLUTION, sloppy_crawl, split_digits
from seppo_fast.quickstart.fitting import make_once, new_text_encoder
from seppo_fast.quickstart.tokenizer import new_t5_tokenizer, train_tokenizer

# Of a prompt, for each encoder; a caption has five. With 77 and 256, as the published models have, a step takes ten times as long.
TOKENS = 8
RECIPE = Recipe(denoiser_steps=1200, denoiser_lr=1e-3)


def make_base(folder: Path, recipe: Recipe) -> bool:
    """Build the pipeline directory unless `folder` holds the result of this recipe and code; True when it was built."""
    return make_once(folder, recipe, ("flow.py", "base.py", "fitting.py", "digits.py", "tokenizer.py"), train_base)


def train_base(recipe: Recipe) -> StableDiffusion3Pipeline:
    """VAE, CLIP text encoders and transformer trained on the sloppy crawl. T5 keeps its first weights, which tell words apart."""
    digits, _ = split_digits(recipe.seed)
    crawl = sloppy_crawl(digits, recipe.seed, recipe.copies, recipe.wrong_captions, recipe.degraded)
    tokenizer, t5_tokenizer = train_tokenizer(CAPTIONS, length=TOKENS), new_t5_tokenizer(CAPTIONS, TOKENS)
    # Only the networks' initial weights are drawn from torch's global generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        vae, transformer = new_vae(), new_transformer()
        first, second = (new_text_encoder(tokenizer, CLIPTextModelWithProjection) for _ in range(2))
        t5 = T5EncoderModel(T5Config(vocab_size=len(t5_tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4))
    train_vae(vae, crawl.pixels, recipe)
    for name, text in (("text", first), ("text 2", second)):
        train_text_encoder(text, tokenizer, crawl, recipe, name)
    latents = encode_all(vae, crawl)
    scale_latents(vae, latents)
    pipeline = StableDiffusion3Pipeline(
        vae=vae.eval(), transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder=first.eval(),
        text_encoder_2=second.eval(), text_encoder_3=t5.eval(), tokenizer=tokenizer, tokenizer_2=tokenizer,
        tokenizer_3=t5_tokenizer,
    )
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt([*CAPTIONS, ""], None, None, do_classifier_free_guidance=False,
                                                      max_sequence_length=TOKENS)
    scale = LatentScale(vae.config.scaling_factor, vae.config.shift_factor)
    train_transformer(transformer, embeds, pooled, scale.scaled(latents), crawl.labels, recipe)
    transformer.eval()
    return pipeline


def new_transformer() -> SD3Transformer2DModel:
    """1.3 million parameters; a token is 2x2 latents, so that a picture has 16 tokens."""
    return SD3Transformer2DModel(
        sample_size=RESOLUTION // 2, patch_size=2, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=24,
        num_attention_heads=4, caption_projection_dim=96, joint_attention_dim=64, pooled_projection_dim=64, pos_embed_max_size=8,
    )


def scale_latents(vae: AutoencoderKL, latents: Tensor) -> None:
    """Write into the VAE's configuration what makes the latents' mean 0 and their deviation 1, as the flow models' VAEs have it."""
    vae.register_to_config(shift_factor=round(float(latents.mean()), 5), scaling_factor=round(1 / float(latents.std()), 5))


def train_transformer(
    transformer: SD3Transformer2DModel, embeds: Tensor, pooled: Tensor, latents: Tensor, labels: Tensor, recipe: Recipe,
) -> None:
    """Train the velocity at logit-normal times; `embeds` and `pooled` are of the ten captions and, last, the empty one."""
    def times(random: torch.Generator) -> Tensor:
        return torch.sigmoid(torch.randn(recipe.batch_size, generator=random))

    def loss(clean: Tensor, noise: Tensor, sigmas: Tensor, captions: Tensor) -> Tensor:
        noisy = torch.lerp(clean, noise, sigmas.view(-1, 1, 1, 1))
        velocity = transformer(noisy, timestep=1000 * sigmas, encoder_hidden_states=embeds[captions],
                               pooled_projections=pooled[captions], return_dict=False)[0]
        return F.mse_loss(velocity, noise - clean)

    train_denoiser(transformer, latents, labels, times, loss, recipe, "transformer")
