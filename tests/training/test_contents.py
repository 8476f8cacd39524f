"""Models, and what a run began with, are known by what is in their files: moved ones are the same, others are refused by key."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from seppo_fast.checksums import checksum
from seppo_fast.errors import UserError
from seppo_fast.training.checkpoint import State
from seppo_fast.training.contents import sums_of
from seppo_fast.training.resumption import check_models


def test_what_has_not_changed_is_not_read_again(tmp_path: Path) -> None:
    files = [tmp_path / "weights", tmp_path / "config"]
    for file in files:
        file.write_text(f"what {file.name} holds")
    sums, stamps = sums_of({"model": files, "adapter": files[:1]}, {}, {})
    assert sums["adapter"] == checksum(files[0]) != sums["model"]
    assert sums_of({"model": files}, {"model": "as it was"}, stamps) == ({"model": "as it was"}, {"model": stamps["model"]})
    os.utime(files[1], (0, 0))
    moved = [Path(shutil.copyfile(file, tmp_path / f"moved {file.name}")) for file in files]
    for each in (files, moved):
        found, now = sums_of({"model": each}, {"model": "as it was"}, stamps)
        assert found == {"model": sums["model"]} and now["model"] != stamps["model"]
    size, times = files[1].stat().st_size, (files[1].stat().st_atime_ns, files[1].stat().st_mtime_ns)
    _, stamps = sums_of({"model": files}, {}, {})
    files[1].write_text("x" * size)
    os.utime(files[1], ns=times)  # the time of the last change of anything is not for programs to set
    assert sums_of({"model": files}, sums, stamps)[0] != {"model": sums["model"]}


@pytest.mark.parametrize(("then", "now", "words"), [
    ({"a": "1"}, {}, "was trained with a, which is not given now: give it"),
    ({}, {"a": "1"}, "was trained without a: leave it out"),
    ({"a": "1"}, {"a": "2"}, "was trained with other weights than those that a has now: put that model back")])
def test_another_model_is_named(then: dict[str, str], now: dict[str, str], words: str, tmp_path: Path) -> None:
    check_models(tmp_path, State("run", 1, None, {}, models=then), then)
    with pytest.raises(UserError, match=words) as caught:
        check_models(tmp_path, State("run", 1, None, {}, models=then), now)
    assert f"seppo.model.start_from={tmp_path}" in str(caught.value)


def test_what_a_run_began_with_may_be_moved_or_gone(settings: Callable[..., dict[str, Any]], train: Callable[..., Path],
                                                    tmp_path: Path) -> None:
    short = {"seppo.iterations": 1, "seppo.updates_per_iteration": 1}
    first = train(settings(**short, **{"seppo.output_dir": str(tmp_path / "first")})) / "checkpoints" / "update_00000001"
    began = settings(**short, **{"seppo.model.start_from": str(first)})
    train(began)
    moved = shutil.move(first / "policy.safetensors", tmp_path / "moved.safetensors")
    train(began, "auto")  # it need not be there any more
    began["seppo"]["model"]["start_from"] = str(moved)
    train(began, "auto")
    began["seppo"]["model"]["start_from"] = str(tmp_path / "run" / "checkpoints" / "update_00000001")
    with pytest.raises(UserError, match="other weights than those that seppo.model.start_from has now"):
        train(began, "auto")
    del began["seppo"]["model"]["start_from"]
    with pytest.raises(UserError, match="was trained with seppo.model.start_from, which is not given now"):
        train(began, "auto")
