"""The least change of a configuration with which it fits on a card, and then the largest batches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from benchmarks.fits import SHARE
from benchmarks.result_files import Row
from seppo_fast.planning.cost import Cost


@dataclass(frozen=True)
class Way:
    """A way to save memory, in words and as changes of the configuration."""

    labels: tuple[str, ...]
    changes: tuple[str, ...]


@dataclass(frozen=True)
class Batches:
    """Pairs of a micro-batch, samples that are drawn at once, images that are encoded at once."""

    micro: int
    samples: int
    encoded: int

    @property
    def changes(self) -> list[str]:
        """As changes of the configuration."""
        return [f"train_micro_batch_size_per_gpu={self.micro}", f"seppo.sampler.batch_size={self.samples}",
                f"seppo.data.encode_batch_size={self.encoded}"]


def best(card: int, ways: Sequence[Way], whole: Batches, cost: Callable[[Way, Batches], Cost]) -> Row:
    """The first way in which the smallest batches fit, with the largest batches; or which phase of the last one does not fit."""
    room = SHARE * card * 2**30
    if cost(ways[0], whole).reserved <= room:
        return row(ways[0], whole, cost(ways[0], whole))
    one = Batches(1, 1, 1)
    for way in ways:
        if cost(way, one).reserved <= room:
            fitting = one
            for name in ("encoded", "micro", "samples"):
                sizes = (replace(fitting, **{name: size}) for size in halves(getattr(whole, name)))
                fitting = next(batches for batches in sizes if cost(way, batches).reserved <= room)
            return row(way, fitting, cost(way, fitting))
    peaks = cost(ways[-1], one).peaks
    phase = max(peaks, key=lambda name: peaks[name])
    return {"fits": False, "labels": list(ways[-1].labels), "phase": phase, "bytes": peaks[phase]}


def halves(size: int) -> Iterator[int]:
    """The size, its half and so on, down to 1."""
    while size > 1:
        yield size
        size //= 2
    yield 1


def row(way: Way, batches: Batches, found: Cost) -> Row:
    """What fits, for the result file."""
    return {"fits": True, "labels": list(way.labels), "micro": batches.micro, "samples": batches.samples,
            "encoded": batches.encoded, "bytes": found.reserved}
