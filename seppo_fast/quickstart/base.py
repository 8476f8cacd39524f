"""The base model: a complete, tiny Stable Diffusion pipeline directory, trained here on a crawl with faults."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from seppo_fast.quickstart.digits import CAPTIONS, RESOLUTION, Digits, sloppy_crawl, split_digits
from seppo_fast.quickstart.fitting import fit, make_once, new_text_encoder, token_ids, vae_loss
from seppo_fast.quickstart.tokenizer import train_tokenizer
from seppo_fast.seeds import generator


@dataclass(frozen=True)
class Recipe:
    """How the base is made. `wrong_captions` and `degraded` are shares of the crawl, and the base's faults."""

    seed: int = 0
    copies: int = 4
    wrong_captions: float = 0.3
    degraded: float = 0.4
    vae_steps: int = 240
    denoiser_steps: int = 700
    batch_size: int = 64
    text_steps: int = 500
    vae_lr: float = 4e-3
    text_lr: float = 6e-3
    kl_weight: float = 1e-3
    denoiser_lr: float = 1.5e-3
    caption_dropout: float = 0.1


def make_base(folder: Path, recipe: Recipe) -> bool:
    """Build the pipeline directory unless `folder` holds the result of this recipe and code; True when it was built."""
    return make_once(folder, recipe, ("base.py", "fitting.py", "digits.py", "tokenizer.py"), train_base)


def train_base(recipe: Recipe) -> StableDiffusionPipeline:
    """A pipeline trained on the sloppy crawl."""
    digits, _ = split_digits(recipe.seed)
    crawl = sloppy_crawl(digits, recipe.seed, recipe.copies, recipe.wrong_captions, recipe.degraded)
    return train_on(crawl, crawl.pixels, recipe)


def train_on(crawl: Digits, pictures: Tensor, recipe: Recipe) -> StableDiffusionPipeline:
    """Tokenizer, text encoder and UNet trained on the crawl, a VAE on `pictures`, and Stable Diffusion 1.5's noise schedule."""
    tokenizer = train_tokenizer(CAPTIONS)
    scheduler = DDIMScheduler(
        num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="trailing",
    )
    # Only the networks' initial weights are drawn from torch's global generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        vae, text, unet = new_vae(), new_text_encoder(tokenizer), new_unet()
    train_vae(vae, pictures, recipe)
    train_text_encoder(text, tokenizer, crawl, recipe)
    latents = encode_all(vae, crawl)
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
    with torch.no_grad():
        embeds = text(token_ids(tokenizer, [*CAPTIONS, ""])).last_hidden_state
    train_unet(unet, embeds, latents * vae.config.scaling_factor, crawl.labels, scheduler, recipe)
    return StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=text.eval(), tokenizer=tokenizer, unet=unet.eval(), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )


def new_vae() -> AutoencoderKL:
    """Pixels (3, 16, 16) to latents (4, 8, 8)."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32), layers_per_block=1, latent_channels=4, norm_num_groups=8,
        sample_size=RESOLUTION, mid_block_add_attention=False,
    )


def new_unet() -> UNet2DConditionModel:
    """About a million parameters; attends to the prompt at 4x4 only, which halves the cost."""
    return UNet2DConditionModel(
        sample_size=RESOLUTION // 2, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=4, norm_num_groups=8,
    )


def train_vae(vae: AutoencoderKL, pictures: Tensor, recipe: Recipe) -> None:
    """Train the VAE: reconstruction and a weak pull to the normal distribution, as in latent diffusion; pixels in [-1, 1]."""
    random = generator(recipe.seed, "vae")

    def loss() -> Tensor:
        rows = torch.randint(len(pictures), (recipe.batch_size,), generator=random)
        pixels = pictures[rows] * 2 - 1
        return vae_loss(vae, pixels, random, recipe.kl_weight)

    fit(list(vae.parameters()), loss, recipe.vae_steps, recipe.vae_lr, "VAE")


@torch.no_grad()
def encode_all(vae: AutoencoderKL, crawl: Digits) -> Tensor:
    """Posterior means of the whole crawl, `(N, 4, 8, 8)`, unscaled."""
    return torch.cat([vae.encode(pixels * 2 - 1).latent_dist.mean for pixels in crawl.pixels.split(256)])


def train_text_encoder(
    text: CLIPTextModel | CLIPTextModelWithProjection, tokenizer: CLIPTokenizer, crawl: Digits, recipe: Recipe, name: str = "text",
) -> None:
    """Train the text encoder with CLIP's loss; the picture tower is one linear map and is not kept."""
    random = generator(recipe.seed, name)
    tower = torch.nn.Linear(crawl.pixels[0, 0].numel(), text.config.hidden_size)
    torch.nn.init.normal_(tower.weight, std=0.05, generator=random)
    torch.nn.init.zeros_(tower.bias)
    tokens = token_ids(tokenizer, CAPTIONS)
    pooled = "text_embeds" if isinstance(text, CLIPTextModelWithProjection) else "pooler_output"

    def loss() -> Tensor:
        rows = torch.randint(len(crawl), (recipe.batch_size,), generator=random)
        pictures = F.normalize(tower(crawl.pixels[rows].mean(dim=1).flatten(1)), dim=1)
        captions = F.normalize(text(tokens)[pooled], dim=1)
        # There are only ten captions, so each picture is compared with all of them, and not with its batch's.
        return F.cross_entropy(10 * pictures @ captions.T, crawl.labels[rows])

    fit([*text.parameters(), *tower.parameters()], loss, recipe.text_steps, recipe.text_lr, "text encoder")


def train_unet(
    unet: UNet2DConditionModel, embeds: Tensor, latents: Tensor, labels: Tensor, scheduler: DDIMScheduler,
    recipe: Recipe,
) -> None:
    """Train the UNet: noise prediction at uniform timesteps; `embeds` are of the ten captions and, last, the empty one."""
    def times(random: torch.Generator) -> Tensor:
        return torch.randint(scheduler.config.num_train_timesteps, (recipe.batch_size,), generator=random)

    def loss(clean: Tensor, noise: Tensor, timesteps: Tensor, captions: Tensor) -> Tensor:
        noisy = scheduler.add_noise(clean, noise, timesteps)
        return F.mse_loss(unet(noisy, timesteps, embeds[captions]).sample, noise)

    train_denoiser(unet, latents, labels, times, loss, recipe, "UNet")


def train_denoiser(
    denoiser: nn.Module, latents: Tensor, labels: Tensor, times: Callable[[torch.Generator], Tensor],
    loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], recipe: Recipe, name: str,
) -> None:
    """Train with `loss` of clean latents, noise, times and captions; caption 10 is the empty one, which some pictures get."""
    random = generator(recipe.seed, name.lower())

    def of_a_batch() -> Tensor:
        rows = torch.randint(len(latents), (recipe.batch_size,), generator=random)
        at = times(random)
        noise = torch.randn(latents[rows].shape, generator=random)
        dropped = torch.rand(recipe.batch_size, generator=random) < recipe.caption_dropout
        return loss(latents[rows], noise, at, torch.where(dropped, len(CAPTIONS), labels[rows]))

    fit(list(denoiser.parameters()), of_a_batch, recipe.denoiser_steps, recipe.denoiser_lr, name)
