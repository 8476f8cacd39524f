"""Prepares the next micro-batch while the present one is trained on."""

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetched(make: Callable[[Item], Result], items: Iterable[Item], device: torch.device) -> Generator[Result]:
    """`make(item)` of each item in turn; a thread works on the next one meanwhile, and its exceptions are raised here."""
    on_device = partial(torch.cuda.set_device, device) if device.type == "cuda" else None  # a thread starts on GPU 0
    with ThreadPoolExecutor(1, initializer=on_device) as thread:
        coming = None
        for item in items:
            present, coming = coming, thread.submit(make, item)
            if present is not None:
                yield present.result()
        if coming is not None:
            yield coming.result()
