"""One run at a time in a run folder."""

import os
from pathlib import Path
from typing import Any

from forked import Forks

from seppo_fast.lock import locked
from seppo_fast.training.folder import LOCK


def test_a_second_run_is_refused_by_the_name_of_the_first(forks: Forks, settings: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with locked(folder / LOCK):
        for arguments in ((), ("--resume", "auto")):
            result = forks.run(settings(), *arguments, ranks=2)
            assert result.status == 2 and result.statuses[1] != 0, result.output
            (line,) = [line for line in result.output.splitlines() if line.startswith("seppo_fast: ")]
            assert line.startswith(f"seppo_fast: {folder} (seppo.output_dir) is in use by another run: process {os.getpid()} on ")
            assert line.endswith("Wait for its end, stop it, or choose another seppo.output_dir")
            assert "Traceback" not in result.output
        assert [file.name for file in folder.iterdir()] == [LOCK]


def test_a_run_that_cannot_begin_leaves_no_folder(forks: Forks, settings: Any, tmp_path: Path) -> None:
    result = forks.run(settings(**{"seppo.model.path": "/nowhere", "seppo.output_dir": str(tmp_path / "new" / "run")}))
    assert result.status == 2 and not (tmp_path / "new").exists()
