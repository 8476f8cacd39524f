"""Whole runs, weight for weight and metric for metric, against a plain loop that shares none of the trainer's code.

The loop has its own scheduler stepping, noising and loss (App. B.2, as printed), one pair at a time. It takes from the
package only what *defines* the data: the cached latents, their order, and how random numbers are addressed.
"""

import statistics
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from outcomes import apart, rows, unet_of, weights
from tiny import tiny_sd
from torch import Tensor

from seppo_fast.data.latents import LatentCache
from seppo_fast.data.order import Order
from seppo_fast.seeds import generator, normal


def plain_loop(raw: dict[str, Any], cache: LatentCache) -> tuple[dict[str, Tensor], list[Tensor], list[float]]:
    """Trained weights; by update the `(pairs, 8)` losses, MSEs, signs, logits, betas, and the gradient norm."""
    ours, size, method = raw["seppo"], raw["train_batch_size"], raw["seppo"].get("method", "seppo")
    seed, order = ours["seed"], Order(len(cache), ours["seed"])
    policy = UNet2DConditionModel.from_pretrained(ours["model"]["path"], subfolder="unet").train()
    ddim = DDIMScheduler.from_pretrained(ours["model"]["path"], subfolder="scheduler", clip_sample=False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, eps=1e-5, weight_decay=0.01)
    alphas = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0).view(-1, 1, 1, 1)
    pool, tables, norms = [deepcopy(policy).eval()], [], []
    empty = cache.embeddings([0])["prompt_embeds"]
    beta, mean, seen = 2000.0 if ours["beta"] == "auto" else ours["beta"], 0.0, 0

    for k in range(1, ours["iterations"] + 1):
        reference = pool[int(torch.randint(k, (), generator=generator(seed, "reference", k))) if method == "seppo" else 0]
        for update in range((k - 1) * ours["updates_per_iteration"], k * ours["updates_per_iteration"]):
            table = []
            for slot in range(update * size, (update + 1) * size):
                row = cache.rows([order.row(slot)])
                prompt = cache.embeddings(row.prompts)["prompt_embeds"]
                sampled = ours["data"].get("posterior") != "mean"
                draw = partial(normal, cache.shape, seed, slots=[slot])
                latents = [0.18215 * (row.mean + sampled * row.std * draw("posterior"))]
                if method == "dpo":
                    latents += [0.18215 * (row.loser_mean + sampled * row.loser_std * draw("loser posterior"))]
                elif method == "seppo":
                    latents += [guided_sample(reference, ddim, draw("initial noise"), empty, prompt, ours["sampler"]["steps"],
                                              ours["sampler"]["guidance_scale"])]
                loser_noise = "noise" if ours.get("noise") == "shared" else "loser noise"
                noise = torch.cat([draw("noise"), draw(loser_noise)][: len(latents)])
                t = int(torch.randint(1000, (), generator=generator(seed, "timestep", slot)))
                x, a, b = torch.cat(latents), alphas[t].sqrt(), (1 - alphas[t]).sqrt()
                if torch.rand((), generator=generator(seed, "dropout", slot)) < ours.get("caption_dropout", 0.0):
                    prompt = empty
                target = a * noise - b * x if ddim.config.prediction_type == "v_prediction" else noise
                batch = (a * x + b * noise, t, prompt.expand(len(x), -1, -1))
                further = []
                for i in range(1, ours.get("aaf_draws", 1)):
                    more = draw(f"noise {i}")
                    wanted = a * more - b * x[:1] if ddim.config.prediction_type == "v_prediction" else more
                    with torch.no_grad():
                        errors = [F.mse_loss(unet(a * x[:1] + b * more, t, prompt).sample, wanted) for unet in (policy, reference)]
                    excess = errors[0] - errors[1]
                    further.append(excess * (excess.abs() > 1e-6))  # equal networks may round a single sample differently
                table.append(app_b2(target, policy(*batch).sample, reference, batch, beta, method,
                                    ours.get("sft_weight", 0.0), further))
                (table[-1][0] / size).backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(policy.parameters(), raw["gradient_clipping"])))
            optimizer.step()
            optimizer.zero_grad()
            tables.append(torch.stack([pair.detach() for pair in table]))
            margins = [abs(2 * float(logit) / beta) for logit in tables[-1][:, 6]] if method != "sft" else [0.0]
            if ours["beta"] == "auto" and max(margins) > 0:  # else all are ties
                mean, seen = 0.9 * mean + 0.1 * statistics.median(margins), seen + 1
                beta = 2.77 * (1 - 0.9**seen) / mean
        pool.append(deepcopy(policy).eval())
    return policy.state_dict(), tables, norms


@torch.no_grad()
def guided_sample(unet: UNet2DConditionModel, ddim: DDIMScheduler, latents: Tensor, empty: Tensor, prompt: Tensor, steps: int,
                  scale: float) -> Tensor:
    """DDIM with classifier-free guidance, as in diffusers' pipelines."""
    ddim.set_timesteps(steps)
    for t in ddim.timesteps:
        without, given = (unet(latents, t, embeds).sample for embeds in (empty, prompt))
        latents = ddim.step(without + scale * (given - without), t, latents).prev_sample
    return latents


