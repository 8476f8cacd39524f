"""Drawing samples with the network in a module, in batches of one shape, captured and compiled where that is asked for.

The host launches a batch's steps one after the other and waits for none between the first and the last. On a GPU the step is
captured once a shape and kind of call, and replayed. The weights in the module may change in place at any time; whatever else
changes about the module makes a new capture.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from seppo_fast import config
from seppo_fast.errors import warn_fallback
from seppo_fast.models.engines import cudnn_attention
from seppo_fast.reference import tuning
from seppo_fast.reference.batching import even, free_memory, measured_size, padded, seconds
from seppo_fast.reference.blocks import offloads_blocks
from seppo_fast.reference.calls import Call, calls_of
from seppo_fast.reference.cuda_graph import capture, fingerprint, new_pool
from seppo_fast.reference.guidance import Guidance
from seppo_fast.reference.loop import Conditions, Denoise, Loop, open_loop, run
from seppo_fast.reference.solver import SolverTable

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Ready:
    """A loop whose step was compiled or captured for the loop's storage: a graph for each kind of call."""

    loop: Loop
    graphs: Mapping[Call, torch.cuda.CUDAGraph] = field(default_factory=dict)

    def step(self, call: Call) -> None:
        self.graphs[call].replay() if self.graphs else self.loop.step(call)


