"""The base model: a complete, tiny AnimateDiff pipeline directory, trained here on a crawl of clips with faults."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AnimateDiffPipeline, AutoencoderKL, DDIMScheduler, UNetMotionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from seppo_fast.models.animatediff import motion_adapter
from seppo_fast.quickstart.digits import split_digits
from seppo_fast.quickstart.fitting import fit, make_once, new_text_encoder, token_ids, vae_loss
from seppo_fast.quickstart.tokenizer import train_tokenizer
from seppo_fast.quickstart.video.clips import CAPTIONS, FRAMES, RESOLUTION, Clips, random_clips, spoiled
from seppo_fast.seeds import generator

LATENTS = (8, 4, 4)


@dataclass(frozen=True)
class Recipe:
    """How the base is made. `wrong_directions`, `bad_motion` and `degraded` are shares of the crawl, and the base's faults."""

    seed: int = 0
    frames: int = FRAMES
    clips: int = 1000
    wrong_directions: float = 0.15
    bad_motion: float = 0.1
    degraded: float = 0.1
    vae_steps: int = 160
    vae_batch_size: int = 64
    text_steps: int = 200
    text_batch_size: int = 64
    denoiser_steps: int = 480
    denoiser_batch_size: int = 8
    vae_lr: float = 4e-3
    text_lr: float = 6e-3
    kl_weight: float = 1e-3
    denoiser_lr: float = 3e-3
    caption_dropout: float = 0.1


def make_base(folder: Path, recipe: Recipe) -> bool:
    """Build the pipeline directory unless `folder` holds the result of this recipe and code; True when it was built."""
    code = ("video/base.py", "video/clips.py", "fitting.py", "digits.py", "tokenizer.py")
    return make_once(folder, recipe, code, train_base)


def train_base(recipe: Recipe) -> AnimateDiffPipeline:
    """Tokenizer, VAE, text encoder and the UNet with its motion modules, trained on the crawl; AnimateDiff's noise schedule."""
    clips = clean_clips(recipe)
    crawl = sloppy_crawl(clips, recipe)
    tokenizer = new_tokenizer()
    scheduler = DDIMScheduler(
        num_train_timesteps=1000, beta_schedule="linear", beta_start=0.00085, beta_end=0.012,
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="trailing",
    )
    # Only the networks' initial weights are drawn from torch's global generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        vae, text, unet = new_vae(), new_text_encoder(tokenizer), new_unet()
    train_vae(vae, crawl, recipe)
    train_text_encoder(text, tokenizer, clips, recipe)  # on the clean clips: real video models get a CLIP that is trained already
    latents = encode_all(vae, crawl)
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
    with torch.no_grad():
        embeds = text(token_ids(tokenizer, [*CAPTIONS, ""])).last_hidden_state
    train_unet(unet, embeds, latents * vae.config.scaling_factor, crawl.labels, scheduler, recipe)
    return AnimateDiffPipeline(
        vae=vae.eval(), text_encoder=text.eval(), tokenizer=tokenizer, unet=unet.eval(), scheduler=scheduler,
        motion_adapter=motion_adapter(unet).eval(), feature_extractor=None, image_encoder=None,
    )


def clean_clips(recipe: Recipe) -> Clips:
    """The clips of the crawl before it is spoiled."""
    digits, _ = split_digits(recipe.seed)
    return random_clips(digits, recipe.clips, generator(recipe.seed, "clips"), recipe.frames)


def sloppy_crawl(clips: Clips, recipe: Recipe) -> Clips:
    """The clips with the recipe's faults."""
    return spoiled(clips, recipe.wrong_directions, recipe.bad_motion, recipe.degraded, recipe.seed)


def new_tokenizer() -> CLIPTokenizer:
    """A tokenizer of the captions' words, the same each time."""
    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    # The trainer takes equally frequent pairs ("ee" and "en" at a word's end) in an order that differs from call to call.
    return train_tokenizer([(word + " ") * 2**index for index, word in enumerate(words)])


