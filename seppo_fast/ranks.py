"""The ranks of a run: this process's place among them, and how they exchange small values without the accelerator."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import default_pg_timeout
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers.utils import logging as transformers_logging

from seppo_fast.contact import part, to_stderr, watch
from seppo_fast.errors import UserError
from seppo_fast.rendezvous import Launch, launched, meet, patience, within

T = TypeVar("T")
# The environment that a launcher would give to the only rank.
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@dataclass(frozen=True)
class Ranks:
    """This process among the others; `control` is a gloo group, so that exchanging values never waits for a GPU's stream."""

    rank: int
    world: int
    local_world: int
    device: torch.device
    control: dist.ProcessGroup

    def largest(self, value: int) -> int:
        """The largest of the ranks' values; every rank must call."""
        return self.largest_of_each([value])[0]

    def largest_of_each(self, values: Sequence[int]) -> list[int]:
        """For each place, the largest of the ranks' values; every rank must call."""
        if self.world == 1:
            return [*values]
        tensor = torch.tensor(values)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return tensor.tolist()

    def gather(self, table: Tensor) -> Tensor:
        """The ranks' CPU tables, which have one shape, one below the other; every rank must call."""
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

    def from_first(self, value: T) -> T:
        """Rank 0's value, whatever the others give; every rank must call."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, 0, group=self.control)
        return values[0]

    def say(self, line: str) -> None:
        """Print a line once for all ranks; at once, also into a pipe."""
        if self.rank == 0:
            print(line, flush=True)

    def barrier(self) -> None:
        """Wait for every rank."""
        self.largest(0)


def join(lost: Callable[[str], None] = to_stderr) -> Ranks:
    """Join the ranks that the launcher started, or be the only rank where there was no launcher.

    From then on this process ends within a minute once another rank is gone; `lost` prints the message.
    """
    launch = launched()
    if launch is None:
        # DeepSpeed looks for MPI unless all of these are set. The store is in this process, so that no port has to be free.
        launch, store = Launch(0, 1, 0, 1, "127.0.0.1", 0), None if dist.is_initialized() else dist.HashStore()
        os.environ.update(ALONE)
    else:  # the ranks have met already where this process evaluates a second time
        store = None if dist.is_initialized() else meet(launch, patience())
    # DeepSpeed's own collectives for CPUs leave 69 MB a rank in /dev/shm after each run, compile for a minute at first use, and
    # wait for ever when another rank dies. gloo does their work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if torch.cuda.is_available() and launch.local_rank >= torch.cuda.device_count():
        raise UserError(f"LOCAL_RANK {launch.local_rank}: this machine shows {torch.cuda.device_count()} GPUs; start no more ranks"
                        " on it (--num_gpus, --nproc_per_node)")
    get_accelerator().set_device(launch.local_rank)
    control = within(patience(), lambda: connect(launch, store),
                     lambda: f"rank {launch.rank} met all others at {launch.address}, but could not connect to each of them: one"
                             " ended at once (see what it printed), or a firewall is between the machines, or a machine's own name"
                             " leads to an address that others cannot reach (GLOO_SOCKET_IFNAME=eth0 names the interface)")
    if store is not None and launch.world > 1:
        within(patience(), lambda: watch(launch.rank, launch.world, launch.host, store, lost),
               lambda: f"rank {launch.rank} met all others at {launch.address}, but not all of them could connect to rank 0: see"
                       " what they printed, or a firewall is between the machines")
    deepspeed.init_distributed(verbose=False)
    device = torch.device(get_accelerator().current_device_name())
    return Ranks(launch.rank, launch.world, launch.local_world, device, control)


def connect(launch: Launch, store: dist.Store | None) -> dist.ProcessGroup:
    """The control group of the ranks that have met in `store`, which are connected first; without a store they are already."""
    accelerator = get_accelerator()
    accelerator.set_device(launch.local_rank)  # each thread has its own
    if store is not None:
        store.set_timeout(default_pg_timeout)
        # As DeepSpeed would do it; it uses a group that exists. The timeout is that of each collective.
        device = accelerator.device(launch.local_rank) if launch.world > 1 and accelerator.device_name() == "cuda" else None
        dist.init_process_group(accelerator.communication_backend_name(), store=store, rank=launch.rank, world_size=launch.world,
                                timeout=default_pg_timeout, device_id=device)
    # One rank may keep the others waiting for long: caching, checkpoints, sampling. One that is gone does not (contact.py).
    return dist.new_group(backend="gloo", timeout=timedelta(hours=12))


def leave() -> None:
    """Leave the other ranks at the end of a run."""
    part()
    deepspeed.comm.destroy_process_group()  # PyTorch's and DeepSpeed's groups, or the next run would find them


@contextmanager
def only_rank() -> Iterator[Ranks]:
    """This process as the only rank; afterwards the program has its environment and process group back."""
    launch, theirs = launched(), dist.is_initialized()
    world = dist.get_world_size() if theirs else launch.world if launch else 1
    if world > 1:
        raise UserError(f"this process is one of {world} ranks, and train() is for one: write the configuration to a file and"
                        " start `deepspeed --module seppo_fast.train --config FILE`")
    before = {name: os.environ.get(name) for name in ALONE}
    try:
        ranks = join()
        try:
            yield ranks
        finally:
            dist.destroy_process_group(ranks.control) if theirs else leave()
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)  # or a command that the program starts would believe that it is a rank
            if value is not None:
                os.environ[name] = value


def quiet_libraries() -> None:
    """Silence what libraries print, errors apart, so that the terminal shows what the run says."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
