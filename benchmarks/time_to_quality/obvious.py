"""The obvious trainer on a seed's base and data, in this process."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import torch
from diffusers.utils import logging

from benchmarks.throughput.obvious_trainer import ObviousTrainer
from benchmarks.time_to_quality.ways import Settings
from seppo_fast.quickstart.digits import RESOLUTION


def obvious_trainers(home: Path, seed: int, settings: Settings) -> dict[str, ObviousTrainer]:
    """With a pipeline call for each prompt, and for a batch of them."""
    logging.set_verbosity_error()
    demonstrations = write_winners(home / "pairs.parquet", home / "demonstrations")
    torch.manual_seed(seed)
    return {name: ObviousTrainer(home / "base", demonstrations, "cpu", RESOLUTION, settings.sampler_steps,
                                 settings.guidance_scale, settings.batch_size, settings.beta, settings.lr, batched)
            for name, batched in (("a_prompt_a_call", False), ("a_batch_a_call", True))}


def write_winners(pairs: Path, folder: Path) -> Path:
    """The preferred pictures as an image folder, which is what the obvious trainer reads."""
    folder.mkdir(exist_ok=True)
    lines = []
    for index, row in enumerate(pq.read_table(pairs).to_pylist()):
        (folder / f"{index}.png").write_bytes(row["jpg_0"] if row["label_0"] == 1 else row["jpg_1"])
        lines.append(json.dumps({"file_name": f"{index}.png", "text": row["caption"]}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder
