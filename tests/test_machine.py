"""Where a result comes from: the commit is that of this source, or none."""

import shutil
import subprocess
from pathlib import Path

import pytest

from seppo_fast import machine


def test_an_installed_copy_has_no_commit_of_the_repository_around_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        name = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *name, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "notes.txt").write_text("of somebody else")
    git("add", "notes.txt")
    git("commit", "-m", "theirs")
    copy = shutil.copy(machine.__file__, tmp_path / "machine.py")
    monkeypatch.setattr(machine, "__file__", str(copy))
    assert machine.commit() is None
    git("add", "machine.py")
    git("commit", "-m", "ours")
    assert len(machine.commit() or "") == 40
    (tmp_path / "notes.txt").write_text("changed")
    assert (machine.commit() or "").endswith("+")
