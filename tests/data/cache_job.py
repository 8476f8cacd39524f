"""Builds caches in a process of its own, one after the other: `python -m data.cache_job JSON`."""

import json
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


if __name__ == "__main__":
    for job in json.loads(sys.argv[1]):
        folder, rank, world = Path(job["folder"]), job["rank"], job["world"]
        barrier = Barrier(Path(job["barrier"]), rank, world)
        model, data = open_model(job["model"]), config.Data(**job["data"])
        cache = cached(model, data, folder, rank=rank, world=world, barrier=barrier)
        print(len(cache), cache.folder)
