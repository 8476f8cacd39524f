"""Past policies: which one is an iteration's reference (Section 4.1), and where their weights are kept."""

import os
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from seppo_fast.checksums import checksum
from seppo_fast.disk import flush, follow_umask
from seppo_fast.errors import UserError
from seppo_fast.seeds import generator

Weights = dict[str, Tensor]


def pick(strategy: Literal["uniform", "latest", "initial"], k: int, seed: int) -> int:
    """Index in 0..k-1 of the reference of iteration k = 1, 2, ...; it depends on the arguments alone, so all ranks agree."""
    if k < 1:
        raise ValueError(f"k counts iterations from 1, got {k}")
    if strategy == "initial":
        return 0
    if strategy == "latest":
        return k - 1
    if strategy == "uniform":
        return int(torch.randint(k, (), generator=generator(seed, "reference", k)))
    raise ValueError(f"strategy must be uniform, latest or initial, got {strategy!r}")


class Swap(NamedTuple):
    """Bytes read and seconds taken to put another policy into a module."""

    bytes: int
    seconds: float


class Pool:
    """Past policies by index, as `policy_00007.safetensors` in `folder`; those used last are also in host memory.

    One rank writes, and all ranks read the same folder: put a barrier between an `add` and the next `load_into`.
    `host_memory_bytes` is this process's share, pinned where there is a GPU (PyTorch rounds each pinned tensor up to a power of
    two, about a fifth more for SD-1.5). The pool holds no device memory. `last_swap` is the cost of the last `load_into`.
    `checksums` are those of the files, by name: `add` enters what it writes, and a file with a checksum is compared when it is
    read.
    """

    last_swap: Swap | None = None

    def __init__(self, folder: Path, dtype: torch.dtype, host_memory_bytes: int, checksums: dict[str, str] | None = None) -> None:
        self.folder, self.dtype, self.host_memory_bytes = Path(folder), dtype, host_memory_bytes
        self.checksums = {} if checksums is None else checksums
        self._host: OrderedDict[int, Weights] = OrderedDict()  # least recently used first
        self._reader = ThreadPoolExecutor(1, "pool")
        self._coming: tuple[int, Future[Weights]] | None = None  # what `prefetch` is reading

    def add(self, index: int, weights: Mapping[str, Tensor], *, write: bool) -> None:
        """Put a copy of a policy into the pool, in the pool's dtype; with `write` it is on disk when this returns."""
        self._host.pop(index, None)
        if self._coming is not None and self._coming[0] == index:
            self._coming = None
        size = sum(weight.numel() for weight in weights.values()) * self.dtype.itemsize
        fits = size <= self.host_memory_bytes
        if not (fits or write):
            return
        copy = {name: _on_host(weight, self.dtype, stays=fits) for name, weight in weights.items()}
        if write:
            self._write(index, copy)
        if fits:
            self._keep(index, copy)

    def load_into(self, index: int, module: nn.Module) -> None:
        """Copy policy `index` into the parameters of `module` of the same names, in place: their storage stays."""
        start = time.perf_counter()
        parameters = dict(module.named_parameters())
        if self._coming is not None and self._coming[0] == index:
            coming, self._coming = self._coming, None
            self._keep(index, coming[1].result())
        if index in self._host:
            self._host.move_to_end(index)
            _check(self.path(index), {name: tuple(w.shape) for name, w in self._host[index].items()}, parameters)
            size = _copy(iter(self._host[index].items()), parameters)
        else:
            with self._opened(index) as file:
                _check(self.path(index), {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, parameters)
                size = _copy(((name, file.get_tensor(name)) for name in file.keys()), parameters)
        self.last_swap = Swap(size, time.perf_counter() - start)

    def prefetch(self, index: int) -> None:
        """Begin to read policy `index` into host memory, unless it is there or does not fit; `load_into` waits for the rest.

        Until then, memory may hold one policy more than `host_memory_bytes` allows. `load_into` raises what is wrong with the file.
        """
        path = self.path(index)
        if index in self._host or self._coming is not None and self._coming[0] == index:
            return
        if index not in self._on_disk():  # listed: NFS remembers for a while that a name asked for was not there
            return
        if path.stat().st_size <= self.host_memory_bytes:
            self._coming = index, self._reader.submit(self._read, index)

    def _read(self, index: int) -> Weights:
        with self._opened(index) as file:
            return {name: _on_host(file.get_tensor(name), self.dtype, stays=True) for name in file.keys()}

    def _keep(self, index: int, weights: Weights) -> None:
        self._host[index] = weights
        while sum(map(_size, self._host.values())) > self.host_memory_bytes:
            self._host.popitem(last=False)

    def flaw(self, index: int) -> str | None:
        """Why policy `index` cannot be loaded from its file, or None; a file with a known checksum is read to its end."""
        try:
            with self._as_written(index):
                return None
        except (SafetensorError, OSError) as error:
            return str(error)

    @contextmanager
    def _as_written(self, index: int) -> Iterator[Any]:
        path = self.path(index)
        if path.name in self.checksums and checksum(path) != self.checksums[path.name]:
            raise OSError("its checksum is not the one of what was written")
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file

    @contextmanager
    def _opened(self, index: int) -> Iterator[Any]:
        path = self.path(index)
        try:
            with self._as_written(index) as file:
                yield file
        except FileNotFoundError as error:
            raise UserError(f"{path}: past policy {index} is not there (the pool has {self.indices()}); resume from a"
                            " checkpoint, or start anew in another output_dir") from error
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot be read ({error}); it is damaged, torn or not a safetensors file: go on with"
                            " --resume auto, which looks for a checkpoint that can make it again") from error

    def indices(self) -> list[int]:
        """Indices of the policies that `load_into` can load, ascending."""
        return sorted({*self._host, *self._on_disk()})

    def truncate(self, last: int, *, write: bool = True) -> None:
        """Forget the policies later than `last`; with `write`, remove their files and those that a crash left incomplete."""
        for index in [index for index in self._host if index > last]:
            del self._host[index]
        self._coming = None
        if not write:
            return
        for index in self._on_disk():
            if index > last:
                self.path(index).unlink(missing_ok=True)
                self.checksums.pop(self.path(index).name, None)
        for pattern in ("policy_*.safetensors.tmp", ".tmp*"):  # our temporary names, and those of safetensors
            for torn in self.folder.glob(pattern):
                torn.unlink(missing_ok=True)

    def path(self, index: int) -> Path:
        """Where policy `index` is kept."""
        return self.folder / f"policy_{index:05d}.safetensors"

    def _on_disk(self) -> list[int]:
        numbers = (path.stem.removeprefix("policy_") for path in self.folder.glob("policy_*.safetensors"))
        return [int(number) for number in numbers if number.isdecimal()]

    def _write(self, index: int, weights: Weights) -> None:
        """A complete file under its own name, or none: a killed process leaves a `.tmp` at most."""
        path = self.path(index)
        temporary = path.with_name(path.name + ".tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Only one key of metadata: safetensors writes several in no fixed order, and equal pools must have equal bytes.
            save_file(weights, temporary, metadata={"format": "pt"})
            follow_umask([temporary])
            flush(temporary)
            written = checksum(temporary)
            os.replace(temporary, path)
            self.checksums[path.name] = written
            flush(self.folder)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                temporary.unlink()
            raise UserError(f"{path}: past policy {index} ({_size(weights) / 1e9:.2f} GB) cannot be written ({error});"
                            f" make room under {self.folder} and resume, the checkpoints so far are valid") from error


def _size(weights: Weights) -> int:
    return sum(weight.nbytes for weight in weights.values())


def _check(path: Path, stored: dict[str, tuple[int, ...]], parameters: dict[str, nn.Parameter]) -> None:
    """Refuse a policy of another model before anything is overwritten."""
    unknown = sorted(stored.keys() - parameters.keys())
    missing = sorted(name for name, parameter in parameters.items() if parameter.requires_grad and name not in stored)
    for problem, names in (("holds weights that the model does not have", unknown), ("lacks trained weights", missing)):
        if names:
            raise UserError(f"{path}: {problem}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
                            f" ({len(names)}); it was written for another model or another LoRA")
    for name, shape in sorted(stored.items()):
        if shape != tuple(parameters[name].shape):
            raise UserError(f"{path}: {name} has shape {shape}, the model's has {tuple(parameters[name].shape)};"
                            " it was written for another model or another LoRA rank")


def _on_host(weight: Tensor, dtype: torch.dtype, stays: bool) -> Tensor:
    """A copy in host memory; one that stays is pinned, so that the device can read it without the host."""
    return torch.empty(weight.shape, dtype=dtype, pin_memory=stays and torch.cuda.is_available()).copy_(weight.detach())


@torch.no_grad()
def _copy(weights: Iterator[tuple[str, Tensor]], parameters: dict[str, nn.Parameter]) -> int:
    """Copy, and return the number of bytes; all copies are queued first, and waited for together."""
    size, devices = 0, set()
    for name, weight in weights:
        parameter = parameters[name]
        storage = parameter.data_ptr()
        if weight.dtype != parameter.dtype:  # PyTorch would convert on the host first
            weight = weight.to(parameter.device, non_blocking=True)
        parameter.copy_(weight, non_blocking=True)
        # A captured graph and the parameters shared with the policy go on reading the old address.
        assert parameter.data_ptr() == storage, f"{name} was moved by the copy"
        size += weight.nbytes
        devices.add(parameter.device)
    for device in devices:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
    return size