def app_b2(target: Tensor, model_pred: Tensor, ref_unet: torch.nn.Module, model_batch_args: tuple, beta_dpo: float,
           train_method: str, sft_weight: float, further: list[Tensor]) -> Tensor:
    """The paper's App. B.2, line by line, for one pair, and the winner's own error; Diffusion-DPO has the sign fixed.
    `further`: by how much the policy is worse on the winner under the other noises that decide the sign."""
    if train_method == "sft":
        return F.mse_loss(model_pred.float(), target.float(), reduction="mean")[None]
    model_losses = (model_pred - target).pow(2).mean(dim=[1, 2, 3])
    model_losses_w, model_losses_l = model_losses.chunk(2)
    with torch.no_grad():
        ref_pred = ref_unet(*model_batch_args).sample.detach()
        ref_losses = (ref_pred - target).pow(2).mean(dim=[1, 2, 3])
        ref_losses_w, ref_losses_l = ref_losses.chunk(2)
        pos_losses_w = model_losses_w - ref_losses_w
        pos_losses_w = torch.stack([pos_losses_w, *(each[None] for each in further)]).mean(0)
        sign = torch.where(pos_losses_w > 0, torch.tensor(1.0), torch.tensor(-1.0))
        if train_method == "dpo":
            sign = torch.full_like(sign, -1.0)
    model_diff = model_losses_w + sign * model_losses_l
    ref_diff = ref_losses_w + sign * ref_losses_l
    scale_term = -0.5 * beta_dpo
    inside_term = scale_term * (model_diff - ref_diff)
    loss = -1 * (F.logsigmoid(inside_term)).mean()
    loss = loss + sft_weight * model_losses_w.mean()
    return torch.stack([loss, *model_losses, *ref_losses, sign[0], inside_term[0], torch.tensor(beta_dpo)])


# With a small window of slots an epoch (24 rows) ends within a run: 3 x 2 updates of 6 pairs.
CASES: dict[str, dict[str, Any]] = {
    "seppo": {},
    "seppo, beta auto": {"seppo.beta": "auto"},
    "seppo, v prediction, shared noise, SFT weight": {"v": True, "seppo.noise": "shared", "seppo.sampler.batch_size": 5,
                                                      "seppo.sft_weight": 3.0},
    "seppo, signs of 4 noises": {"seppo.aaf_draws": 4},
    "seppo, v prediction, signs of 3 noises": {"v": True, "seppo.aaf_draws": 3, "seppo.noise": "shared"},
    "dpo": {"seppo.method": "dpo"},
    "sft": {"seppo.method": "sft", "seppo.caption_dropout": 0.5, "seppo.data.posterior": "mean"},
}


@pytest.mark.parametrize("case", CASES)
def test_run_equals_plain_loop(case: str, settings: Callable[..., dict[str, Any]], train: Callable[..., Path], tmp_path: Path,
                               pickapic: Path) -> None:
    changes = dict(CASES[case])
    if changes.pop("v", False):
        changes["seppo.model.path"] = str(tiny_sd(tmp_path / "model", "v_prediction"))
    if case == "dpo":
        changes["seppo.data.source"] = str(pickapic)
    # eps: where a gradient is nothing but rounding, Adam would divide it by itself and make a whole step of it.
    raw = settings(**{"optimizer.params": {"lr": 1e-3, "eps": 1e-5, "weight_decay": 0.01, "torch_adam": True},
                      "train_batch_size": 6, "train_micro_batch_size_per_gpu": 3, "seppo.seed": 0, "seppo.iterations": 3,
                      "seppo.beta": 300.0, "seppo.data.cache_dir": str(tmp_path / "cache"), **changes})
    run = train(raw)
    (cache,) = (tmp_path / "cache").iterdir()
    plain, tables, norms = plain_loop(raw, LatentCache(cache))

    assert apart(plain, unet_of(Path(raw["seppo"]["model"]["path"]))) > 2e-3, "the loop did not train"
    assert apart(weights(run), plain) < 1e-5

    logged = rows(run)
    assert len(logged) == len(tables) == 6
    for row, table, norm in zip(logged, tables, norms, strict=True):
        expected = {"loss": table[:, 0].mean(), "grad_norm": norm, "lr": 1e-3, "skipped_steps": 0}
        if case != "sft":
            names = ("model_mse_winner", "model_mse_loser", "ref_mse_winner", "ref_mse_loser")
            expected |= dict(zip(names, table[:, 1:5].mean(0), strict=True))
            expected |= {"aaf_rate": (table[:, 5] == -1).float().mean(), "implicit_acc": (table[:, 6] > 0).float().mean()}
            expected |= {f"logit_p{q:02}": table[:, 6].quantile(q / 100) for q in (5, 50, 95)}
            expected |= {"beta": table[0, 7]}
            gains = [table[:, 3] - table[:, 1], table[:, 4] - table[:, 2]]
            expected |= {"winner_gain": gains[0].mean(), "loser_gain": gains[1].mean()}
            assert row["winner_worse"] == pytest.approx(sum(gain < -1e-6 for gain in gains[0].tolist()) / len(gains[0]), abs=0.17)
        if case == "dpo":  # has no flipper
            assert "aaf_rate" not in row and expected.pop("aaf_rate") == 1
        for name, value in expected.items():
            assert row[name] == pytest.approx(float(value), rel=1e-3, abs=1e-3 if "logit" in name else 1e-6), (name, row["update"])
    if case.startswith("seppo"):
        assert [row["reference"] for row in logged] == [0, 0, 0, 0, 1, 1]
        assert any(row["aaf_rate"] < 1 for row in logged), "the flipper never flipped"
