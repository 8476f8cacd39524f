"""Without the packages of an extra: what needs one says so, with the command that installs it."""

import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGES = ("sklearn", "matplotlib", "tokenizers", "torchmetrics", "av")
QUICKSTARTS = {"seppo_fast.quickstart": "quickstart", "seppo_fast.quickstart.video": "quickstart,video"}


@pytest.mark.parametrize(("module", "package"), [
    ("seppo_fast.quickstart", "sklearn"), ("seppo_fast.quickstart", "matplotlib"), ("seppo_fast.quickstart.video", "sklearn"),
    ("seppo_fast.quickstart.video", "torchmetrics"), ("seppo_fast.quickstart.video", "av")])
def test_a_quickstart_names_the_package_that_is_missing(module: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.startswith("seppo_fast.quickstart")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert import_module(f"{module}.__main__").main(["--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"needs the package {package}, which is not here" in said and said.count("\n") == 1
    assert f"pip install 'seppo-fast[{QUICKSTARTS[module]}]'" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", QUICKSTARTS)
def test_their_help_needs_none_of_them(module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.startswith("seppo_fast.quickstart")]:
        monkeypatch.delitem(sys.modules, name)
    for package in PACKAGES:
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as end:
        import_module(f"{module}.__main__").main(["--help"])
    assert end.value.code == 0 and f"usage: python -m {module} " in capsys.readouterr().out


def test_they_ask_for_all_that_they_import() -> None:
    for module in QUICKSTARTS:
        folder = ROOT / module.replace(".", "/")
        code = "\n".join(file.read_text() for file in folder.glob("*.py"))
        imported = set(re.findall(rf"^(?:import|from) ({'|'.join(PACKAGES)})\b", code, re.MULTILINE))
        assert imported and imported <= set(import_module(f"{module}.__main__").PACKAGES)
