"""On every rank: builds the caches of a JSON list, `--config FILE`, one after the other, together or each rank by itself."""

import json
import os
import sys
import time
from pathlib import Path

from data.data_files import cached

from seppo_fast import config
from seppo_fast.models import open_model


class Barrier:
    """Waits for all ranks by files in a folder."""

    def __init__(self, folder: Path, rank: int, world: int):
        self.folder, self.rank, self.world, self.count = folder, rank, world, 0
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self) -> None:
        self.count += 1
        (self.folder / f"{self.count}.{self.rank}").touch()
        give_up = time.monotonic() + 60
        while len(list(self.folder.glob(f"{self.count}.*"))) < self.world:
            if time.monotonic() > give_up:
                raise TimeoutError(f"rank {self.rank} is alone at barrier {self.count}")
            time.sleep(0.01)


def main() -> int:
    for job in json.loads(Path(sys.argv[sys.argv.index("--config") + 1]).read_text()):
        folder = Path(job["folder"])
        rank, world = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if job["together"] else (0, 1)
        barrier = Barrier(folder / "barrier", rank, world) if job["together"] else lambda: None
        model, data = open_model(job["model"]), config.Data(**job["data"])
        cache = cached(model, data, folder, rank=rank, world=world, barrier=barrier)
        print(f"cached {len(cache)} rows", flush=True)
    return 0
