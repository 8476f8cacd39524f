"""A capture that fails, and what goes on meanwhile: by a model of PyTorch's books everywhere, on the device with a GPU."""

import gc
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from captures import Denoise, captured, close, expected, given, gpu, network

from seppo_fast.capturing import no_capture
from seppo_fast.reference import cuda_graph


class Books:
    """What allocator and generator keep of captures, as CUDAGraph.cpp and CUDACachingAllocator.cpp of a version write it."""

    def __init__(self, version):
        self.ends, self.releases, self.own_state = version >= "2.13", version >= "2.14", version >= "2.13"
        self.under_way, self.users, self.generator_captures, self.pools = [], {}, False, 0

    def new_pool(self):
        self.pools += 1
        return self.pools

    def end(self, device, pool):
        if pool not in self.under_way:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.under_way.remove(pool)

    def release(self, device, pool):
        self.users[pool] -= 1
        assert self.users[pool] >= 0, "released more often than taken"


class Graph:
    """at::cuda::CUDAGraph; a capture is spoilt by `Graph.spoilt`."""

    books, spoilt = None, False

    def __init__(self):
        self.pool = None

    def capture_begin(self, pool=None, **options):
        books = self.books
        self.pool, self.ended = pool or books.new_pool(), False
        assert self.pool not in books.under_way
        books.under_way.append(self.pool)
        books.users[self.pool] = books.users.get(self.pool, 0) + 1
        books.generator_captures = not books.own_state

    def capture_end(self):
        books, spoilt = self.books, Graph.spoilt
        Graph.spoilt = False
        if not spoilt or books.ends:
            books.end(0, self.pool)
        if spoilt:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        books.generator_captures, self.ended = False, True

    def reset(self):
        if self.pool is not None and (self.ended or self.books.releases):
            self.books.release(0, self.pool)
        self.pool = None

    def __del__(self):
        self.reset()


class Pool:
    def __init__(self):
        self.id = Graph.books.new_pool()
        Graph.books.users[self.id] = 1

    def use_count(self):
        return Graph.books.users[self.id]


@pytest.fixture(params=["2.11", "2.13", "2.14"])
def books(request, monkeypatch):
    Graph.books, Graph.spoilt = Books(request.param), False
    stream = SimpleNamespace(wait_stream=lambda other: None, device="cpu")
    for name, value in {"CUDAGraph": Graph, "MemPool": Pool, "device": lambda device: nullcontext(), "current_device": lambda: 0,
                        "stream": lambda stream: nullcontext(), "current_stream": lambda device=None: stream,
                        "Stream": lambda device: stream, "synchronize": lambda: None, "empty_cache": lambda: None}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name, value in {"_host_emptyCache": lambda: None, "_cuda_endAllocateToPool": Graph.books.end,
                        "_cuda_releasePool": Graph.books.release}.items():
        monkeypatch.setattr(torch._C, name, value, raising=False)
    cuda_graph._side_stream.cache_clear()
    yield Graph.books
    cuda_graph._side_stream.cache_clear()
    cuda_graph._failed.clear()
    gc.collect()


def capture(pool, step=lambda: None):
    return cuda_graph.capture(lambda: None, step, torch.device("cuda"), pool)[0]


def spoil():
    Graph.spoilt = True


def spoil_and_raise():
    spoil()
    raise ValueError("read a value")


@pytest.mark.parametrize("step", [spoil, spoil_and_raise])
def test_a_failure_leaves_no_trace_in_pytorchs_books(books, step):
    """Graphs captured before keep their pool; nobody believes in the capture any more, nor holds memory for it."""
    pool = cuda_graph.new_pool(torch.device("cuda"))
    earlier = capture(pool)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="previous error"):
            capture(pool, step)
        gc.collect()
        assert books.under_way == [] and not books.generator_captures
        assert pool.use_count() == 2, "the pool's own and the earlier graph's"
    later = capture(pool)
    assert pool.use_count() == 3
    del earlier, later
    assert [count for key, count in books.users.items() if key != pool.id and count] == [] and pool.use_count() == 1


def test_a_failure_of_python_alone_ends_a_capture_that_was_in_order(books):
    pool = cuda_graph.new_pool(torch.device("cuda"))

    def fails():
        raise ValueError("no such layer")

    with pytest.raises(ValueError, match="no such layer"):
        capture(pool, fails)
    gc.collect()
    assert books.under_way == [] and pool.use_count() == 1


def test_nothing_is_collected_and_no_video_decoded_during_a_capture(books):
    seen = []
    pool = cuda_graph.new_pool(torch.device("cuda"))
    capture(pool, lambda: seen.append((no_capture.locked(), gc.isenabled())))
    with pytest.raises(RuntimeError):
        capture(pool, spoil_and_raise)
    assert seen == [(True, False)] and not no_capture.locked() and gc.isenabled()


def reads_a_value(unet, latents, t, conditions):
    torch.empty(2**28, device="cuda")  # 256 MiB that the failed capture's pool is left with
    assert latents.float().mean().item() < 1e9
    return Denoise()(unet, latents, t, conditions)


@gpu
def test_the_allocator_works_after_a_failure():
    """Memory is given back, an allocation that does not fit frees what is cached, random numbers are drawn."""
    unet = network(device="cuda")
    noise, conditions = given(4)
    want = expected(unet, noise, conditions)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    drawing = captured(unet, reads_a_value)
    with pytest.warns(RuntimeWarning, match="seppo.sampler.cuda_graph"):
        close(drawing.draw(noise, conditions), want)
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < before + 2**26
    torch.cuda.set_per_process_memory_fraction((before + 2**30) / torch.cuda.get_device_properties(0).total_memory)
    try:
        cached = torch.empty(600 << 20, dtype=torch.uint8, device="cuda")
        del cached
        assert torch.empty(700 << 20, dtype=torch.uint8, device="cuda").numel()  # both at once are more than there is
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.randn(3, device="cuda").isfinite().all()
    close(drawing.draw(noise, conditions), want)


@gpu
def test_a_failure_beside_graphs_that_share_the_pool():
    unet = network(device="cuda")
    noise, conditions = given(4)
    good = captured(unet, Denoise())
    good.draw(noise, conditions)

    def fails_when_wide(unet, latents, t, conditions):
        return (Denoise() if latents.shape[2] == 8 else reads_a_value)(unet, latents, t, conditions)

    drawing = captured(unet, fails_when_wide)
    drawing.draw(noise, conditions)
    with pytest.warns(RuntimeWarning, match="seppo.sampler.cuda_graph"):
        drawing.draw(noise.repeat(1, 1, 2, 1), conditions)
    for other in (drawing, good, captured(unet, Denoise())):  # eager, an earlier graph, a new one
        close(other.draw(noise, conditions), expected(unet, noise, conditions))
    other.release()
    torch.cuda.empty_cache()
