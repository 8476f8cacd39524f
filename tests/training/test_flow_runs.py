"""Whole runs of SD3, FLUX and Qwen-Image against a plain loop that shares none of the trainer's code; ranks and resuming.

The loop draws with diffusers' own pipelines and has its own noising, times and loss (App. B.2), one pair at a time. It takes from
the package only what *defines* the data: the cached latents, their order, how random numbers are addressed, an adapter's start.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FluxPipeline, QwenImagePipeline, StableDiffusion3Pipeline
from forked import Forks
from outcomes import Weights, apart, check_kill, check_rows
from safetensors.torch import load_file
from tiny import tiny_flux, tiny_sd3
from tiny_qwen import MEAN, STD, tiny_qwen
from torch import Tensor

from seppo_fast.config import Lora
from seppo_fast.data.latents import LatentCache
from seppo_fast.data.order import Order
from seppo_fast.models.lora import add_lora, trainable_weights
from seppo_fast.seeds import generator, normal

LORA = {"rank": 2, "alpha": 4.0}
CASES: dict[str, dict[str, Any]] = {"sd3": {}, "flux": {"seppo.model.lora": LORA, "seppo.sampler.guidance_scale": 3.5},
                                    "qwen": {"seppo.sampler.guidance_scale": 4.0}}
PIPELINES = {"sd3": StableDiffusion3Pipeline, "flux": FluxPipeline, "qwen": QwenImagePipeline}
PER_CHANNEL = 1 / torch.tensor(STD).view(-1, 1, 1), torch.tensor(MEAN).view(-1, 1, 1)
SCALES: dict[str, Any] = {"sd3": (1.5305, 0.0609), "flux": (0.3611, 0.1159), "qwen": PER_CHANNEL}  # of the VAEs: factor and shift
# FLUX and Qwen-Image: mu of 4 x 4 tokens
SHIFTS = {"sd3": 3.0, "flux": math.exp(0.5 + (16 - 256) * (1.15 - 0.5) / (4096 - 256)),
          "qwen": math.exp(0.5 + (16 - 256) * (0.9 - 0.5) / (8192 - 256))}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {"sd3": tiny_sd3(root / "sd3", num_layers=1), "flux": tiny_flux(root / "flux"),
            "qwen": tiny_qwen(root / "qwen", num_layers=1)}


@pytest.fixture
def configured(settings: Callable[..., dict[str, Any]], models: dict[str, Path]) -> Callable[..., dict[str, Any]]:
    """`configured(name)`: SePPO, 2 iterations of 2 updates of 4 pairs."""
    return lambda name, **changes: settings(**{
        "optimizer.params": {"lr": 1e-3, "eps": 1e-5, "weight_decay": 0.01, "torch_adam": True}, "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2, "seppo.seed": 1, "seppo.beta": 100.0, "seppo.model.path": str(models[name]),
        "seppo.sampler.solver": "euler", "seppo.checkpoint.every": 1, **CASES[name], **changes})


def policy_of(run: Path) -> Weights:
    """What was trained."""
    return load_file(max((run / "checkpoints").iterdir()) / "policy.safetensors")


def seen(prompt: dict[str, Tensor]) -> Tensor:
    """The embeddings of one prompt, without what a mask hides."""
    return prompt["prompt_embeds"][:, :int(prompt["mask"].sum())] if "mask" in prompt else prompt["prompt_embeds"]


def predict(network: torch.nn.Module, latents: Tensor, sigma: Tensor, prompt: dict[str, Tensor], guidance: float) -> Tensor:
    """The velocity of latents (B, 4, 8, 8) under one prompt, by the transformers' published interfaces."""
    size, embeds = len(latents), seen(prompt)
    given: dict[str, Any] = dict(encoder_hidden_states=embeds.expand(size, -1, -1), return_dict=False)
    if "Qwen" not in type(network).__name__:
        given["pooled_projections"] = prompt["pooled"].expand(size, -1)
    if "SD3" in type(network).__name__:
        return network(hidden_states=latents, timestep=(1000 * sigma).expand(size), **given)[0]
    tokens = latents.reshape(size, 4, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(size, 16, 16)
    if "Qwen" in type(network).__name__:
        output = network(hidden_states=tokens, timestep=sigma.expand(size), img_shapes=[[(1, 4, 4)]] * size, **given)[0]
        return output.reshape(size, 4, 4, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(size, 4, 8, 8)
    places = torch.tensor([[0.0, row, column] for row in range(4) for column in range(4)])
    output = network(hidden_states=tokens, timestep=sigma.expand(size), guidance=torch.full((size,), guidance), img_ids=places,
                     txt_ids=torch.zeros(embeds.shape[1], 3), **given)[0]
    return output.reshape(size, 4, 4, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(size, 4, 8, 8)


def drawn(pipeline: DiffusionPipeline, noise: Tensor, prompt: dict[str, Tensor], empty: dict[str, Tensor], steps: int, scale: float
          ) -> Tensor:
    """The pipeline's own sample."""
    if isinstance(pipeline, QwenImagePipeline):
        latents = pipeline(prompt_embeds=seen(prompt), negative_prompt_embeds=seen(empty), true_cfg_scale=scale, height=16,
                           width=16, latents=pipeline._pack_latents(noise, 1, 4, 8, 8), num_inference_steps=steps,
                           output_type="latent").images
        return pipeline._unpack_latents(latents, 16, 16, 2)[:, :, 0]
    flux = isinstance(pipeline, FluxPipeline)
    negative = {} if flux else {"negative_prompt_embeds": empty["prompt_embeds"], "negative_pooled_prompt_embeds": empty["pooled"]}
    latents = pipeline(prompt_embeds=prompt["prompt_embeds"], pooled_prompt_embeds=prompt["pooled"], height=16, width=16,
                       latents=pipeline._pack_latents(noise, 1, 4, 8, 8) if flux else noise, num_inference_steps=steps,
                       guidance_scale=scale, output_type="latent", **negative).images
    return pipeline._unpack_latents(latents, 16, 16, 2) if flux else latents


def app_b2(target: Tensor, policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Loss, errors, sign and logit of one pair (2, ...)."""
    (m_w, m_l), (q_w, q_l) = (((each - target) ** 2).flatten(1).mean(1) for each in (policy, reference))
    sign = 1.0 if m_w - q_w > 0 else -1.0
    logit = -0.5 * beta * ((m_w + sign * m_l) - (q_w + sign * q_l))
    return torch.stack([-F.logsigmoid(logit), m_w, m_l, q_w, q_l, torch.tensor(sign), logit])


def plain_loop(name: str, raw: dict[str, Any], cache: LatentCache) -> tuple[Weights, Weights, list[Tensor], list[float]]:
    """What is trained, before and after; by update the (pairs, 7) columns of `app_b2`, and the gradient norm."""
    ours, size = raw["seppo"], raw["train_batch_size"]
    seed, order, scale = ours["seed"], Order(len(cache), ours["seed"]), ours["sampler"]["guidance_scale"]
    pipeline = PIPELINES[name].from_pretrained(ours["model"]["path"])
    pipeline.set_progress_bar_config(disable=True)
    policy = pipeline.transformer.train()
    if "lora" in ours["model"]:
        add_lora(policy, Lora(**ours["model"]["lora"]), seed)
    weights = trainable_weights(policy)
    start = {key: value.detach().clone() for key, value in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-3, eps=1e-5, weight_decay=0.01)
    pool, tables, norms, empty = [deepcopy(policy).eval()], [], [], cache.embeddings([0])
    (factor, shift), k = SCALES[name], SHIFTS[name]
    for iteration in range(1, ours["iterations"] + 1):
        reference = pool[int(torch.randint(iteration, (), generator=generator(seed, "reference", iteration)))]
        pipeline.transformer = reference
        for update in range((iteration - 1) * ours["updates_per_iteration"], iteration * ours["updates_per_iteration"]):
            table = []
            for slot in range(update * size, (update + 1) * size):
                row = cache.rows([order.row(slot)])
                prompt, draw = cache.embeddings(row.prompts), partial(normal, cache.shape, seed, slots=[slot])
                winner = (row.mean + row.std * draw("posterior") - shift) * factor
                loser = drawn(pipeline, draw("initial noise"), prompt, empty, ours["sampler"]["steps"], scale)
                noise, latents = torch.cat([draw("noise"), draw("loser noise")]), torch.cat([winner, loser])
                sigma = torch.randn((), generator=generator(seed, "timestep", slot)).sigmoid()
                sigma = k * sigma / (1 + (k - 1) * sigma)
                given = ((1 - sigma) * latents + sigma * noise, sigma, prompt, scale)
                with torch.no_grad():
                    ref = predict(reference, *given)
                table.append(app_b2(noise - latents, predict(policy, *given), ref, ours["beta"]))
                (table[-1][0] / size).backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(weights.values(), raw["gradient_clipping"])))
            optimizer.step()
            optimizer.zero_grad()
            tables.append(torch.stack(table).detach())
        pool.append(deepcopy(policy).eval())
    return start, {key: value.detach() for key, value in weights.items()}, tables, norms


@pytest.mark.parametrize("name", CASES)
def test_run_equals_plain_loop(name: str, configured: Any, train: Callable[..., Path], tmp_path: Path) -> None:
    raw = configured(name, **{"seppo.data.cache_dir": str(tmp_path / "cache")})
    run = train(raw)
    (cache,) = (tmp_path / "cache").iterdir()
    start, plain, tables, norms = plain_loop(name, raw, LatentCache(cache))
    assert apart(plain, start) > 1e-3, "the loop did not train"
    assert apart(policy_of(run), plain) < 1e-5
    check_rows(run, tables, norms)


@pytest.mark.parametrize("name", CASES)
def test_ranks_and_a_kill_change_nothing(name: str, configured: Any, train: Callable[..., Path], forks: Forks, tmp_path: Path
                                         ) -> None:
    one, two, killed = (configured(name, **{"seppo.output_dir": str(tmp_path / folder)}) for folder in ("one", "two", "killed"))
    train(one)
    assert forks.run(two, ranks=2).statuses == [0, 0]
    assert apart(policy_of(tmp_path / "one"), policy_of(tmp_path / "two")) < 2e-6
    check_kill(forks, killed, tmp_path / "killed", tmp_path / "two")
