"""Without the packages of seppo-fast[evaluation]: what needs none of them works, and what needs one says which."""

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from pkgutil import walk_packages

import pytest

import seppo_fast
from seppo_fast.errors import UserError
from seppo_fast.evaluation import run
from seppo_fast.evaluation.scoring import check_packages, scores_of


def test_everything_imports_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("seppo_fast.evaluation")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(seppo_fast, "evaluation", None)  # the import sets it anew
    for name in ("av", "ftfy", "torchmetrics"):
        monkeypatch.setitem(sys.modules, name, None)
    package = import_module("seppo_fast.evaluation")
    for module in walk_packages(package.__path__, "seppo_fast.evaluation."):
        assert import_module(module.name).__file__
    assert package.run is not run


@pytest.mark.parametrize(("name", "needing"), [
    ("ftfy", ["hpsv2", "hpsv21"]), ("torchmetrics", ["lpips", "ssim", "psnr"]), ("av", ["fid", "lpips", "ssim", "psnr", "fvd"])])
def test_what_needs_one_names_it_and_the_rest_does_without(monkeypatch: pytest.MonkeyPatch, name: str, needing: list[str]) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    refused = {}
    for score in (*scores_of(False), *scores_of(True)):
        try:
            check_packages(score)
        except UserError as error:
            refused[score.name] = str(error)
    assert list(refused) == needing
    for message in refused.values():
        assert f"needs the package {name}, which is not here" in message and "pip install 'seppo-fast[evaluation]'" in message
        assert "\n" not in message


def test_versions_are_of_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "torchmetrics":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(run, "version", version)
    assert run.versions() == {"torch": "1.0", "diffusers": "1.0", "transformers": "1.0"}
