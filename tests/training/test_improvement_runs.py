"""Both stages of iterative DPO with an improvement model, weight for weight, against plain loops that share none of their code.

The loops take from the package only what *defines* the data: cached latents, their order, and how random numbers are addressed.
"""

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from outcomes import apart, rows, unet_of, weights
from tiny import NARROW, take_encoders, tiny_improvement, tiny_sd

from seppo_fast.data.latents import LatentCache
from seppo_fast.data.order import Order
from seppo_fast.seeds import generator, normal

ALPHAS = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)
SCALE = 0.18215


def run_settings(settings, tmp_path, **changes) -> dict[str, Any]:
    # eps: where a gradient is nothing but rounding, Adam would divide it by itself and make a whole step of it.
    return settings(**{"optimizer.params": {"lr": 1e-3, "eps": 1e-5, "weight_decay": 0.01, "torch_adam": True},
                       "train_batch_size": 6, "train_micro_batch_size_per_gpu": 3, "seppo.seed": 0,
                       "seppo.data.cache_dir": str(tmp_path / "cache"), **changes})


def cache_of(tmp_path: Path) -> LatentCache:
    (folder,) = (tmp_path / "cache").iterdir()
    return LatentCache(folder)


def timestep(seed: int, slot: int) -> int:
    return int(torch.randint(1000, (), generator=generator(seed, "timestep", slot)))


def stage_one(raw: dict[str, Any], cache: LatentCache) -> tuple[dict, list[dict[str, list[float]]]]:
    """Eq. 6, 7, 8, one picture at a time: trained weights, and the errors by update and task."""
    ours, size, seed = raw["seppo"], raw["train_batch_size"], raw["seppo"]["seed"]
    shares, order = ours["improvement"]["tasks"], Order(len(cache), ours["seed"])
    policy = UNet2DConditionModel.from_pretrained(ours["model"]["path"], subfolder="unet").train()
    wide = torch.nn.Conv2d(8, policy.conv_in.out_channels, 3, padding=1)
    wide.weight.data[:, :4], wide.weight.data[:, 4:], wide.bias.data[:] = policy.conv_in.weight.data, 0, policy.conv_in.bias.data
    policy.conv_in = wide
    v = DDIMScheduler.from_pretrained(ours["model"]["path"], subfolder="scheduler").config.prediction_type == "v_prediction"
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, eps=1e-5, weight_decay=0.01)
    found = []
    for update in range(ours["iterations"] * ours["updates_per_iteration"]):
        found.append({"improve": [], "reconstruct": [], "unconditional": []})
        for slot in range(update * size, (update + 1) * size):
            row = cache.rows([order.row(slot)])
            u, half = torch.rand(2, generator=generator(seed, "task", slot), dtype=torch.double).tolist()
            task = ("improve" if u < shares["improve"] else
                    "reconstruct" if u < shares["improve"] + shares["reconstruct"] else "unconditional")
            better = (row.mean, row.std)
            worse = (row.loser_mean, row.loser_std)
            mean, std = better if task == "improve" or half < 0.5 else worse
            image = {"improve": worse[0], "reconstruct": mean, "unconditional": torch.zeros_like(mean)}[task]
            prompt = cache.embeddings(row.prompts if task == "improve" else [0])["prompt_embeds"]
            draw = partial(normal, cache.shape, seed, slots=[slot])
            x, noise, t = SCALE * (mean + std * draw("posterior")), draw("noise"), timestep(seed, slot)
            a, b = ALPHAS[t].sqrt(), (1 - ALPHAS[t]).sqrt()
            got = policy(torch.cat([a * x + b * noise, image], 1), t, prompt).sample
            loss = F.mse_loss(got, a * noise - b * x if v else noise)
            (loss / size).backward()
            found[-1][task].append(loss.item())
        torch.nn.utils.clip_grad_norm_(policy.parameters(), raw["gradient_clipping"])
        optimizer.step()
        optimizer.zero_grad()
    return policy.state_dict(), found


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_stage_one_equals_a_plain_loop(prediction, settings, train, tmp_path, pickapic):
    raw = run_settings(settings, tmp_path, **{
        "seppo.method": "improvement", "seppo.data.source": str(pickapic), "seppo.data.flip": False,
        "seppo.model.path": str(tiny_sd(tmp_path / "model", prediction, **NARROW)),
        "seppo.improvement": {"tasks": {"improve": 0.5, "reconstruct": 0.25, "unconditional": 0.25}}})
    run = train(raw)
    plain, found = stage_one(raw, cache_of(tmp_path))
    assert apart(weights(run), plain) < 1e-5
    assert plain["conv_in.weight"][:, 4:].norm() > 1e-3, "the image's weights did not move"
    logged = rows(run)
    assert len(logged) == len(found) == 4
    seen = set()
    for row, errors in zip(logged, found, strict=True):
        every = [error for values in errors.values() for error in values]
        assert row["loss"] == pytest.approx(sum(every) / len(every), rel=1e-4)
        for task, values in errors.items():
            assert (f"loss_{task}" in row) == bool(values)
            if values:
                seen.add(task)
                assert row[f"loss_{task}"] == pytest.approx(sum(values) / len(values), rel=1e-4)
    assert seen == {"improve", "reconstruct", "unconditional"}
    assert logged[-1]["image_weight_norm"] == pytest.approx(plain["conv_in.weight"][:, 4:].norm().item(), rel=1e-4)
    assert logged[-1]["image_weight_norm"] > logged[0]["image_weight_norm"] > 0