def new_vae() -> AutoencoderKL:
    """Pixels (3, 32, 32) to latents (8, 4, 4)."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 32), layers_per_block=1, latent_channels=LATENTS[0], norm_num_groups=8,
        sample_size=RESOLUTION, mid_block_add_attention=False,
    )


def new_unet() -> UNetMotionModel:
    """About 1.4 million parameters; a motion module after every layer, attention to the prompt at 2x2.

    A motion module attends along time at one place. Only where the places are few does it see a digit on its whole way.
    """
    return UNetMotionModel(
        sample_size=LATENTS[1], in_channels=LATENTS[0], out_channels=LATENTS[0], layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion"),
        up_block_types=("CrossAttnUpBlockMotion", "UpBlockMotion"),
        cross_attention_dim=32, num_attention_heads=4, motion_num_attention_heads=4, motion_max_seq_length=24,
        norm_num_groups=8,
    )


def train_vae(vae: AutoencoderKL, crawl: Clips, recipe: Recipe) -> None:
    """Train the VAE: reconstruction of single frames and a weak pull to the normal distribution; pixels in [-1, 1]."""
    random = generator(recipe.seed, "vae")

    def loss() -> Tensor:
        rows = torch.randint(len(crawl), (recipe.vae_batch_size,), generator=random)
        frames = torch.randint(FRAMES, (recipe.vae_batch_size,), generator=random)
        pixels = _coloured(crawl.pixels[rows, frames])
        return vae_loss(vae, pixels, random, recipe.kl_weight)

    fit(list(vae.parameters()), loss, recipe.vae_steps, recipe.vae_lr, "VAE")


@torch.no_grad()
def encode_all(vae: AutoencoderKL, crawl: Clips) -> Tensor:
    """Posterior means of the whole crawl, `(N, 8, 16, 4, 4)`, unscaled."""
    means = [vae.encode(_coloured(frames)).latent_dist.mean for frames in crawl.pixels.flatten(0, 1).split(512)]
    return torch.cat(means).unflatten(0, (-1, FRAMES)).transpose(1, 2).contiguous()


def train_text_encoder(text: CLIPTextModel, tokenizer: CLIPTokenizer, clips: Clips, recipe: Recipe) -> None:
    """Train the text encoder with CLIP's loss; the clips' tower is one linear map of four coarse frames and is not kept."""
    random = generator(recipe.seed, "text")
    seen = F.avg_pool2d(clips.pixels[:, [0, 5, 10, 15], 0], 4).flatten(1)
    seen = seen - seen.mean(dim=0)
    tower = torch.nn.Linear(seen.shape[1], text.config.hidden_size)
    torch.nn.init.normal_(tower.weight, std=0.05, generator=random)
    torch.nn.init.zeros_(tower.bias)
    tokens = token_ids(tokenizer, CAPTIONS)

    def loss() -> Tensor:
        rows = torch.randint(len(clips), (recipe.text_batch_size,), generator=random)
        shown, said = F.normalize(tower(seen[rows]), dim=1), F.normalize(text(tokens).pooler_output, dim=1)
        # There are only forty captions, so each clip is compared with all of them, and not with its batch's.
        return F.cross_entropy(10 * shown @ said.T, clips.labels[rows])

    fit([*text.parameters(), *tower.parameters()], loss, recipe.text_steps, recipe.text_lr, "text encoder")


def train_unet(
    unet: UNetMotionModel, embeds: Tensor, latents: Tensor, labels: Tensor, scheduler: DDIMScheduler, recipe: Recipe,
) -> None:
    """Train the UNet: noise prediction at one timestep a clip; `embeds` are of the forty captions and, last, the empty one.

    Late timesteps are drawn more often. The frames together show the direction except in nearly pure noise, so only there the
    network needs the prompt for it.
    """
    last = scheduler.config.num_train_timesteps - 1

    def times(random: torch.Generator) -> Tensor:
        return (last * torch.rand(recipe.denoiser_batch_size, generator=random) ** (1 / 3)).round().long()

    def loss(clean: Tensor, noise: Tensor, timesteps: Tensor, captions: Tensor) -> Tensor:
        noisy = scheduler.add_noise(clean, noise, timesteps)
        return F.mse_loss(unet(noisy, timesteps, embeds[captions].repeat_interleave(FRAMES, dim=0)).sample, noise)

    train_denoiser(unet, latents, labels, times, loss, recipe, "UNet")


def train_denoiser(
    denoiser: nn.Module, latents: Tensor, labels: Tensor, times: Callable[[torch.Generator], Tensor],
    loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], recipe: Recipe, name: str,
) -> None:
    """Train with `loss` of clean latents, noise, times and captions; caption 40 is the empty one, which some clips get."""
    random, batch = generator(recipe.seed, name.lower()), recipe.denoiser_batch_size

    def of_a_batch() -> Tensor:
        rows = torch.randint(len(latents), (batch,), generator=random)
        at = times(random)
        noise = torch.randn(latents[rows].shape, generator=random)
        dropped = torch.rand(batch, generator=random) < recipe.caption_dropout
        return loss(latents[rows], noise, at, torch.where(dropped, len(CAPTIONS), labels[rows]))

    fit(list(denoiser.parameters()), of_a_batch, recipe.denoiser_steps, recipe.denoiser_lr, name)


def _coloured(grey: Tensor) -> Tensor:
    """`(N, 1, H, W)` in [0, 1] to `(N, 3, H, W)` in [-1, 1]."""
    return grey.expand(-1, 3, -1, -1) * 2 - 1
