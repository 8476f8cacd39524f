"""SIGTERM and SIGINT: the first one counts, from the first moment on."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from seppo_fast.signals import Stop, StopSignals

DURING_IMPORT = """
import os, sys
class Finder:
    def find_spec(name, *_):
        if name == "deepspeed":
            os.kill(os.getpid(), {signum})
sys.meta_path.insert(0, Finder)
sys.argv = ["train.py", "--config", "quickstart.json"]
from seppo_fast import train
sys.exit(train.main())
"""


@pytest.fixture
def signals() -> StopSignals:
    """Those of this process, for the test's time."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    yield StopSignals()
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_a_second_signal_does_not_break_what_the_first_began(signals: StopSignals) -> None:
    with pytest.raises(Stop, match="SIGTERM") as stop:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            ended = True
    assert ended and signals.received == stop.value.signum == signal.SIGTERM


def test_the_first_deferred_signal_is_the_one_to_stop_by(signals: StopSignals, capfd: pytest.CaptureFixture) -> None:
    signals.deferred = True
    signals.check_alone()
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stop, match="SIGINT"):
        signals.check_alone()
    assert capfd.readouterr().err.count("stopping after this micro-batch") == 1


def test_no_status_is_0_before_the_ranks_have_joined(signals: StopSignals) -> None:
    assert (signals.status(signal.SIGTERM), signals.status(signal.SIGINT)) == (143, 130)
    signals.joined = True
    assert (signals.status(signal.SIGTERM), signals.status(signal.SIGINT)) == (0, 130)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_program_is_loaded(signum: int) -> None:
    program = DURING_IMPORT.format(signum=int(signum))
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert done.returncode == 128 + signum, done.stderr
    first, last = done.stderr.splitlines(keepends=True)
    assert first.startswith("seppo_fast ") and "importing PyTorch" in first
    assert last == f"stopped by {signum.name} before training began; what is cached is kept\n"
