"""Which tests run here: those for a GPU only where there is one, and `make test-fast` without the slow ones."""

import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="here they run")
@pytest.mark.parametrize("workers", [(), ("-n", "1")])
def test_tests_for_a_gpu_wait_and_are_counted(workers: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *workers, "tests/test_ranks.py",
                           "tests/test_config.py", "-k", "two_gpus or advice"], cwd=ROOT, text=True, capture_output=True)
    assert "1 test waits for a GPU" in done.stdout, done.stdout[-3000:]
    assert "skipped" not in done.stdout and re.search("passed|deselected|no tests ran", done.stdout)


def test_what_uses_a_fixture_that_trains_is_slow(request: pytest.FixtureRequest) -> None:
    for item in request.session.items:
        if {"train", "forks", "launch"} & set(item.fixturenames):
            assert item.get_closest_marker("slow"), item.nodeid
    assert not request.node.get_closest_marker("slow")
