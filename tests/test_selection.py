"""Which tests run here: those for a GPU only where there is one, and `make test-fast` without the slow ones."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, WAITING, pytest_testnodedown


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="here they run")
def test_tests_for_a_gpu_wait_and_are_counted() -> None:
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_ranks.py",
                           "tests/test_config.py", "-k", "two_gpus or advice"], cwd=ROOT, text=True, capture_output=True)
    assert "1 test waits for a GPU" in done.stdout, done.stdout[-3000:]
    assert "skipped" not in done.stdout and re.search("passed|deselected|no tests ran", done.stdout)


def test_a_workers_count_is_the_whole_sessions() -> None:
    """Every worker of pytest-xdist collects all tests."""
    config = SimpleNamespace(stash={WAITING: 0})
    for waiting in (3, 3):
        pytest_testnodedown(SimpleNamespace(workeroutput={"waiting": waiting}, config=config))
    assert config.stash[WAITING] == 3


def test_what_uses_a_fixture_that_trains_is_slow(request: pytest.FixtureRequest) -> None:
    for item in request.session.items:
        if {"train", "forks", "launch"} & set(item.fixturenames):
            assert item.get_closest_marker("slow"), item.nodeid
    assert not request.node.get_closest_marker("slow")
