"""What is trained: small configurations, what each leaves when nothing happens to it, and one run that a fault can be done to."""

import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import make_demonstrations
from forked import Forks, Result
from outcomes import steady_rows
from tiny import NARROW, tiny_sd

from faults.damage import checkpoints

UPDATES = 4
LONGEST = 60  # seconds that nobody may wait for, after whatever happened
TIMEOUT = 240  # of a run that goes on, seconds; a busy machine needs some

BF16 = {"bf16": {"enabled": True}}
# By name: the number of ranks, and what differs from `settings`.
CONFIGURATIONS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "fp32": ((1, 2), {}),
    "bf16": ((1, 2), BF16),
    "ZeRO 2": ((2,), BF16 | {"zero_optimization": {"stage": 2}}),
    "ZeRO 3": ((2,), {"zero_optimization": {"stage": 3}}),
    "LoRA": ((1, 2), {"model": {"lora": {"rank": 2, "alpha": 4.0, "dropout": 0.2}}, "caption_dropout": 0.3}),
    "window": ((1, 2), {"sampler": {"window": "iteration"}, "reference_score": "rollout"}),
}


class Wrong(Exception):
    """What may not happen; the message says what did."""


@dataclass(frozen=True)
class Plain:
    """A run to which nothing happened: what it left, and how many seconds it took."""

    files: dict[str, bytes]
    rows: list[dict[str, Any]]
    steps: dict[str, list[str]]
    seconds: float


class Bench:
    """The model and the data of all runs, and the plain runs; all lie in `folder`."""

    def __init__(self, folder: Path, forks: Forks) -> None:
        self.folder, self.forks = folder, forks
        self._model = tiny_sd(folder / "model", **NARROW)
        self._data = make_demonstrations(folder / "data", 24)
        self._plain: dict[tuple[str, int], Plain] = {}

    def settings(self, name: str, ranks: int, run: Path, cache: Path) -> dict[str, Any]:
        """Four updates in two iterations: a checkpoint after each, two past policies, three grids."""
        changes = dict(CONFIGURATIONS[name][1])
        ours = {
            "model": {"path": str(self._model), **changes.pop("model", {})}, "output_dir": str(run),
            "iterations": 2, "updates_per_iteration": UPDATES // 2, "checkpoint": {"every": 1},
            "data": {"source": str(self._data), "resolution": 16, "cache_dir": str(cache)},
            "sampler": {"steps": 3, "batch_size": 4 // ranks, "guidance_scale": 2.0, **changes.pop("sampler", {})},
            "samples": {"every": 2, "prompts": ["a handwritten one", "a red cat"]},
            **{key: changes.pop(key) for key in ("caption_dropout", "reference_score") if key in changes},
        }
        monitor = {"enabled": True, "output_path": str(run / "monitor"), "job_name": "csv"}
        return {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4 // ranks, "gradient_clipping": 1.0,
                "csv_monitor": monitor, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
                "seppo": ours, **changes}

    def plain(self, name: str, ranks: int) -> Plain:
        """The run to which nothing happens, made once; its cache is the first one that there is."""
        if (name, ranks) not in self._plain:
            folder = self.folder / "plain" / f"{name} {ranks}"
            raw = self.settings(name, ranks, folder, self.folder / "cache")
            result = self.forks.run(raw, ranks=ranks, timeout=TIMEOUT)
            if any(result.statuses):
                raise Wrong(f"the plain run of {name} on {ranks}: {result.statuses}\n{result.output}")
            self._plain[name, ranks] = Plain(files_of(folder), steady_rows(folder), steps_of(folder), result.ended - result.started)
        return self._plain[name, ranks]

    def run(self, name: str, ranks: int, folder: Path, dice: random.Random) -> "Run":
        """A new run with a cache of its own, a copy of the plain runs'."""
        plain = self.plain(name, ranks)
        shutil.copytree(self.folder / "cache", folder / "cache")
        return Run(self.forks, self.settings(name, ranks, folder / "run", folder / "cache"), ranks, plain, dice)


@dataclass
class Run:
    """A run folder that is to end as the plain one did. `longest`: how long anybody waited after a fault, in seconds."""

    forks: Forks
    raw: dict[str, Any]
    ranks: int
    plain: Plain
    dice: random.Random
    longest: float = 0.0

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.raw["seppo"]["output_dir"])

    @property
    def cache(self) -> Path:
        """The folder of all caches of this run."""
        return Path(self.raw["seppo"]["data"]["cache_dir"])

    @property
    def updates_left(self) -> int:
        """How many updates a resumed run has before it."""
        kept = checkpoints(self.folder)
        return UPDATES - int(kept[-1].name.split("_")[1]) if kept else UPDATES

    def start_new_cache(self) -> None:
        """From now on another, empty cache."""
        data = self.raw["seppo"]["data"]
        data["cache_dir"] = tempfile.mkdtemp(prefix="cache-", dir=self.folder.parent)

    def resume(self, **fault: Any) -> Result:
        """Train from where the run is; `fault` as for `Forks.run`."""
        return self.forks.run(self.raw, "--resume", "auto", ranks=self.ranks, timeout=TIMEOUT, **fault)

    def waited(self, since: float | None, result: Result) -> None:
        """Count the time that a run took to end."""
        if since is not None:
            self.longest = max(self.longest, result.ended - since)
            if result.ended - since > LONGEST:
                raise Wrong(f"it took {result.ended - since:.0f} s to end: {said(result)}")

    def finish(self) -> None:
        """Go on with nothing in the way; the end must be the plain run's."""
        result = self.resume()
        if any(result.statuses) or "done: the trained model is in" not in result.output:
            raise Wrong(f"resumed, it did not come to its end: {said(result)}")
        if differs := difference(self.folder, self.plain):
            raise Wrong(f"{differs}: {said(result)}")


def difference(folder: Path, plain: Plain) -> str | None:
    """In what a finished run is not as the one that was never stopped."""
    files, rows = files_of(folder), steady_rows(folder)
    differing = sorted(name for name in files.keys() | plain.files.keys() if files.get(name) != plain.files.get(name))
    if differing:
        return f"other bytes, or no file, in {', '.join(differing)}"
    if rows != plain.rows:
        return f"metrics.jsonl has rows of updates {[row['update'] for row in rows]}, or other values"
    if (steps := steps_of(folder)) != plain.steps:
        return f"csv_monitor's files have the steps {steps}"
    left = [str(path) for path in folder.rglob("*") if path.name.startswith(".") or ".tmp" in path.name]
    return f"left behind: {', '.join(left)}" if left else None


def files_of(folder: Path) -> dict[str, bytes]:
    """By name, what must repeat to the byte: model, past policies, grids. The card names the folder of the monitor."""
    files = [file for part in ("final", "pool", "samples") for file in (folder / part).rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes().replace(bytes(folder), b"run") for file in files}


def steps_of(folder: Path) -> dict[str, list[str]]:
    """By file of csv_monitor: the header's and the steps' column; the values may depend on the clock."""
    return {file.name: [line.split(",")[0] for line in file.read_text().splitlines()] for file in folder.rglob("*.csv")}


def said(result: Result) -> str:
    """The statuses, and the end of what was printed, without the plan and the bars."""
    lines = [line for line in result.output.splitlines() if not line.startswith("  ") or "File" in line]
    return "\n".join([str(result.statuses), *[line for line in lines if line.strip() and "%|" not in line][-25:]])