class Sampler:
    """Draws latents with the network in `module`; `denoise(module, latents, timesteps, conditions)` is its output.

    `table` is on the module's device; `empty`, of batch 1, holds the conditions for no prompt (and no image), which branches
    of the `guidance` may have; `dtype` is what the network is given. The loop runs under `autocast`, or none, whatever the
    caller's, and with cuDNN's attention where this was allowed when the sampler was made. `batch_size` is None until an "auto"
    is measured, by `fit` or the first draw. `adapted`: changes of the network that hold while it draws (`adapter.py`).
    """

    def __init__(self, module: nn.Module, denoise: Callable[[nn.Module, Tensor, Tensor, Conditions], Tensor], table: SolverTable,
                 empty: Conditions, guidance: Guidance, settings: config.Sampler, dtype: torch.dtype,
                 autocast: torch.dtype | None = None, say: Callable[[str], None] = print,
                 adapted: Sequence[tuning.Change] = ()) -> None:
        self.module, self.table, self.empty, self.guidance, self.say = module, table, empty, guidance, say
        self.dtype, self.autocast, self.adapted = dtype, autocast, adapted
        self.calls = calls_of(table.levels, len(guidance), settings)
        self.device = table.inputs.device
        self.batch_size = None if settings.batch_size == "auto" else settings.batch_size
        self._plain: Denoise = partial(denoise, module)
        self._compile, self._fuse = settings.compile, settings.fuse_projections
        self._moves = offloads_blocks(module)
        self._capture = settings.cuda_graph and self.device.type == "cuda"
        if self._capture and self._moves:
            self._capture = False
            say("sampler: no CUDA graph, which would read where a block was before: seppo.reference_offload is \"blocks\"")
        self._ready: dict[Shape, Ready] = {}  # by the batch's shape
        self._cudnn = torch.backends.cuda.cudnn_sdp_enabled()
        self._pool: torch.cuda.MemPool | None = None  # the graphs' memory
        self._tune()

    @torch.no_grad()
    def draw(self, noise: Tensor, conditions: Conditions, before_step: Callable[[], None] = lambda: None,
             later: Callable[[int], Tensor] | None = None) -> Tensor:
        """`(N, C, h, w)` fp32 scaled latents from `noise` (N, C, h, w) under `conditions` (N, ...), for any N.

        `before_step` runs on the host before each step of each batch; it may raise to give up. `later(i)`, (N, C, h, w), is the
        i-th noise, from 0, that the solver adds on its way; those of `lcm` and `tcd` do.
        """
        size = even(len(noise), self.fit(noise.shape[1:], len(noise)))
        others = [] if later is None else [later(i) for i in range(self.table.noises)]
        parts = [slice(start, start + size) for start in range(0, len(noise), size)]
        return torch.cat([self._draw(noise[part], {name: value[part] for name, value in conditions.items()}, before_step,
                                     [other[part] for other in others]) for part in parts])

    @torch.no_grad()
    def fit(self, shape: Sequence[int], wanted: int, agree: Callable[[int], int] = lambda size: size,
            free: Callable[[torch.device], int] = free_memory) -> int:
        """`batch_size`; "auto" is measured for samples of `shape` (C, h, w), at most `wanted` a batch.

        Ranks may find different sizes. What they draw is the same but for rounding; where they must make the same number of
        steps, `agree` turns a rank's size into everyone's. `free` is the memory left on the device, in bytes.
        """
        if self.batch_size is not None:
            return self.batch_size

        def step_of(size: int) -> Callable[[], None]:
            loop = self._open((size, *shape), self._plain)
            return lambda: first_step(loop)

        with tuning.changed([*self.adapted]), self._precision():
            size, why = measured_size(step_of, wanted, self.device, free)
        self.batch_size = agree(size)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        agreed = "" if self.batch_size == size else f", as all ranks agreed; {size} here"
        self.say(f"sampler: batches of {self.batch_size}{agreed}: {why}")
        return self.batch_size

    def release(self) -> None:
        """Give the graphs and their memory back; the next draw makes them anew."""
        self._forget()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _draw(self, noise: Tensor, conditions: Conditions, before_step: Callable[[], None], later: Sequence[Tensor]) -> Tensor:
        """One batch; padded to a shape that is ready, where its own would have to be compiled or captured first."""
        self._check_module()
        self._refresh()
        larger = [shape for shape in self._ready if shape[0] >= len(noise) and shape[1:] == noise.shape[1:]]
        shape = min(larger, default=tuple(noise.shape))
        ready = self._ready.get(shape) or self._prepare(shape)
        full = {name: padded(value, shape[0]) for name, value in conditions.items()}
        with self._network():
            others = [padded(other, shape[0]) for other in later]
            return run(ready.loop, ready.step, padded(noise, shape[0]), full, before_step, others)[:len(noise)]

    def _check_module(self) -> None:
        """A graph goes on reading the storage and running the kernels that it was captured with: drop all once these changed."""
        tuned = self._capture or self._fuse or self._compile != "none"
        if tuned and fingerprint(self.module) != self._fingerprint:
            if self._ready:
                self.say("sampler: more than the values of the model's weights has changed; preparing it anew")
            self._tune()

    def _tune(self) -> None:
        """Forget all that was prepared, and look at the module as it is now."""
        self._forget()
        self._denoise = tuning.compiled(self._plain) if self._compile == "full" else self._plain
        self._changes, self._refresh = tuning.fused_projections(self.module) if self._fuse else ([], lambda: None)
        self._changes += self.adapted
        if self._compile == "regional":
            self._changes += tuning.compiled_blocks(self.module)
        self._fingerprint = fingerprint(self.module)

    def _forget(self) -> None:
        """Drop the graphs, and then what they use."""
        self._ready.clear()
        self._pool = None

    def _prepare(self, shape: Shape) -> Ready:
        """A loop for batches of `shape`: compiled and captured, or as it is where that is not wanted or fails."""
        cost = []
        if self._compile != "none":
            loop, cache = self._open(shape, self._denoise), tuning.Cache()
            try:
                with self._network():
                    spent = sum(seconds(partial(first_step, loop, call), self.device) for call in sorted({*loop.calls}))
                    cost.append(f"compile {spent:.1f} s ({cache})")
            except Exception as error:  # whatever the compiler raises; a fault of the model's own comes back without it
                warn_fallback("seppo.sampler.compile", error)
                self._compile = "none"
                self._tune()
        ready = Ready(self._open(shape, self._denoise))
        if self._capture:
            try:
                self._pool = self._pool or new_pool(self.device)
                graphs, spent = {}, 0.0
                for call in sorted({*self.calls}):  # "all" first: the others, of fewer rows, fit into the memory that it leaves
                    with self._network():
                        graphs[call], each = capture(partial(first_step, ready.loop, call), partial(ready.loop.step, call),
                                                     self.device, self._pool)
                    spent += each
                ready = Ready(ready.loop, graphs)
                cost.append(f"capture {spent:.1f} s")
            except Exception as error:
                warn_fallback("seppo.sampler.cuda_graph", error)
                self._capture = False
                self._tune()
        if cost:
            self._ready[shape], self._fingerprint = ready, fingerprint(self.module)
            self.say(f"sampler: {', '.join(cost)}, for batches of {shape[0]}")
        return ready

    def _open(self, shape: Shape, denoise: Denoise) -> Loop:
        return open_loop(denoise, self.table, shape, self.empty, self.guidance, self.dtype, self.calls)

    @contextmanager
    def _network(self) -> Iterator[None]:
        """The network as the loop, and nobody else, is to see it."""
        with tuning.changed(self._changes), self._precision():
            yield

    @contextmanager
    def _precision(self) -> Iterator[None]:
        # A capture must not read casts that autocast has cached: they would be those of the weights of that moment. And the casts
        # of blocks that come one after another would all stay on the device.
        autocast = torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None,
                                  cache_enabled=not (self._capture or self._moves))
        with cudnn_attention(self._cudnn), autocast:
            yield


def first_step(loop: Loop, call: Call = "all") -> None:
    """A step for its own sake, of zero noise and no prompt."""
    loop.start(torch.zeros_like(loop.known[0]), {})
    loop.step(call)
