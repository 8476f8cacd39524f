"""The tests of nodes_alone.py, in a process of their own."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, unranked

pytestmark = pytest.mark.slow


def test_in_a_process_that_has_joined_no_ranks(tmp_path: Path) -> None:
    outside = {name: value for name, value in unranked().items() if not name.startswith("PYTEST_")}
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore",
                           f"--basetemp={tmp_path / 'own'}", str(Path(__file__).with_name("nodes_alone.py"))], cwd=ROOT, text=True,
                          capture_output=True, timeout=250, env=outside)
    assert done.returncode == 0, done.stdout[-4000:]
