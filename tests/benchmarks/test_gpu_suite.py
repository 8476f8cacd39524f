"""The GPU suite's order, limits and reports, and the wheels that it wants, on a machine without a GPU."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import ROOT
from benchmarks.gpu_suite import checks, loss_steps, steps, training_steps, wheels
from benchmarks.gpu_suite.__main__ import ended

MUST = {"loss": ("build", "tests_native", "tests_triton", "bandwidth", "memcheck", "racecheck"),
        "throughput": ("tests_sampler", "sampler", "loop", "training_memory")}


@pytest.mark.parametrize("group", MUST)
def test_what_a_call_must_end_with_comes_first_and_has_the_time_for_it(group: str) -> None:
    first = steps.GROUPS[group][:len(MUST[group])]
    assert sorted(first) == sorted(MUST[group])
    assert steps.MACHINE + sum(steps.STEPS[name] for name in first) <= steps.SECONDS < 9 * 60


@pytest.mark.slow
@pytest.mark.parametrize(("code", "outcome", "wrote"), [("print('all')", "done", "all"), ("raise SystemExit(3)", "exit code 3", ""),
                         ("try:\n time.sleep(60)\nexcept KeyboardInterrupt:\n print('partial')", "stopped after 3 s", "partial"),
                         ("signal.signal(2, signal.SIG_IGN)\ntime.sleep(60)", "stopped after 3 s", "")])
def test_a_step_of_the_gpu_suite_is_interrupted_before_it_is_killed(code: str, outcome: str, wrote: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", f"import signal, time\n{code}"], stdout=subprocess.PIPE, text=True,
                               start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    assert ended(process, 3.0) == outcome
    assert process.communicate()[0].strip() == wrote


@pytest.mark.slow
def test_tests_are_dealt_to_processes_and_every_one_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "test_dealt.py"
    file.write_text("import os, pytest\n"
                    "@pytest.mark.parametrize('x', range(5))\ndef test_good(x): pass\n"
                    "def test_bad(): assert 0, 'broken on purpose'\n"
                    "def test_not_here(): pytest.skip('another reason')\n")
    monkeypatch.setattr(checks, "TESTS", {"tests_dealt": [str(file)]})
    found = checks.tests("tests_dealt", tmp_path, processes=3)
    assert {key: found[key] for key in ("tests", "failures", "skipped", "ok", "interrupted")} == {
        "tests": 7, "failures": 1, "skipped": 1, "ok": False, "interrupted": False}
    assert found["failed"][0].startswith("test_bad: ") and found["skipped_for"] == ["another reason"]
    assert not list(tmp_path.glob("*.xml"))
    file.write_text("import os\n" + "".join(f"def test_{i}(): {'os._exit(1)' if i == 1 else 'pass'}\n" for i in range(4)))
    found = checks.tests("tests_dealt", tmp_path, processes=2)
    assert not found["ok"] and found["tests"] == 2, "a process that died took two tests along"
    assert found["failed"] == ["pytest ended with status 1 and no report"]
    file.write_text("")
    assert not checks.tests("tests_dealt", tmp_path)["ok"], "no test is no success"


def test_wheels_are_those_that_the_machine_lacks(tmp_path: Path) -> None:
    wanted = wheels.missing()
    assert {"diffusers", "deepspeed", "datasets", "pydantic", "pydantic-core", "xformers", "av", "hjson"} <= set(wanted)
    assert not {"torch", "triton", "transformers", "peft", "numpy", "nvidia-dali-cuda130"} & set(wanted)
    assert "av" not in wheels.missing(present=["av"])
    constraints = ROOT / "constraints.txt"
    assert wheels.pinned("pydantic-core", constraints).startswith("pydantic_core==")
    assert all("==" in wheels.pinned(name, constraints) for name in wanted), "each is pinned"
    (tmp_path / "a-1-py3-none-any.whl").write_bytes(bytes(3 << 20))
    assert wheels.listed(tmp_path.glob("*.whl")).splitlines()[-1].split() == ["3.00", "MiB", "in", "all,", "1", "wheels"]


def test_every_step_has_its_code() -> None:
    """Only a machine with a GPU runs the steps."""
    others = {"build", "memcheck", "racecheck", *checks.TESTS}
    assert others <= steps.STEPS.keys() and training_steps.NEEDED.keys() <= steps.STEPS.keys()
    assert sorted(name for group in steps.GROUPS.values() for name in group) == sorted(steps.STEPS)
    assert all(callable(getattr(loss_steps, name)) for name in steps.LOSS.keys() - others)
