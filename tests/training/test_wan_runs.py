"""Whole runs of Wan on clips against a plain loop that shares none of the trainer's code; on two ranks; killed and resumed.

The loop draws with diffusers' own pipeline. It takes from the package only what *defines* the data: the clips' latents, their
order, how random numbers are addressed, an adapter's start.
"""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from forked import Forks
from outcomes import Weights, apart, check_kill, check_rows
from tiny_wan import WAN_FRAMES, WAN_LATENTS, WAN_PIXELS
from torch import Tensor
from training.test_flow_runs import app_b2, policy_of

from seppo_fast.config import Lora
from seppo_fast.configfile import parse_config
from seppo_fast.data import ClipStream, LatentCache, Order, build_cache, open_source
from seppo_fast.models import open_model
from seppo_fast.models.lora import add_lora, trainable_weights
from seppo_fast.seeds import generator, normal

LORA = {"rank": 2, "alpha": 4.0}
SHIFT = 3.0  # of the tiny scheduler's times
STREAMED = {"seppo.data.video": {"frames": WAN_FRAMES, "choice": "window", "stride": 2}}


def opened(raw: dict[str, Any]) -> ClipStream | LatentCache:
    """The run's data, opened once more."""
    ours = parse_config(raw).seppo
    return build_cache(open_source(ours.data, False, ours.seed, video=True), open_model(ours.model.path, frames=WAN_FRAMES),
                       ours.data, seed=ours.seed, needs_loser=False, output_dir=Path(ours.output_dir), progress=False)


def plain_loop(raw: dict[str, Any], data: ClipStream | LatentCache) -> tuple[Weights, Weights, list[Tensor], list[float]]:
    """What is trained, before and after; by update the (pairs, 7) columns of `app_b2`, and the gradient norm."""
    ours, size, seed = raw["seppo"], raw["train_batch_size"], raw["seppo"]["seed"]
    order, pipeline = Order(len(data), seed), WanPipeline.from_pretrained(ours["model"]["path"])
    pipeline.set_progress_bar_config(disable=True)
    policy, config = pipeline.transformer.train(), pipeline.vae.config
    if "lora" in ours["model"]:
        add_lora(policy, Lora(**ours["model"]["lora"]), seed)
    weights = trainable_weights(policy)
    start = {key: value.detach().clone() for key, value in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-3, eps=1e-5, weight_decay=0.01)
    means, stds = (torch.tensor(values).view(-1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
    pool, tables, norms = [deepcopy(policy).eval()], [], []
    empty = data.embeddings([0])["prompt_embeds"]
    drawn = partial(pipeline, negative_prompt_embeds=empty, height=WAN_PIXELS, width=WAN_PIXELS, num_frames=WAN_FRAMES,
                    num_inference_steps=ours["sampler"]["steps"], guidance_scale=ours["sampler"]["guidance_scale"],
                    output_type="latent")
    for iteration in range(1, ours["iterations"] + 1):
        reference = pool[int(torch.randint(iteration, (), generator=generator(seed, "reference", iteration)))]
        pipeline.transformer = reference
        for update in range((iteration - 1) * ours["updates_per_iteration"], iteration * ours["updates_per_iteration"]):
            table = []
            for slot in range(update * size, (update + 1) * size):
                epoch, place = order.place(slot)
                row, draw = data.rows([place], [epoch]), partial(normal, WAN_LATENTS, seed, slots=[slot])
                prompt = data.embeddings(row.prompts)["prompt_embeds"]
                winner = (row.mean + row.std * draw("posterior") - means) / stds
                loser = drawn(prompt_embeds=prompt, latents=draw("initial noise")).frames
                noise, latents = torch.cat([draw("noise"), draw("loser noise")]), torch.cat([winner, loser])
                sigma = torch.randn((), generator=generator(seed, "timestep", slot)).sigmoid()
                sigma = SHIFT * sigma / (1 + (SHIFT - 1) * sigma)
                # Of TI2V-5B each token of 2 x 2 latents has a time.
                times = (1000 * sigma).expand(2, 2 * 4 * 4) if pipeline.config.expand_timesteps else (1000 * sigma).expand(2)
                given = dict(hidden_states=(1 - sigma) * latents + sigma * noise, timestep=times,
                             encoder_hidden_states=prompt.expand(2, -1, -1))
                with torch.no_grad():
                    ref = reference(**given).sample
                table.append(app_b2(noise - latents, policy(**given).sample, ref, ours["beta"]))
                (table[-1][0] / size).backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(weights.values(), raw["gradient_clipping"])))
            optimizer.step()
            optimizer.zero_grad()
            tables.append(torch.stack(table).detach())
        pool.append(deepcopy(policy).eval())
    return start, {key: value.detach() for key, value in weights.items()}, tables, norms


BF16_LORA = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}, "seppo.model.lora": LORA}
CASES = {"all weights, cached": {}, "LoRA, decoded while it trains": {"seppo.model.lora": LORA, **STREAMED}}


@pytest.mark.parametrize("case", CASES)
def test_run_equals_plain_loop(case: str, of_wan: Any, train: Callable[..., Path]) -> None:
    raw = of_wan(**CASES[case])
    run = train(raw)
    data = opened(raw)
    assert isinstance(data, LatentCache if "cached" in case else ClipStream) and (len(data), data.shape) == (6, WAN_LATENTS)
    start, plain, tables, norms = plain_loop(raw, data)
    data.close()
    assert apart(plain, start) > 1e-3, "the loop did not train"
    assert apart(policy_of(run), plain) < 1e-5
    check_rows(run, tables, norms)


def test_cached_clips_are_the_streamed_ones(of_wan: Any) -> None:
    """Whole clips: the VAE of videos sees their frames together."""
    cached, streamed = (opened(of_wan(**{"seppo.data.cache_latents": kept})) for kept in ("auto", False))
    assert isinstance(cached, LatentCache) and isinstance(streamed, ClipStream)
    one, other = (data.rows(range(6), [0] * 6) for data in (cached, streamed))
    streamed.close()
    assert torch.equal(one.mean, other.mean) and torch.equal(one.std, other.std) and one.captions == other.captions
    assert one.mean.shape == (6, *WAN_LATENTS) and one.mean.std() > 0.1


@pytest.mark.parametrize("changes", [STREAMED, BF16_LORA], ids=["streamed", "bf16 LoRA, ZeRO 2"])
def test_ranks_and_a_kill_change_nothing(changes: dict[str, Any], of_wan: Any, train: Callable[..., Path], forks: Forks,
                                         tmp_path: Path) -> None:
    one, two, killed = (of_wan(**changes, **{"seppo.output_dir": str(tmp_path / name)}) for name in ("one", "two", "killed"))
    assert forks.run(two, ranks=2).statuses == [0, 0]
    if changes is STREAMED:  # sums in bf16 differ
        train(one)
        assert apart(policy_of(tmp_path / "one"), policy_of(tmp_path / "two")) < 2e-6
    check_kill(forks, killed, tmp_path / "killed", tmp_path / "two")
