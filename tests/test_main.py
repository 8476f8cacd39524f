"""`seppo-fast COMMAND`: which module a command starts, what is said of usage, and that help needs no libraries."""

import subprocess
import sys

import pytest
from conftest import ROOT

from seppo_fast import __version__
from seppo_fast.__main__ import COMMANDS, main


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "seppo_fast", *arguments], cwd=ROOT, text=True, capture_output=True)


def test_help_names_every_command_and_imports_no_library() -> None:
    code = ("import sys\nfrom seppo_fast.__main__ import main\ntry:\n    main(['--help'])\n"
            "finally:\n    print([name for name in ('torch', 'pydantic', 'seppo_fast.train') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr
    assert all(f"    {name} " in done.stdout for name in COMMANDS) and "deepspeed --module seppo_fast.train" in done.stdout


def test_version() -> None:
    assert command("--version").stdout == f"seppo-fast {__version__}\n"


@pytest.mark.parametrize(("arguments", "expected"), [
    (["trian"], "seppo-fast: error: argument COMMAND: invalid choice: 'trian'"),
    ([], "seppo-fast: error: the following arguments are required: COMMAND"),
    (["--config", "x.json"], "usage: seppo-fast"),
    (["train"], "seppo-fast train: error: the following arguments are required: --config"),
    (["train", "--config", "x", "--rates", "y"], "seppo-fast train: error: --rates goes with --dry-run"),
    (["train", "--config", "x", "--gpus", "8"], "seppo-fast train: error: --gpus goes with --dry-run"),
    (["plan", "--config", "x", "--updates", "3"], "seppo-fast plan: error: unrecognized arguments: --updates 3"),
    (["profile", "--config", "x", "--resume", "auto"], "seppo-fast profile: error: unrecognized arguments: --resume auto"),
    (["evaluate", "--models", "a=b"], "seppo-fast evaluate: error: the following arguments are required: --prompts, --out"),
])
def test_usage_errors_name_the_command(arguments: list[str], expected: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2 and expected in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_shows_the_help_of_its_module(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0 and f"usage: seppo-fast {name} " in capsys.readouterr().out
