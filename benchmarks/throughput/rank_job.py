"""One rank of a run that counts its samples: `python -m benchmarks.throughput.rank_job --config FILE --out DIR`.

With `--core N` the process runs on that core only.
"""

import argparse
import json
import os
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput.rank_job", description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--core", type=int)
    given = parser.parse_args()
    if given.core is not None:
        os.sched_setaffinity(0, {given.core})

    from seppo_fast.configfile import parse_config
    from seppo_fast.ranks import join, leave, quiet_libraries
    from seppo_fast.run import run
    from seppo_fast.signals import StopSignals
    from seppo_fast.training.trainer import Trainer

    samples: list[int] = []
    ended: list[float] = []
    draw, finish = Trainer.draw_rollouts, Trainer.finish_update

    def counted(self: Trainer, *arguments: int) -> None:
        before = len(self.rollouts)
        draw(self, *arguments)
        samples.append(len(self.rollouts) - before)

    def finished(self: Trainer, *arguments: object) -> None:
        ended.append(time.perf_counter())
        finish(self, *arguments)

    Trainer.draw_rollouts, Trainer.finish_update = counted, finished
    quiet_libraries()
    ranks = join()
    run(parse_config(json.loads(given.config.read_text())), None, ranks, StopSignals())
    (given.out / f"rank{ranks.rank}.json").write_text(json.dumps({"samples": samples, "ended": ended}) + "\n")
    leave()


if __name__ == "__main__":
    main()
