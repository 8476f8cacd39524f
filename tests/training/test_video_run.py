"""Text-to-video runs: against a plain loop, stopped and resumed in mid-epoch, on two ranks, and what they leave behind."""

import json
import re
import signal
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from data.video_files import pictures, write_csv, write_video
from diffusers import AnimateDiffPipeline, DDIMScheduler, UNetMotionModel
from forked import Forks, Strike
from outcomes import apart, rows, weights
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_adapter, tiny_animatediff, tiny_sd
from torch import Tensor

from seppo_fast.configfile import parse_config
from seppo_fast.data import ClipStream, Order, build_cache, open_source
from seppo_fast.data.latents import LatentCache
from seppo_fast.evaluation.files import read_video
from seppo_fast.evaluation.video.real import read_clip
from seppo_fast.models import open_model
from seppo_fast.seeds import generator, normal
from seppo_fast.training.trainer import Trainer

LORA = {"rank": 2, "alpha": 4.0}
FRAMES = 4
MOTION_MODULES = {"seppo.model.lora": None, "seppo.model.gradient_checkpointing": True, "seppo.reference_score": "rollout",
                  "seppo.sampler.window": "iteration"}
CAPTIONS = ("a photo of the red cat", "the blue sky", "a dog")


@pytest.fixture(scope="session")
def animatediff(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny AnimateDiff pipeline directory: 16x16 pixels, (4, F, 8, 8) latents, positions for 8 frames."""
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return tiny_animatediff(tmp_path_factory.mktemp("models") / "animatediff", channels=(8,), **blocks)


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV in MagicTime's form and ten VP9 clips of 9 to 18 frames, every other one a time-lapse; and three bad files."""
    folder = tmp_path_factory.mktemp("clips")
    for i in range(10):
        write_video(folder / f"clip{i}.webm", pictures(9 + i, 20, 24 + 2 * i, seed=i))
    good = (folder / "clip9.webm").read_bytes()
    (folder / "torn.webm").write_bytes(good[: len(good) // 2])
    (folder / "empty.webm").write_bytes(b"")
    (folder / "text.mp4").write_text("no video")
    names = [*(f"clip{i}" for i in range(10)), "torn", "empty", "text"]
    return write_csv(folder / "clips.csv", [(name, CAPTIONS[i % 3], i % 2) for i, name in enumerate(names)])


@pytest.fixture
def video_settings(settings: Callable[..., dict[str, Any]], animatediff: Path, clips: Path) -> Callable[..., dict[str, Any]]:
    """The small configuration with videos in place of pictures: LoRA, clips decoded while it trains."""

    def make(**changes: Any) -> dict[str, Any]:
        return settings(**{
            "optimizer.params": {"lr": 1e-3, "eps": 1e-5, "torch_adam": True}, "train_batch_size": 4,
            "train_micro_batch_size_per_gpu": 2, "seppo.model.path": str(animatediff), "seppo.model.lora": LORA,
            "seppo.beta": 300.0, "seppo.data.source": str(clips), "seppo.data.max_skipped": 0.3,
            "seppo.data.video": {"frames": FRAMES, "stride": 2},
            "seppo.data.workers": 2, "seppo.sampler.batch_size": 4, "seppo.sampler.steps": 2, **changes})

    return make


@pytest.fixture
def run_of(video_settings: Any, train: Callable[..., Path], finished: dict[str, Path],
           tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`run_of(**changes)` is the folder of a finished run; each is made once."""

    def once(**changes: Any) -> Path:
        key = json.dumps(changes, sort_keys=True)
        if key not in finished:
            folder = tmp_path_factory.mktemp("runs") / "run"
            finished[key] = train(video_settings(**{"seppo.output_dir": str(folder), **changes}))
        return finished[key]

    return once


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Trainer]]:
    """The trainers of the runs made meanwhile."""
    made, loop = [], Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self: (made.append(self), loop(self)))
    yield made


def plain_loop(raw: dict[str, Any], data: ClipStream | LatentCache) -> tuple[dict[str, Tensor], list[float]]:
    """The trained adapter and each update's loss, by a loop of its own: one pair at a time, PEFT, DDIM, App. B.2 as printed.

    From the package come only the clips' latents, their order, and how random numbers are addressed.
    """
    ours, size, seed = raw["seppo"], raw["train_batch_size"], raw["seppo"].get("seed", 0)
    order = Order(len(data), seed)
    policy = UNetMotionModel.from_pretrained(ours["model"]["path"], subfolder="unet").requires_grad_(False)
    targets = [name for name, _ in policy.named_modules()
               if "motion_modules" in name and name.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
    torch.manual_seed(seed)
    policy.add_adapter(LoraConfig(r=2, lora_alpha=4.0, target_modules=targets), "default")
    policy.train()
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    ddim = DDIMScheduler.from_pretrained(ours["model"]["path"], subfolder="scheduler")
    optimizer = torch.optim.AdamW(trained, lr=1e-3, eps=1e-5)
    alphas = (1 - torch.linspace(0.00085, 0.012, 1000)).cumprod(0)
    pool, losses = [deepcopy(policy).eval()], []
    empty = data.embeddings([0])["prompt_embeds"]

    def ask(unet: torch.nn.Module, latents: Tensor, t: int, prompt: Tensor) -> Tensor:
        return unet(latents, t, prompt.repeat_interleave(FRAMES, dim=0)).sample

    for k in range(1, ours["iterations"] + 1):
        reference = pool[int(torch.randint(k, (), generator=generator(seed, "reference", k)))]
        for update in range((k - 1) * ours["updates_per_iteration"], k * ours["updates_per_iteration"]):
            total = 0.0
            for slot in range(update * size, (update + 1) * size):
                epoch, place = divmod(slot, len(data))
                row = data.rows([order.row(slot)], [epoch])
                assert order.place(slot) == (epoch, order.row(slot)) and 0 <= place < len(data)
                prompt = data.embeddings(row.prompts)["prompt_embeds"]
                draw = partial(normal, data.shape, seed, slots=[slot])
                winner = 0.18215 * (row.mean + row.std * draw("posterior"))
                loser = draw("initial noise")
                ddim.set_timesteps(ours["sampler"]["steps"])
                with torch.no_grad():
                    for t in ddim.timesteps:
                        without, given = ask(reference, loser, t, empty), ask(reference, loser, t, prompt)
                        guided = without + ours["sampler"]["guidance_scale"] * (given - without)
                        loser = ddim.step(guided, t, loser).prev_sample
                t = int(torch.randint(1000, (), generator=generator(seed, "timestep", slot)))
                noise = torch.cat([draw("noise"), draw("loser noise")])
                noisy = alphas[t].sqrt() * torch.cat([winner, loser]) + (1 - alphas[t]).sqrt() * noise
                both = prompt.expand(2, -1, -1)
                model_losses = (ask(policy, noisy, t, both) - noise).pow(2).mean(dim=[1, 2, 3, 4])
                with torch.no_grad():
                    ref_losses = (ask(reference, noisy, t, both) - noise).pow(2).mean(dim=[1, 2, 3, 4])
                sign = 1.0 if model_losses[0] - ref_losses[0] > 0 else -1.0
                model_diff, ref_diff = (values[0] + sign * values[1] for values in (model_losses, ref_losses))
                loss = -F.logsigmoid(-0.5 * ours["beta"] * (model_diff - ref_diff))
                (loss / size).backward()
                total += float(loss) / size
            torch.nn.utils.clip_grad_norm_(trained, raw["gradient_clipping"])
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
        pool.append(deepcopy(policy).eval())
    names = {name: weight.detach() for name, weight in policy.named_parameters() if weight.requires_grad}
    return {"unet." + name.replace(".default", ""): weight for name, weight in names.items()}, losses


def opened(raw: dict[str, Any]) -> ClipStream | LatentCache:
    """The run's data, opened once more."""
    config = parse_config(raw).seppo
    model = open_model(config.model.path)
    return build_cache(open_source(config.data, False, config.seed, video=True), model, config.data, seed=config.seed,
                       needs_loser=False, output_dir=Path(config.output_dir), progress=False)


@pytest.mark.parametrize("choice", ["dynamic", "uniform"])
def test_lora_run_equals_plain_loop(choice: str, video_settings: Any, train: Callable[..., Path], trainers: list[Trainer]) -> None:
    """`dynamic` is decoded while it trains, and an epoch (10 clips) ends within the 12 pairs; `uniform` is cached.

    With seed 2 the second iteration's reference is policy 1.
    """
    raw = video_settings(**{"seppo.data.video.choice": choice, "train_batch_size": 6, "train_micro_batch_size_per_gpu": 3,
                            "seppo.iterations": 2, "seppo.updates_per_iteration": 1, "seppo.seed": 2})
    run = train(raw)
    assert isinstance(trainers[0].pairs.cache, ClipStream if choice == "dynamic" else LatentCache)
    data = opened(raw)
    assert len(data) == 10 and data.shape == (4, FRAMES, 8, 8)
    plain, losses = plain_loop(raw, data)
    data.close()
    assert apart(weights(run), plain) < 1e-5
    start = load_file(run / "pool" / "policy_00000.safetensors")
    assert apart({"unet." + name.replace(".default", ""): weight for name, weight in start.items()}, plain) > 1e-3
    assert [row["loss"] for row in rows(run)] == pytest.approx(losses, rel=1e-3)
    assert rows(run)[0]["loss"] == pytest.approx(0.6931, abs=1e-4) and [row["reference"] for row in rows(run)] == [0, 1]


def test_bad_files_are_listed_and_the_rest_is_trained_on(run_of: Callable[..., Path]) -> None:
    run = run_of()
    skipped = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert [row["key"] for row in skipped] == ["clips.csv:12", "clips.csv:13", "clips.csv:14"]
    assert len(rows(run)) == 4 and all(row["loss"] > 0 for row in rows(run))


def test_prompts_that_are_embedded_while_it_trains_change_nothing(run_of: Callable[..., Path]) -> None:
    assert apart(weights(run_of()), weights(run_of(**{"seppo.data.cache_prompts": False}))) == 0


@pytest.fixture(scope="module")
def finished_trainer() -> dict[str, Any]:
    """One run's trainer and folder, for the tests that look at both."""
    return {}


@pytest.fixture
def trained(finished_trainer: dict[str, Any], video_settings: Any, train: Callable[..., Path], trainers: list[Trainer],
            tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    """A trainer that has finished, with a grid of two prompts, and its run folder."""
    if not finished_trainer:
        folder = tmp_path_factory.mktemp("trained") / "run"
        grids = {"every": 4, "prompts": ["a dog", "the sky"]}
        run = train(video_settings(**{"seppo.output_dir": str(folder), "seppo.samples": grids}))
        finished_trainer.update(trainer=trainers[0], run=run)
    return finished_trainer["trainer"], finished_trainer["run"]


def test_the_adapter_loads_in_plain_diffusers_and_draws_the_trainers_own_sample(trained: tuple[Trainer, Path],
                                                                                animatediff: Path) -> None:
    trainer, run = trained
    assert sorted(path.name for path in (run / "final").iterdir()) == ["README.md", "pytorch_lora_weights.safetensors"]
    noise = normal((4, FRAMES, 8, 8), 0, "grid", range(2))  # the grid's
    settings = trainer.settings.sampler
    trainer.reference.take(2)
    own = trainer.reference.sampler.draw(noise, trainer.looks.grids.conditions)

    pipeline = AnimateDiffPipeline.from_pretrained(animatediff)
    pipeline.set_progress_bar_config(disable=True)
    draw = partial(pipeline, ["a dog", "the sky"], num_frames=FRAMES, height=16, width=16, num_inference_steps=settings.steps,
                   guidance_scale=settings.guidance_scale, output_type="latent")
    base = draw(latents=noise).frames
    pipeline.load_lora_weights(run / "final")
    theirs = draw(latents=noise).frames
    torch.testing.assert_close(own, theirs, rtol=1e-3, atol=1e-3)
    assert (base - theirs).abs().max() > 10 * (own - theirs).abs().max()

    with Image.open(run / "samples" / "update_00000004.webp") as sheet:
        assert sheet.n_frames == FRAMES and sheet.size == (128, 2 * 145 - 1)
    card = (run / "final" / "README.md").read_text()
    assert "text-to-video" in card and f"{FRAMES} frames a clip (dynamic)" in card and "load_lora_weights" in card


def test_a_swap_changes_the_samples_and_nothing_else(trained: tuple[Trainer, Path]) -> None:
    trainer, _ = trained
    policy, reference = dict(trainer.engine.module.named_parameters()), dict(trainer.reference.module.named_parameters())
    for name, weight in policy.items():
        assert (weight.data_ptr() == reference[name].data_ptr()) == ("lora_" not in name), f"{name}: one base, two adapters"
    before = {name: weight.detach().clone() for name, weight in (policy | {"": torch.get_rng_state()}).items()}
    frozen = {name: weight.detach().clone() for name, weight in reference.items() if "lora_" not in name}
    noise, samples = normal((4, FRAMES, 8, 8), 1, "any", range(2)), []
    for index in (0, 2, 0):
        trainer.reference.take(index)
        samples.append(trainer.reference.sampler.draw(noise, trainer.looks.grids.conditions))
    assert torch.equal(samples[0], samples[2]) and (samples[0] - samples[1]).abs().max() > 1e-4
    assert torch.equal(before.pop(""), torch.get_rng_state())
    assert all(torch.equal(weight, policy[name]) for name, weight in before.items())
    assert all(torch.equal(weight, reference[name]) for name, weight in frozen.items())


def test_the_motion_modules_by_themselves(run_of: Callable[..., Path], animatediff: Path) -> None:
    """Scored ahead, too: the reference shares the policy's base, and stays where it is."""
    run = run_of(**MOTION_MODULES)
    pipeline = AnimateDiffPipeline.from_pretrained(run / "final")
    base = AnimateDiffPipeline.from_pretrained(animatediff)
    trained, source = pipeline.unet.state_dict(), base.unet.state_dict()
    moved = {name for name in trained if not torch.equal(trained[name], source[name])}
    assert moved and all("motion_modules" in name for name in moved)
    assert len(moved) > 0.9 * sum("motion_modules" in name and "pos_embed" not in name for name in trained)
    pooled = load_file(run / "pool" / "policy_00002.safetensors")
    assert all("motion_modules" in name for name in pooled)
    assert all(torch.equal(pooled[name], trained[name]) for name in pooled)
    assert rows(run)[0]["aaf_rate"] == 1 and rows(run)[0]["logit_p95"] == 0, "the policy is its reference: all ties"


def test_scores_made_ahead_are_those_of_training(run_of: Callable[..., Path]) -> None:
    online, ahead = run_of(), run_of(**{"seppo.reference_score": "rollout", "seppo.sampler.window": "iteration"})
    assert apart(weights(online), weights(ahead)) < 1e-5


@pytest.mark.parametrize("changes", [{}, MOTION_MODULES], ids=["lora", "motion modules"])
def test_clips_are_scored_on_the_way(changes: dict[str, Any], run_of: Callable[..., Path], clips: Path) -> None:
    """Beside real ones, by numbers that are computed here from the files; training does not notice."""
    run = run_of(**changes, **{"seppo.evaluation": {"every": 2, "prompts": str(clips), "limit": 2, "scores": ["psnr", "ssim"],
                                                    "real": str(clips.parent), "keep_best": True}})
    values = {row["update"]: row["eval_psnr"] for row in rows(run) if "loss" not in row}
    assert list(values) == [0, 2, 4] and len(set(values.values())) == 3
    real = {CAPTIONS[i]: read_clip(clips.parent / f"clip{i}.webm", FRAMES, 16) for i in range(2)}
    for update, value in values.items():
        folder = run / "evaluation" / "samples" / f"update_{update:08d}"
        drawn = {text: read_video(next(folder.glob(f"{text.replace(' ', '-')}-*.webp")), FRAMES) for text in real}
        decibels = [-10 * (drawn[text] - real[text]).square().mean((1, 2, 3)).log10().mean() for text in real]
        assert value == pytest.approx(float(sum(decibels)) / 2, rel=1e-4)
    assert apart(weights(run), weights(run_of(**changes))) == 0


def test_two_ranks_with_zero_2_train_the_same_model(video_settings: Any, run_of: Callable[..., Path], forks: Forks,
                                                    tmp_path: Path) -> None:
    raw = video_settings(**{"zero_optimization": {"stage": 2}, "seppo.output_dir": str(tmp_path / "two")})
    done = forks.run(raw, ranks=2)
    assert done.statuses == [0, 0], done.output[-2000:]
    one, two = run_of(), tmp_path / "two"
    assert apart(weights(one), weights(two)) < 5e-6
    assert [row["loss"] for row in rows(two)] == pytest.approx([row["loss"] for row in rows(one)], rel=1e-4)


def test_held_out_clips_are_measured_alike_by_two_ranks(video_settings: Any, run_of: Callable[..., Path], forks: Forks,
                                                        tmp_path: Path) -> None:
    """Three of ten, which are decoded while it trains like the others."""
    held = {"seppo.data.hold_out": 3, "seppo.evaluation": {"every": 2}, "seppo.iterations": 1}
    done = forks.run(video_settings(**held, **{"seppo.output_dir": str(tmp_path / "two")}), ranks=2)
    assert done.statuses == [0, 0], done.output[-2000:]
    one, two = ({row["update"]: row["heldout_winner_gain"] for row in rows(run) if "loss" not in row}
                for run in (run_of(**held), tmp_path / "two"))
    assert one == pytest.approx(two, rel=1e-3, abs=1e-7) and one[0] == two[0] == 0.0 and abs(one[2]) > 1e-6


def test_resumed_in_mid_epoch_it_ends_with_the_same_bytes(forks: Forks, video_settings: Any, tmp_path: Path) -> None:
    """Ten clips an epoch, 4 pairs an update: killed in epoch 0, then stopped in the middle of the window where epoch 1 begins."""
    raws = {name: video_settings(**{"seppo.output_dir": str(tmp_path / name), "seppo.checkpoint.every": 1})
            for name in ("whole", "broken")}
    done = forks.run(raws["whole"])
    assert done.status == 0, done.output[-2000:]
    objective = "seppo_fast.training.objective:Objective.__call__"
    for strike in (Strike(objective, 4), Strike(objective, 3, signal.SIGTERM)):
        stopped = forks.run(raws["broken"], "--resume", "auto", strike=strike)
        assert stopped.status == (0 if strike.signum == signal.SIGTERM else -signal.SIGKILL), stopped.output[-2000:]
    assert "SIGTERM: stopping after this micro-batch, with a checkpoint" in stopped.output
    resumed = forks.run(raws["broken"], "--resume", "auto")
    assert resumed.status == 0 and "resuming from" in resumed.output, resumed.output[-2000:]
    final = "final/pytorch_lora_weights.safetensors"
    whole, broken = (Path(raw["seppo"]["output_dir"]) for raw in raws.values())
    assert (whole / final).read_bytes() == (broken / final).read_bytes()
    assert [row["loss"] for row in rows(whole)] == [row["loss"] for row in rows(broken)]


def test_an_image_model_with_a_motion_adapter_trains(video_settings: Any, train: Callable[..., Path], tmp_path: Path,
                                                     capsys: pytest.CaptureFixture) -> None:
    """The sampler's batch size is measured for videos, too."""
    image = tiny_sd(tmp_path / "image", block_out_channels=(8, 16))
    adapter = tiny_adapter(tmp_path / "adapter", block_out_channels=(8, 16))
    run = train(video_settings(**{"seppo.model.path": str(image), "seppo.model.motion_adapter": str(adapter), "seppo.iterations": 1,
                                  "seppo.updates_per_iteration": 1, "seppo.model.channels_last": True,
                                  "seppo.sampler.batch_size": "auto"}))
    assert re.search(r"sampler: batches of [124]: ", capsys.readouterr().out)
    found: dict[str, Any] = {}
    usage = (run / "final" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(usage.replace("FOLDER", repr(str(run / "final"))), found)
    assert found["pipeline"].scheduler.config.beta_schedule == "linear"
    frames = found["pipeline"]("a cat", num_frames=FRAMES, height=16, width=16, num_inference_steps=2, output_type="pt").frames
    assert frames.shape == (1, FRAMES, 3, 16, 16) and torch.isfinite(frames).all()
