"""pytest-benchmark suite: `python -m pytest benchmarks --benchmark-only`. Forward + backward on the CPU, two threads.

Its inputs do not change, so that caches may hold them. In `python -m benchmarks.loss` no cache can.
"""

import pytest
import torch

pytest.importorskip("pytest_benchmark")
from benchmarks.loss.cases import DTYPES, SHAPES, forward_backward, losses, make_case  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("implementation", losses("cpu"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairs", [2, 8, 32])
def test_sd15(benchmark, pairs, dtype, implementation):
    benchmark.group = f"sd15 {pairs} pairs {dtype}"
    case = make_case((2 * pairs, *SHAPES["sd15"]), DTYPES[dtype], "cpu")
    function = losses("cpu")[implementation]
    forward_backward(function, case)  # compiles
    benchmark(forward_backward, function, case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairs", [2, 8, 32])
def test_copy_of_the_same_bytes(benchmark, pairs, dtype):
    benchmark.group = f"sd15 {pairs} pairs {dtype}"
    source = torch.randn(4 * pairs, *SHAPES["sd15"]).to(DTYPES[dtype])
    target = torch.empty_like(source)
    benchmark(target.copy_, source)


@pytest.mark.parametrize("implementation", losses("cpu"))
def test_host_time(benchmark, implementation):
    benchmark.group = "host time, 2 pairs of 4 elements"
    case = make_case((4, 4, 1, 1), torch.float32, "cpu")
    function = losses("cpu")[implementation]
    forward_backward(function, case)
    benchmark(forward_backward, function, case)
