"""`from seppo_fast import train`: a function for notebooks, whatever was imported before, which leaves the process as it was."""

import inspect
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, unranked

import seppo_fast
from seppo_fast.configfile import given_config
from seppo_fast.errors import UserError
from seppo_fast.signals import Stop, handled

MINIMAL = {"train_batch_size": 8, "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}, "seppo": {"model": {"path": "m"}}}
# In one process: bad input, two runs (the second from a file), Ctrl-C and on, a launch of two, a process group of its own.
NOTEBOOK = """
import json, os, signal, sys
from pathlib import Path
sys.path[:0] = {paths}
import torch.distributed as dist
from seppo_fast import train
from seppo_fast.errors import UserError
signal.signal(signal.SIGINT, signal.default_int_handler)  # as at a terminal: a shell's background jobs ignore it
raw, out = json.loads(Path("raw.json").read_text()), Path("runs").absolute()
before, handlers = dict(os.environ), [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)]

def same():
    assert {{name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")}} == dict.fromkeys(
        ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    assert handlers == [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)]

def refused(*arguments, **options):
    try:
        train(*arguments, **options)
    except UserError as error:
        print("refused:", str(error).replace(chr(10), " "), flush=True)

refused(raw, set={{"seppo.data.source": out / "nothing"}})
same()
assert not dist.is_initialized()
assert train(raw, set={{"seppo.output_dir": out / "a"}}) == out / "a" / "final"
same()
assert not dist.is_initialized()
assert train(Path("raw.json"), set={{"seppo.output_dir": out / "b"}}) == out / "b" / "final"

from seppo_fast.training.objective import Objective
call = Objective.__call__
def struck(*arguments, **options):
    Objective.__call__ = call
    os.kill(os.getpid(), signal.SIGINT)
    return call(*arguments, **options)
Objective.__call__ = struck
try:
    train(raw, set={{"seppo.output_dir": out / "d"}})
except KeyboardInterrupt:
    print("interrupted", flush=True)
same()
assert train(raw, set={{"seppo.output_dir": out / "d"}}, resume="auto") == out / "d" / "final"
os.environ.update(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
refused(raw)
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
    del os.environ[name]

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
assert train(raw, set={{"seppo.output_dir": out / "c"}}) == out / "c" / "final"
same()
assert dist.is_initialized() and dist.get_world_size() == 1
refused(raw, set={{"seppo.output_dir": out / "c"}})
print("end", flush=True)
"""


def test_the_module_is_the_function_in_every_order_of_imports() -> None:
    for code in ("from seppo_fast import train", "import seppo_fast.train\nfrom seppo_fast import train",
                 "import seppo_fast\ntrain = seppo_fast.train", "import seppo_fast.train as train",
                 "from seppo_fast import train\nimport seppo_fast.train\ntrain = seppo_fast.train",
                 "from seppo_fast.train import train"):
        done = subprocess.run([sys.executable, "-c", f"import sys\n{code}\nassert callable(train) and 'torch' not in sys.modules\n"
                               "from seppo_fast.train import main, parse_arguments"], cwd=ROOT, text=True, capture_output=True)
        assert done.returncode == 0, (code, done.stderr)


def test_the_function_is_documented_and_has_its_signature() -> None:
    signature = inspect.signature(seppo_fast.train)
    assert list(signature.parameters) == ["config", "set", "resume"]
    assert signature == inspect.signature(seppo_fast.train.train)
    assert "UserError" in inspect.getdoc(type(seppo_fast.train).__call__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        seppo_fast.trian  # noqa: B018


@pytest.mark.slow
def test_a_program_trains_twice_and_is_as_before(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    raw = settings(**{"seppo.iterations": 1, "seppo.updates_per_iteration": 1, "bf16.enabled": True, "zero_optimization.stage": 2})
    (tmp_path / "raw.json").write_text(json.dumps(raw))
    done = subprocess.run([sys.executable, "-c", NOTEBOOK.format(paths=[str(ROOT)])], cwd=tmp_path, text=True, capture_output=True,
                          env=unranked())
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith(("refused", "interrupted", "end"))]
    assert "seppo.data.source" in lines[0] and lines[1] == "interrupted" and "is one of 2 ranks" in lines[2]
    assert "already holds a run" in lines[3] and lines[4] == "end"
    assert "stopped by SIGINT; checkpoint: " in done.stderr


def test_a_process_alone_on_a_machine_of_several_gpus_says_so() -> None:
    assert "8 GPUs" in seppo_fast.train.unused_devices(1, 8)
    assert not any(seppo_fast.train.unused_devices(world, devices) for world, devices in ((1, 0), (1, 1), (8, 8)))


def test_a_signal_is_what_it_was_after_the_run() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stop), handled():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_leave_signals_alone() -> None:
    before, inside = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with handled() as signals:
            inside.append((signals.received, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [(0, before)]


def test_a_dictionary_is_read_as_its_file_would_be() -> None:
    raw = deepcopy(MINIMAL)
    config = given_config(raw, {"seppo.model.path": Path("/models/sd"), "seppo.model.lora.targets": ("to_q",),
                                "seppo.sampler": {"steps": 3}})
    assert config.seppo.model.path == "/models/sd" and config.seppo.model.lora.targets == ["to_q"]
    assert config.seppo.sampler.steps == 3 and raw == MINIMAL, "what was given stays as it is"


@pytest.mark.parametrize(("config", "values", "expected"), [
    (["a"], {}, "expected a dictionary, or a file's path (got list)"),
    (MINIMAL, ["seppo.beta=3"], "set: expected a dictionary of key paths"),
    (MINIMAL, {"seppo.beta": {1, 2}}, "set seppo.beta: holds what a configuration file cannot"),
    ({**MINIMAL, "bf16": {"enabled": object()}}, {}, "the configuration: holds what a configuration file cannot"),
    (MINIMAL, {"seppo.betta": 3.0}, "seppo.betta: unknown key; did you mean seppo.beta?"),
    (MINIMAL, {"seppo.beta.x": 3.0, "seppo.beta": 1.0, "seppo.beta.y": 1}, "set seppo.beta.y: seppo.beta is not a section"),
    ("no_such.json", {}, "no_such.json: no such file"),
])
def test_what_is_no_configuration_is_refused(config: Any, values: Any, expected: str) -> None:
    with pytest.raises(UserError) as error:
        given_config(config, values)
    assert expected in str(error.value)
