"""The base of `--model flow`: a complete, tiny Wan pipeline directory, a flow that learns from the same crawl of clips."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from seppo_fast.quickstart.fitting import fit, make_once, vae_loss
from seppo_fast.quickstart.tokenizer import new_t5_tokenizer
from seppo_fast.quickstart.video.base import Recipe, clean_clips, sloppy_crawl, train_denoiser
from seppo_fast.quickstart.video.clips import CAPTIONS, Clips
from seppo_fast.seeds import generator

# Of a prompt; a caption has five. With 512, as the published models have, nearly all work would be on padding.
TOKENS = 8
CHANNELS, WIDTH = 16, 64  # of latents, and of prompt embeddings
SHIFT = 3.0  # of times, as Wan's configuration for small clips has it
# Wan's VAE makes one latent of the first frame, and one of every four that follow. The crawl has more faults than AnimateDiff's,
# because this model learns its clips better.
RECIPE = Recipe(frames=17, wrong_directions=0.3, bad_motion=0.2, degraded=0.3, vae_steps=320, vae_batch_size=10, kl_weight=1e-4,
                denoiser_steps=1500, denoiser_batch_size=32, denoiser_lr=2e-3)
SEEN = 9  # frames of a clip that the VAE learns from at once: the first, and twice four


def make_base(folder: Path, recipe: Recipe) -> bool:
    """Build the pipeline directory unless `folder` holds the result of this recipe and code; True when it was built."""
    code = ("video/flow.py", "video/base.py", "video/clips.py", "fitting.py", "digits.py", "tokenizer.py")
    return make_once(folder, recipe, code, train_base)


def train_base(recipe: Recipe) -> WanPipeline:
    """VAE and transformer trained on the crawl. UMT5 keeps its first weights, which tell words and their places apart."""
    crawl = sloppy_crawl(clean_clips(recipe), recipe)
    tokenizer = new_t5_tokenizer(CAPTIONS, TOKENS)
    # Only the networks' initial weights are drawn from torch's global generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        vae, transformer = new_vae(), new_transformer()
        text = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), d_model=WIDTH, d_kv=16, d_ff=128, num_layers=1, num_heads=4))
    train_vae(vae, crawl, recipe)
    latents = encode_all(vae, crawl)
    mean, std = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    pipeline = WanPipeline(
        tokenizer=tokenizer, text_encoder=text.eval(), vae=vae.eval(), transformer=transformer,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT),
    )
    with torch.no_grad():
        embeds, _ = pipeline.encode_prompt([*CAPTIONS, ""], do_classifier_free_guidance=False, max_sequence_length=TOKENS)
    scaled = (latents - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)
    train_transformer(transformer, embeds, scaled, crawl.labels, recipe)
    transformer.eval()
    return pipeline


def new_vae() -> AutoencoderKLWan:
    """Pixels (3, 4 k + 1, 32, 32) to latents (16, k + 1, 4, 4); it sees 2x2 pixels as one and has shortcuts, as Wan 2.2's."""
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=CHANNELS, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[True, True], patch_size=2,
        is_residual=True, in_channels=12, out_channels=12, scale_factor_spatial=8,
        latents_mean=[0.0] * CHANNELS, latents_std=[1.0] * CHANNELS,
    )
    # A posterior as wide as the prior hides what the latents say, and a short training would spend its steps on narrowing it.
    torch.nn.init.constant_(vae.quant_conv.bias[CHANNELS:], -4)
    return vae


def new_transformer() -> WanTransformer3DModel:
    """0.6 million parameters; a token is 2x2 latents, so that a clip has 5 * 4 tokens."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=24, in_channels=CHANNELS, out_channels=CHANNELS,
        text_dim=WIDTH, freq_dim=64, ffn_dim=288, num_layers=4, rope_max_seq_len=32,
    )


def train_vae(vae: AutoencoderKLWan, crawl: Clips, recipe: Recipe) -> None:
    """Train the VAE: reconstruction of short pieces and a weak pull to the normal distribution; pixels in [-1, 1]."""
    random = generator(recipe.seed, "vae")

    def loss() -> Tensor:
        rows = torch.randint(len(crawl), (recipe.vae_batch_size, 1), generator=random)
        first = torch.randint(recipe.frames - SEEN + 1, (recipe.vae_batch_size, 1), generator=random)
        pixels = _coloured(crawl.pixels[rows, first + torch.arange(SEEN)])
        return vae_loss(vae, pixels, random, recipe.kl_weight)

    fit(list(vae.parameters()), loss, recipe.vae_steps, recipe.vae_lr, "VAE")


@torch.no_grad()
def encode_all(vae: AutoencoderKLWan, crawl: Clips) -> Tensor:
    """Posterior means of the whole crawl, `(N, 16, 5, 4, 4)`, unscaled."""
    return torch.cat([vae.encode(_coloured(clips)).latent_dist.mean for clips in crawl.pixels.split(64)])


def train_transformer(
    transformer: WanTransformer3DModel, embeds: Tensor, latents: Tensor, labels: Tensor, recipe: Recipe,
) -> None:
    """Train the velocity at shifted logit-normal times; `embeds` are of the forty captions and, last, the empty one."""
    def times(random: torch.Generator) -> Tensor:
        sigmas = torch.sigmoid(torch.randn(recipe.denoiser_batch_size, generator=random))
        return SHIFT * sigmas / (1 + (SHIFT - 1) * sigmas)

    def loss(clean: Tensor, noise: Tensor, sigmas: Tensor, captions: Tensor) -> Tensor:
        noisy = torch.lerp(clean, noise, sigmas.view(-1, 1, 1, 1, 1))
        velocity = transformer(noisy, timestep=1000 * sigmas, encoder_hidden_states=embeds[captions], return_dict=False)[0]
        return F.mse_loss(velocity, noise - clean)

    train_denoiser(transformer, latents, labels, times, loss, recipe, "transformer")


def _coloured(grey: Tensor) -> Tensor:
    """`(N, F, 1, H, W)` in [0, 1] to `(N, 3, F, H, W)` in [-1, 1]."""
    return grey.transpose(1, 2).expand(-1, 3, -1, -1, -1) * 2 - 1
