"""Where the ranks of one launch meet. The waiting ends after a time, and the message names the ranks that did not come."""

import hashlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from seppo_fast.errors import UserError, few

PATIENCE = 60  # seconds
ATTEMPT = "seppo_fast/attempt"
T = TypeVar("T")


@dataclass(frozen=True)
class Launch:
    """What a launcher wrote into this process's environment."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    host: str
    port: int

    @property
    def address(self) -> str:
        """The meeting point, for messages, with the names of the environment's variables."""
        return f"MASTER_ADDR:MASTER_PORT {self.host}:{self.port}"


def launched() -> Launch | None:
    """The launch that this process is a rank of; None where there was no launcher. `UserError` where its variables are wrong."""
    if "RANK" not in os.environ:
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    lacking = [name for name in names if not os.environ.get(name)]
    if lacking:
        raise UserError(f"RANK is set, as a launcher does, but {' and '.join(lacking)} not: unset RANK for a run on one device, or"
                        " start the ranks with `deepspeed` or `torchrun`")
    local_world = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
    try:
        rank, world, local_rank, port = (int(os.environ[name]) for name in names if name != "MASTER_ADDR")
        launch = Launch(rank, world, local_rank, int(local_world), os.environ["MASTER_ADDR"], port)
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE and MASTER_PORT are numbers: {error}") from None
    if not (0 <= rank < world and 0 <= local_rank and launch.local_world > 0 and 0 <= port < 1 << 16):
        raise UserError(f"RANK {rank}, WORLD_SIZE {world}, LOCAL_RANK {local_rank}, MASTER_PORT {port}: ranks count from 0 to"
                        " WORLD_SIZE - 1, and ports end at 65535")
    return launch


def patience() -> float:
    """How many seconds to wait for other ranks: a minute, or what DEEPSPEED_TIMEOUT says in minutes."""
    return 60 * float(os.environ.get("DEEPSPEED_TIMEOUT") or PATIENCE / 60)


@dataclass
class Meeting:
    """The meeting of a launch's ranks; `lacking` are those that have not come yet, as far as this rank knows."""

    launch: Launch
    lacking: list[int] | None = None
    store: dist.Store | None = None

    def meet(self) -> dist.Store:
        """A store of this launch alone, once all of its ranks have come."""
        launch, myself = self.launch, uuid.uuid4().hex
        # torchrun's own process holds the store, and keeps it when it starts the ranks again.
        kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.store = dist.TCPStore(launch.host, launch.port, launch.world, launch.rank == 0 and not kept, timedelta(hours=1),
                                   wait_for_workers=False)
        if launch.rank == 0:
            self.store.set(ATTEMPT, myself)
        past: set[str] = set()
        while True:
            attempt = self._attempt(past)
            store = dist.PrefixStore(attempt, self.store)
            store.set(f"rank {launch.rank}", myself)
            names = self._gather(store) if launch.rank == 0 else self._hear(store, attempt)
            if names[launch.rank:launch.rank + 1] == [myself]:
                return dist.PrefixStore(hashlib.sha256("".join(names).encode()).hexdigest(), store)
            if not kept:
                raise UserError(f"at {launch.address} the ranks of another run meet: give this one a port of its own"
                                " (--master_port)")
            past.add(attempt)

    def _attempt(self, past: Collection[str]) -> str:
        """The word that rank 0 of the present attempt chose, and none of the `past` ones.

        torchrun counts restarts, but each machine counts its own, and one that came later has other numbers.
        """
        while True:
            if self.store.check([ATTEMPT]) and (attempt := self.store.get(ATTEMPT).decode()) not in past:
                return attempt
            self.lacking = [0]
            time.sleep(0.05)

    def _gather(self, store: dist.Store) -> list[str]:
        """What rank 0 does: wait for all, publish who has not come yet, and in the end the names of all."""
        while True:
            lacking = [rank for rank in self.lacking or range(self.launch.world) if not store.check([f"rank {rank}"])]
            if lacking != self.lacking:
                self.lacking = lacking
                store.set("lacking", json.dumps(lacking))
            if not lacking:
                names = [name.decode() for name in store.multi_get([f"rank {rank}" for rank in range(self.launch.world)])]
                store.set("all", json.dumps(names))
                return names
            time.sleep(0.05)

    def _hear(self, store: dist.Store, attempt: str) -> list[str]:
        """What the others do: wait for the names of all; of an attempt that another one replaced, there are none."""
        while not store.check(["all"]):
            self.lacking = json.loads(store.get("lacking")) if store.check(["lacking"]) else [0]
            time.sleep(0.05)
            if self.store.get(ATTEMPT).decode() != attempt:
                return []
        return json.loads(store.get("all"))

    def failed(self, seconds: float) -> str:
        """The message for when it took too long."""
        launch, rest = self.launch, f"see what {'it' if self.launch.rank else 'they'} printed"
        if self.store is None and launch.rank:
            return (f"rank {launch.rank} found no rank 0 at {launch.address} for {seconds:.0f} seconds: it ended early (see what it"
                    " printed), or a firewall is between the machines, or another program uses the port")
        names = few(f"rank {rank}" for rank in self.lacking or ())
        return (f"{names or 'the others'} did not come to {launch.address} for {seconds:.0f} seconds: {rest}, and check that all"
                " machines reach this address; where machines start slowly, DEEPSPEED_TIMEOUT=5 waits five minutes")


def meet(launch: Launch, seconds: float) -> dist.Store:
    """A store of this launch alone, once all its ranks have come; `UserError` after `seconds`."""
    meeting = Meeting(launch)
    try:
        return within(seconds, meeting.meet, lambda: meeting.failed(seconds))
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(f"MASTER_PORT {launch.port} is in use on this machine, perhaps by another run: choose another port"
                            " (--master_port)") from None
        raise UserError(f"rank {launch.rank} could not meet the others at {launch.address}: {str(error).splitlines()[0]}") from None


def within(seconds: float, work: Callable[[], T], complaint: Callable[[], str]) -> T:
    """What `work` returns; `UserError` with the complaint where it takes longer than `seconds`.

    A thread does the work, because PyTorch's own waiting ignores signals, and never ends at a port where another program listens.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise UserError(complaint())
    return results[0]
