"""The ways to make rollouts cheaper, each as changes of the paper's setting, and the tasks on which they are measured."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.ablation import runs as ablation
from benchmarks.by_seed import assignments

BASE, DISTILLED, PAPER, SFT = "base", "distilled", "paper", "sft"
DRAWN, TIMED = "drawn", "timed"  # no ways: what each one draws with the base, and its seconds
ADAPTER = "adapter"  # the folder of a seed's LoRA file


@dataclass(frozen=True)
class Settings(ablation.Settings):
    """The ablation's, with the paper's 50 steps, and fewer pairs for that. `judged_every`: iterations between two policies that are
    judged. `obvious_updates` is not used any more, but in the settings.json of runs that are made."""

    task: str = "digits"
    updates: int = 8
    batch_size: int = 20
    sampler_steps: int = 50
    judge_samples: int = 200
    judged_every: int = 2
    obvious_updates: int = 2


@dataclass(frozen=True)
class Way:
    """A row of the table: what it changes in `paper`. `adapter`: it draws with the seed's distilled LoRA."""

    label: str
    sampler: Mapping[str, object] = field(default_factory=dict)
    reuse: int = 1
    adapter: bool = False


ONE_STEP = Way("one unguided step", {"steps": 1, "guidance_scale": 1})
INTERVAL = [0.2, 0.8]


def guided_in(low: float, high: float) -> Way:
    return Way(f"guidance in [{low:g}, {high:g}]", {"guidance_interval": f"[{low}, {high}]"})


UNET_WAYS = {
    PAPER: Way("DDIM, 50 steps, guided"),
    "ddim_20": Way("DDIM, 20 steps", {"steps": 20}),
    "ddim_10": Way("DDIM, 10 steps", {"steps": 10}),
    "dpmsolver_20": Way("DPM-Solver++, 20 steps", {"solver": "dpmsolver++", "steps": 20}),
    "dpmsolver_10": Way("DPM-Solver++, 10 steps", {"solver": "dpmsolver++", "steps": 10}),
    "unipc_10": Way("UniPC, 10 steps", {"solver": "unipc", "steps": 10}),
    "interval": guided_in(*INTERVAL),
    "every_2": Way("unconditional branch every 2nd step", {"unconditional_every": 2}),
    "every_4": Way("unconditional branch every 4th step", {"unconditional_every": 4}),
    "reuse_2": Way("each rollout used twice", reuse=2),
    "reuse_4": Way("each rollout used 4 times", reuse=4),
    "adapter": Way("consistency LoRA, 4 LCM steps", {"solver": "lcm", "steps": 4, "guidance_scale": 1}, adapter=True),
    "one_step": ONE_STEP,
    "best": Way("together: DPM-Solver++, 10 steps, guidance in [0.2, 0.8], used twice",
                {"solver": "dpmsolver++", "steps": 10, "guidance_interval": "[0.2, 0.8]"}, reuse=2),
    "fast": Way("DPM-Solver++, 20 steps, guidance in [0.07, 0.81], unconditional branch every 2nd step",
                {"solver": "dpmsolver++", "steps": 20, "guidance_interval": "[0.07, 0.81]", "unconditional_every": 2}),
    SFT: Way("SFT"),
}
OF_DITTO = (PAPER, "ddim_10", "dpmsolver_10", "unipc_10", "interval", "every_2", "reuse_4", "adapter", "one_step", "best", "fast",
            SFT)
FLOW_WAYS = {
    PAPER: Way("Euler, 50 steps, guided"),
    "euler_20": Way("Euler, 20 steps", {"steps": 20}),
    "euler_8": Way("Euler, 8 steps", {"steps": 8}),
    "unipc_10": Way("UniPC, 10 steps", {"solver": "unipc", "steps": 10}),
    "interval": guided_in(*INTERVAL),
    "reuse_2": Way("each rollout used twice", reuse=2),
    "adapter": Way("turbo LoRA, 4 Euler steps", {"steps": 4, "guidance_scale": 1}, adapter=True),
    "one_step": ONE_STEP,
    "best": Way("together: UniPC, 10 steps, guidance in [0.2, 0.8], used twice",
                {"solver": "unipc", "steps": 10, "guidance_interval": "[0.2, 0.8]"}, reuse=2),
    SFT: Way("SFT"),
}


@dataclass(frozen=True)
class Task:
    """A model, its data and its training; the `ways` that are compared on it, `paper` first. `obvious`: whether the obvious trainer
    makes the same step, and is timed, too."""

    title: str
    settings: Settings
    ways: Mapping[str, Way]
    method: str = "seppo"
    obvious: bool = False

    @property
    def methods(self) -> list[str]:
        """What is made by default."""
        return [*self.ways, DRAWN, TIMED]


TASKS = {
    "digits": Task("digits, UNet", Settings(), UNET_WAYS, obvious=True),
    # Without AAF nothing cancels the losers' pushes: on seeds 10 to 12 the poorest losers end below good ones.
    "ditto": Task("digits, UNet, DITTO", Settings(task="ditto", lr=1e-4, beta=2000.0), {way: UNET_WAYS[way] for way in OF_DITTO},
                  method="ditto"),
    "flow": Task("digits, flow", Settings(task="flow", model="flow", denoiser_steps=1200, beta=65.0), FLOW_WAYS),
}


def drawn_like(ways: Mapping[str, Way]) -> dict[str, str]:
    """For each way that draws the first one whose samples are drawn like its own; one that reuses them only draws fewer."""
    alike = {name: replace(way, label="", reuse=1) for name, way in ways.items() if name != SFT}
    return {name: next(other for other in alike if alike[other] == way) for name, way in alike.items()}


def overrides(work: Path, seed: int, name: str, settings: Settings) -> list[str]:
    """What a way's run changes in the quickstart's configuration for its model."""
    task, home = TASKS[settings.task], (work / f"seed_{seed}").resolve()
    way = task.ways[name]
    sampler = {"window": "iteration"} | dict(way.sampler)
    if way.reuse > 1:
        sampler["samples_per_iteration"] = settings.batch_size * settings.updates // way.reuse
    if way.adapter:
        sampler["adapter"] = home / ADAPTER / "pytorch_lora_weights.safetensors"
    changes = {f"seppo.sampler.{key}": value for key, value in sampler.items()} | {"seppo.output_dir": home / name}
    if name != SFT:
        changes["seppo.method"] = task.method
    return [*ablation.overrides(work, seed, SFT if name == SFT else "seppo_w", settings), *assignments(changes)]


def judged_iterations(settings: Settings) -> list[int]:
    """The iterations whose policies are judged; the last is one of them."""
    return sorted(range(settings.iterations, 0, -settings.judged_every))
