"""The processes that the sampler's benchmark runs its ways in. A module of its own, because each of them imports it."""

import os
from collections.abc import Callable
from functools import partial

import pytest

from benchmarks.throughput.ways import Way


@pytest.mark.slow
def test_each_way_of_sampling_has_a_process_of_its_own_and_leaves_the_others() -> None:
    one, other = Way("cpu"), Way("cpu")
    try:
        assert one.open(partial(opened, "good"))["first_s"] >= 0 and other.open(partial(opened, "good"))["load_s"] >= 0
        one.draw()
        assert one.open(partial(opened, "fails"))["failed"] == "ValueError: made for it"
        with pytest.raises(RuntimeError, match="fails later"):
            one.open(partial(opened, "fails later"))
            one.draw()
        other.draw()
        assert len({way._process.pid for way in (one, other)} | {os.getpid()}) == 3
        assert one.open(partial(opened, "dies"))["failed"] == "its process ended with status 3"
        other.draw()
    finally:
        one.end()
        other.end()


def opened(what: str) -> Callable[[], object]:
    """A draw that does what its name says, in the process that unpickles it."""
    if what == "fails":
        raise ValueError("made for it")
    if what == "dies":
        os._exit(3)
    draws = iter((None, ValueError("fails later") if what == "fails later" else None, None, None))

    def draw() -> None:
        if error := next(draws):
            raise error

    return draw
