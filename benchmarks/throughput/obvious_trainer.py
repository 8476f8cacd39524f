"""SePPO as one would first write it from diffusers' examples: what the trainer's speed is compared with.

`StableDiffusionPipeline` is called for each prompt and gives a picture; pictures go through the VAE like any training data; a
DiffusionDPO-style step in plain PyTorch follows: prompts encoded in every step, policy and reference forward, App. B.2, AdamW.
On a GPU the policy is trained in fp32 under bf16 autocast and everything frozen is bf16, as in those examples.
`--batched` is the first improvement one would make: one pipeline call for a micro-batch's prompts instead of one for each.
"""

import argparse
import copy
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from diffusers.utils import logging
from PIL import Image
from torch import Tensor, nn

from benchmarks.loss.baselines import app_b2
from seppo_fast.training.metrics import peak_memory_gb


class ObviousTrainer:
    """Everything that an update needs; `update()` makes one of `batch` pairs in micro-batches of `micro`."""

    def __init__(self, base: Path, demonstrations: Path, device: str, resolution: int, steps: int, guidance: float, micro: int,
                 beta: float, lr: float, batched: bool = False) -> None:
        self.device, self.resolution, self.steps, self.guidance = torch.device(device), resolution, steps, guidance
        self.micro, self.beta, self.batched = micro, beta, batched
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None, requires_safety_checker=False)
        self.policy = self.pipeline.unet.float().to(self.device).train()
        self.reference = nn.Module.to(copy.deepcopy(self.policy), self.dtype).requires_grad_(False).eval()
        self.pipeline.register_modules(unet=self.reference)
        self.pipeline.scheduler = DDIMScheduler.from_config(self.pipeline.scheduler.config)
        self.pipeline.vae.requires_grad_(False)
        self.pipeline.text_encoder.requires_grad_(False)
        self.pipeline.to(self.device, self.dtype)
        self.pipeline.set_progress_bar_config(disable=True)
        self.noise_scheduler = DDPMScheduler.from_config(self.pipeline.scheduler.config)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=lr, weight_decay=0.01)
        rows = [json.loads(line) for line in (demonstrations / "metadata.jsonl").read_text().splitlines()]
        self.rows = [(demonstrations / row["file_name"], row["text"]) for row in rows]
        self.order = self.shuffled()
        self.seconds = {"sampling": 0.0, "data": 0.0, "training": 0.0}

    def shuffled(self) -> Iterator[tuple[Path, str]]:
        """Files and prompts without end, in a new random order in each epoch."""
        while True:
            yield from random.sample(self.rows, len(self.rows))

    def update(self, batch: int) -> float:
        """One optimizer update; returns the loss."""
        total = 0.0
        for _ in range(batch // self.micro):
            files, prompts = zip(*(next(self.order) for _ in range(self.micro)), strict=True)
            start = self.now()
            losers = self.sample(list(prompts))
            sampled = self.now()
            winners = [Image.open(file).convert("RGB") for file in files]
            latents = torch.cat([self.encode(winners), self.encode(losers)])
            loaded = self.now()
            loss = self.loss(latents, list(prompts)) * self.micro / batch
            loss.backward()
            total += loss.item()
            for name, seconds in zip(self.seconds, (sampled - start, loaded - sampled, self.now() - loaded), strict=True):
                self.seconds[name] += seconds
        start = self.now()
        nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.seconds["training"] += self.now() - start
        return total

    def sample(self, prompts: list[str]) -> list[Image.Image]:
        """A picture a prompt, by the reference."""
        calls = [prompts] if self.batched else [[prompt] for prompt in prompts]
        return [image for some in calls for image in self.pipeline(
            some, height=self.resolution, width=self.resolution, num_inference_steps=self.steps,
            guidance_scale=self.guidance).images]

    @torch.no_grad()
    def encode(self, images: list[Image.Image]) -> Tensor:
        """Pictures to scaled latents, resized and normalised as the examples' transforms do."""
        size = (self.resolution, self.resolution)
        pixels = np.stack([np.asarray(image if image.size == size else image.resize(size)) for image in images])
        pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.device, self.dtype) / 127.5 - 1
        return self.pipeline.vae.encode(pixels).latent_dist.sample() * self.pipeline.vae.config.scaling_factor

    def loss(self, latents: Tensor, prompts: list[str]) -> Tensor:
        """Winners and losers, `(2B, C, h, w)`, at one timestep a pair; each half has its own noise, as in ours."""
        tokens = self.pipeline.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt",
                                         max_length=self.pipeline.tokenizer.model_max_length).input_ids
        with torch.no_grad():
            embeds = self.pipeline.text_encoder(tokens.to(self.device))[0].repeat(2, 1, 1)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(1000, (len(prompts),), device=self.device).repeat(2)
        noisy = self.noise_scheduler.add_noise(latents, noise, timesteps)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            model_pred = self.policy(noisy, timesteps, embeds).sample
            with torch.no_grad():
                ref_pred = self.reference(noisy, timesteps, embeds).sample
        return app_b2(model_pred, ref_pred, noise, self.beta)

    def now(self) -> float:
        """The time when the device has finished its work. A trainer that logs its loss waits for the device too."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput.obvious_trainer", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "demonstrations", "rows"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("resolution", "steps", "batch", "micro", "updates"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("guidance", "beta", "lr"):
        parser.add_argument(f"--{name}", type=float, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batched", action="store_true")
    given = parser.parse_args()
    torch.manual_seed(0)
    logging.set_verbosity_error()
    trainer = ObviousTrainer(given.base, given.demonstrations, given.device, given.resolution, given.steps, given.guidance,
                             given.micro, given.beta, given.lr, given.batched)
    with given.rows.open("w") as file:
        for update in range(1, given.updates + 1):
            trainer.seconds = dict.fromkeys(trainer.seconds, 0.0)
            start = trainer.now()
            loss = trainer.update(given.batch)
            seconds = trainer.now() - start
            row = {"update": update, "loss": loss, "seconds": round(seconds, 4), "pairs_per_s": given.batch / seconds,
                   "peak_memory_gb": round(peak_memory_gb(trainer.device), 3),
                   **{f"seconds_{name}": round(value, 4) for name, value in trainer.seconds.items()}}
            file.write(json.dumps(row) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
