"""On every rank: trains the configuration `--config FILE`, and counts what is sent; rank 0 writes `sent.json` into the run folder.

`sent.json` lists the collectives in order: [update, who called, operation, bytes of this rank, whether inside the solver's loop].
`who` is the first function of this package above the call, `ranks.py` apart; DeepSpeed's own calls are "deepspeed".
"""

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

OPERATIONS = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce", "reduce_scatter_tensor", "barrier",
              "all_to_all_single", "gather", "scatter", "send", "recv")


def caller() -> tuple[str, bool]:
    """Who calls, and whether from the solver's loop."""
    frame, who, draws = sys._getframe(2), "", False
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if not who and name.startswith("deepspeed"):
            who = "deepspeed"
        if not who and name.startswith("seppo_fast") and name != "seppo_fast.ranks":
            who = frame.f_code.co_qualname
        draws = draws or name == "seppo_fast.reference.loop"
        frame = frame.f_back
    return who, draws


def size(value: Any) -> int:
    """The bytes of a tensor; none of the list that an all_gather fills."""
    return value.nbytes if isinstance(value, torch.Tensor) else 0


def main() -> int:
    from seppo_fast.configfile import parse_config
    from seppo_fast.ranks import join, leave, quiet_libraries
    from seppo_fast.run import run
    from seppo_fast.signals import StopSignals
    from seppo_fast.training.trainer import Trainer

    sent: list[list[Any]] = []
    trainers: list[Trainer] = []

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*arguments: Any, **named: Any) -> Any:
            if trainers:
                who, draws = caller()
                sent.append([trainers[0].state.update, who, name, max(map(size, [*arguments, *named.values()]), default=0), draws])
            return original(*arguments, **named)

        return call

    for name in OPERATIONS:
        wrapped = counted(name, getattr(dist, name))
        for module in (dist, dist.distributed_c10d):  # the second sends objects
            setattr(module, name, wrapped)
    train = Trainer.train

    def watched(self: Trainer) -> None:
        trainers.append(self)
        train(self)
        trainers.clear()

    Trainer.train = watched
    quiet_libraries()
    ranks = join()
    raw = json.loads(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
    run(parse_config(raw), None, ranks, StopSignals())
    if ranks.rank == 0:
        (Path(raw["seppo"]["output_dir"]) / "sent.json").write_text(json.dumps(sent))
    leave()
    return 0
