"""The ranks of a run: who we are, and how all of us agree on something small without touching the accelerator."""

import logging
import os
import signal
import tempfile
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers.utils import logging as transformers_logging


@dataclass(frozen=True)
class Ranks:
    """This process among the others; `control` is a gloo group, so that agreeing never waits for a stream."""

    rank: int
    world: int
    local_world: int
    device: torch.device
    control: dist.ProcessGroup

    def largest(self, value: int) -> int:
        """The largest of the ranks' values; every rank must call."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return int(tensor)

    def gather(self, table: Tensor) -> Tensor:
        """The ranks' equally shaped CPU tables, one below the other; every rank must call."""
        if self.world == 1:
            return table
        tables = [torch.empty_like(table) for _ in range(self.world)]
        dist.all_gather(tables, table.contiguous(), group=self.control)
        return torch.cat(tables)

    def objects(self, value: Any) -> list[Any]:
        """All ranks' values, which may be anything that pickles, in the order of the ranks; every rank must call."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.control)
        return values

    def barrier(self) -> None:
        """Wait for every rank."""
        self.largest(0)


def join() -> Ranks:
    """Join the ranks that the launcher started, or be the only one when there was no launcher."""
    alone = "RANK" not in os.environ
    if alone:  # DeepSpeed looks for MPI unless it finds all of these
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                          MASTER_PORT="0")
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    if alone:  # a store in this process, so that there is no port to fight for
        backend = get_accelerator().communication_backend_name()
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    # DeepSpeed's own collectives for CPUs leave 69 MB a rank in /dev/shm behind, run after run, are compiled for a minute the
    # first time, and spin for ever when another rank dies: gloo does the same.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
    device = torch.device(get_accelerator().current_device_name())
    # Caching, checkpoints and reference windows may keep one rank away from the others for long.
    control = dist.new_group(backend="gloo", timeout=timedelta(hours=12))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    return Ranks(dist.get_rank(), dist.get_world_size(), local_world, device, control)


def leave() -> None:
    """Part from the other ranks at the end of a run."""
    dist.destroy_process_group()


def quiet_libraries() -> None:
    """Leave the terminal to the run's own words: only what libraries call a problem is shown."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()


class Stop(BaseException):
    """The run was asked to stop by a signal; raised where a checkpoint can be written, which `checkpoint` then names.

    Like KeyboardInterrupt no `Exception`, so that nobody who skips bad images skips it.
    """

    checkpoint: Path | None = None

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopSignals:
    """SIGTERM and SIGINT. Once `deferred`, the first is remembered and all ranks raise `Stop` at the same place."""

    def __init__(self) -> None:
        self.received = 0
        self.deferred = False  # before training there is nothing to save, and no reason to wait
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._remember)

    def check(self, ranks: Ranks) -> None:
        """Raise `Stop` if any rank was signalled; every rank must call."""
        signum = ranks.largest(self.received)
        if signum:
            raise Stop(signum)

    def _remember(self, signum: int, _frame: object) -> None:
        if not self.deferred:
            raise Stop(signum)
        if not self.received and int(os.environ.get("RANK", 0)) == 0:
            # Not print: the signal may have come in the middle of one.
            os.write(2, f"\n{signal.Signals(signum).name}: stopping after this micro-batch, with a checkpoint\n".encode())
        self.received = self.received or signum


class FirstFailure:
    """Lets one process a machine print why the run failed: when a rank dies, the others die of broken connections."""

    def __init__(self) -> None:
        self._alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
        if not self._alone:
            try:
                started = psutil.Process(os.getppid()).create_time()  # because process ids come back
            except psutil.Error:  # the first process of a container has no parent
                started = psutil.boot_time()
            launch = f"{os.getuid()}-{os.getppid()}-{started}-{os.environ.get('MASTER_PORT')}"
            self._claim = Path(tempfile.gettempdir()) / f"seppo-fast-failure-{launch}"

    def is_ours(self) -> bool:
        """Whether this process is the first to fail."""
        if self._alone:
            return True
        try:
            self._claim.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def lost_contact(error: Exception) -> bool:
    """Whether an error says only that another rank is gone."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and any(word in str(error) for word in words)