def stage_two(raw: dict[str, Any], cache: LatentCache) -> dict:
    """Iterative DPO (Eq. 10), one pair at a time."""
    ours, size, seed = raw["seppo"], raw["train_batch_size"], raw["seppo"]["seed"]
    load = partial(UNet2DConditionModel.from_pretrained, subfolder="unet")
    policy, improver = load(ours["model"]["path"]).train(), load(ours["improvement"]["path"]).eval()
    reference = load(ours.get("reference_model", {}).get("path") or ours["model"]["path"]).eval()
    ddim = DDIMScheduler.from_pretrained(ours["model"]["path"], subfolder="scheduler", clip_sample=False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, eps=1e-5, weight_decay=0.01)
    order, count, updates = Order(len(cache), seed), ours["sampler"].get("samples_per_iteration"), ours["updates_per_iteration"]
    empty = cache.embeddings([0])["prompt_embeds"]
    text, image_scale = ours["improvement"]["guidance_scale"], ours["improvement"]["image_guidance_scale"]

    @torch.no_grad()
    def drawn(drawer, number):
        prompt = cache.embeddings(cache.rows([order.row(number)]).prompts)["prompt_embeds"]
        ddim.set_timesteps(ours["sampler"]["steps"])
        x = normal(cache.shape, seed, "initial noise", [number])
        for t in ddim.timesteps:
            u, c = (drawer(x, t, given).sample for given in (empty, prompt))
            x = ddim.step(u + ours["sampler"]["guidance_scale"] * (c - u), t, x).prev_sample
        loser, x = x, normal(cache.shape, seed, "improvement noise", [number])
        condition, nothing = loser / SCALE, torch.zeros_like(loser)
        for t in ddim.timesteps:
            u, i, c = (improver(torch.cat([x, picture], 1), t, given).sample
                       for picture, given in ((nothing, empty), (condition, empty), (condition, prompt)))
            x = ddim.step(u + image_scale * (i - u) + text * (c - i), t, x).prev_sample
        return x, loser, prompt

    for k in range(1, ours["iterations"] + 1):
        drawer = deepcopy(policy).eval()
        walk = Order(count, generator(seed, "samples", k).initial_seed()) if count else None
        for update in range((k - 1) * updates, k * updates):
            for slot in range(update * size, (update + 1) * size):
                place = slot - (k - 1) * updates * size
                winner, loser, prompt = drawn(drawer, (k - 1) * count + walk.row(place) if count else slot)
                draw = partial(normal, cache.shape, seed, slots=[slot])
                x, noise, t = torch.cat([winner, loser]), torch.cat([draw("noise"), draw("loser noise")]), timestep(seed, slot)
                a, b = ALPHAS[t].sqrt(), (1 - ALPHAS[t]).sqrt()
                batch = (a * x + b * noise, t, prompt.expand(2, -1, -1))
                with torch.no_grad():
                    q = (reference(*batch).sample - noise).pow(2).mean(dim=(1, 2, 3))
                m = (policy(*batch).sample - noise).pow(2).mean(dim=(1, 2, 3))
                loss = -F.logsigmoid(-0.5 * ours["beta"] * ((m[0] - q[0]) - (m[1] - q[1])))
                (loss / size).backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), raw["gradient_clipping"])
            optimizer.step()
            optimizer.zero_grad()
    return policy.state_dict()


@pytest.mark.parametrize("count", [None, 8])
def test_stage_two_equals_a_plain_loop(count, settings, train, tmp_path, sd):
    changes = {} if count is None else {"seppo.sampler.samples_per_iteration": count, "seppo.sampler.batch_size": 3,
                                        "seppo.reference_model": {"path": str(tiny_sd(tmp_path / "other", seed=5, **NARROW))}}
    raw = run_settings(settings, tmp_path, **{
        "seppo.method": "iterative_dpo", "seppo.beta": 30.0, "seppo.iterations": 3,
        "seppo.improvement": {"path": str(tiny_improvement(tmp_path / "improvement", sd)), "guidance_scale": 2.0,
                              "image_guidance_scale": 1.5}, **changes})
    if count:  # of other encoders the policy's model would be refused
        take_encoders(tmp_path / "other", sd)
    run = train(raw)
    plain = stage_two(raw, cache_of(tmp_path))
    assert apart(plain, unet_of(sd)) > 2e-3, "the loop did not train"
    assert apart(weights(run), plain) < 1e-5
    assert [row["reference"] for row in rows(run)] == [0] * 6
    assert all(0 <= row["implicit_acc"] <= 1 and "aaf_rate" not in row for row in rows(run))
