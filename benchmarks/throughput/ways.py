"""A way of sampling in a process of its own, so that no way sees what another leaves in CUDA, cuBLAS or the compiler.

`torch.compile(mode="reduce-overhead")` clears cuBLAS' workspaces around its recordings, and a CUDA graph that was captured
before in the same process goes on using the freed memory.
"""

import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection

import torch

from benchmarks.result_files import Row
from benchmarks.timing import waiter

Open = Callable[[], Callable[[], object]]  # makes the network and what draws with it


class Way:
    """A process on `device` that opens one point after the other and draws when it is told to."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._threads = torch.get_num_threads()
        self._process: multiprocessing.Process | None = None

    def open(self, make: Open) -> Row:
        """Make what draws and draw once: seconds of both, or why it failed. What was open before is freed."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, self._device, self._threads), daemon=True)
            self._process.start()
            theirs.close()
        return self._ask(make)

    def draw(self) -> None:
        """Draw once; returns when the device has finished."""
        failed = self._ask(None).get("failed")
        if failed:
            raise RuntimeError(failed)

    def close(self) -> None:
        """Free what is open; the process stays for the next point."""
        if self._process is not None:
            self._ask("close")

    def end(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.terminate()
            self._process.join()
            self._process = None

    def _ask(self, message: object) -> Row:
        try:
            self._connection.send(message)
            return self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            code, self._process = self._process.exitcode, None
            return {"failed": f"its process ended with status {code}"}


def _serve(connection: Connection, device: str, threads: int) -> None:
    torch.set_num_threads(threads)
    wait, draw = waiter(device), None
    while True:
        message = connection.recv()
        if message is None:
            connection.send(_tried(partial(_drawn, draw, wait)))
            continue
        draw = None
        torch.compiler.reset()
        if device == "cuda":
            torch.cuda.empty_cache()
        if message == "close":
            connection.send({})
            continue
        start = time.perf_counter()
        opened: list[Callable[[], object]] = []
        found = _tried(lambda make=message, opened=opened: opened.append(make()) or wait())
        load = time.perf_counter() - start
        if opened:
            draw = opened.pop()
            found |= _tried(partial(_drawn, draw, wait)) | {"load_s": round(load, 2)}
        if not found.get("failed"):
            found["first_s"] = round(time.perf_counter() - start - load, 2)
        connection.send(found)


def _drawn(draw: Callable[[], object], wait: Callable[[], object]) -> None:
    draw()
    wait()


def _tried(call: Callable[[], object]) -> Row:
    """Why the call failed, {} where it did not. A failure does not stop the other ways."""
    try:
        call()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    return {}
