"""A checkpoint is complete or ignored, belongs to its run, configuration, data and ranks, and survives a full disk."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import Forks, Strike
from tiny import tiny_sd

from seppo_fast.checksums import checksum
from seppo_fast.training import checkpoint
from seppo_fast.training.marker import declare

LAST, BEFORE = "update_00000004", "update_00000003"


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wider than elsewhere: files of megabytes, which a limit can tell apart."""
    return tiny_sd(tmp_path_factory.mktemp("models") / "wide")


@pytest.fixture
def finished(settings: Callable[..., dict[str, Any]], forks: Forks, tmp_path_factory: pytest.TempPathFactory,
             tmp_path: Path) -> dict[str, Any]:
    """The configuration of a finished run of four updates, a checkpoint each; a copy for every test."""
    if not MADE:
        raw = settings(**{"seppo.output_dir": str(tmp_path_factory.mktemp("finished") / "run"), "seppo.checkpoint.every": 1})
        result = forks.run(raw)
        assert result.status == 0, result.output[-2000:]
        MADE.append(raw)
    raw = json.loads(json.dumps(MADE[0]))
    raw["seppo"]["output_dir"] = str(shutil.copytree(MADE[0]["seppo"]["output_dir"], tmp_path / "run"))
    return raw


MADE: list[dict[str, Any]] = []


def folder(raw: dict[str, Any]) -> Path:
    return Path(raw["seppo"]["output_dir"])


def final_bytes(run: Path) -> dict[str, bytes]:
    """Every file of final/ by name."""
    return {str(file.relative_to(run)): file.read_bytes() for file in sorted((run / "final").rglob("*")) if file.is_file()}


def refused(forks: Forks, raw: dict[str, Any], *words: str, resume: str | None = "auto", ranks: int = 1) -> str:
    """The message of a run that must stop with status 2, say it once, and change nothing."""
    before = contents(folder(raw))
    result = forks.run(raw, *(["--resume", resume] if resume else []), ranks=ranks)
    assert 2 in result.statuses and 0 not in result.statuses, result.output[-2000:]
    assert "Traceback" not in result.output and result.output.count("seppo_fast: ") == 1
    message = result.output[result.output.index("seppo_fast: "):]
    for word in words:
        assert word in message, message
    assert contents(folder(raw)) == before
    return message


def contents(run: Path) -> dict[str, bytes]:
    """What there is to lose in a run folder."""
    names = ("run.json", "config.json", "metrics.jsonl", "checkpoints/*/*", "pool/*", "final/*/*")
    return {str(file): file.read_bytes() for name in names for file in run.glob(name) if file.is_file()}


def declare_as_before(path: Path) -> None:
    """Give a checkpoint a marker of the first format, sizes alone."""
    marker = path / "complete.json"
    marker.unlink()
    files = [file for file in path.rglob("*") if file.is_file()]
    marker.write_text(json.dumps({str(file.relative_to(path)): file.stat().st_size for file in files}))


def test_what_a_checkpoint_holds_is_what_its_marker_says(finished: dict[str, Any]) -> None:
    kept = sorted(path.name for path in (folder(finished) / "checkpoints").iterdir())
    assert kept == [BEFORE, LAST], "keep_last is 2"
    path = folder(finished) / "checkpoints" / LAST
    files = {str(file.relative_to(path)): file.stat().st_size for file in path.rglob("*") if file.is_file()}
    marker = json.loads((path / "complete.json").read_text())
    sizes = {name: file["size"] for name, file in marker["files"].items()}
    assert marker["format"] == 2 and {name: file["xxh3_128"] for name, file in marker["files"].items()} == {
        name: checksum(path / name) for name in sizes}
    assert files.keys() - sizes.keys() == {"complete.json"} and sizes.items() <= files.items()
    assert sizes.keys() == {"engine.json", "policy.safetensors", "rank_0.safetensors", "state.json"}


@pytest.mark.parametrize("keep", [1, 3])
def test_keep_last(keep: int, settings: Callable[..., dict[str, Any]], forks: Forks, tmp_path: Path) -> None:
    raw = settings(**{"seppo.checkpoint.every": 1, "seppo.checkpoint.keep_last": keep})
    assert forks.run(raw).status == 0
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == [f"update_{update:08d}" for update in range(5 - keep, 5)]


def without_marker(path: Path) -> None:
    (path / "complete.json").unlink()


def marker_cut(path: Path) -> None:
    os.truncate(path / "complete.json", 20)


def file_cut(path: Path) -> None:
    os.truncate(path / "rank_0.safetensors", 1000)


def file_missing(path: Path) -> None:
    (path / "engine.json").unlink()


@pytest.mark.parametrize(("tear", "lack"), [
    (without_marker, "it has no complete.json"), (marker_cut, "its complete.json cannot be read"),
    (file_cut, "rank_0.safetensors has 1000 bytes, not "), (file_missing, "engine.json is missing"),
])
def test_a_torn_checkpoint_is_ignored_and_the_one_before_is_used(tear: Callable[[Path], None], lack: str, finished: dict[str, Any],
                                                                 forks: Forks) -> None:
    run = folder(finished)
    whole = final_bytes(run)
    shutil.rmtree(run / "final")
    tear(run / "checkpoints" / LAST)
    result = forks.run(finished, "--resume", "auto")
    assert result.status == 0, result.output[-2000:]
    assert f"ignored the checkpoint {run / 'checkpoints' / LAST}: {lack}" in result.output
    assert f"resuming from {run / 'checkpoints' / BEFORE}\n" in result.output
    assert final_bytes(run) == whole and checkpoint.missing(run / "checkpoints" / LAST) is None
    message = f"--resume {run / 'checkpoints' / LAST}: {lack}"
    tear(run / "checkpoints" / LAST)
    assert message in refused(forks, finished, f"complete checkpoints: {run / 'checkpoints' / BEFORE}",
                              resume=str(run / "checkpoints" / LAST))


def test_another_configuration_is_refused_with_the_differing_keys(finished: dict[str, Any], forks: Forks) -> None:
    finished["seppo"]["beta"], finished["optimizer"]["params"]["lr"] = 500.0, 1e-5
    finished["bf16"] = {"enabled": True}
    message = refused(forks, finished, LAST, "seppo.beta: 2000.0 there, 500.0 now", "optimizer.params.lr: 0.001 there, 1e-05 now",
                      "bf16: None there, {'enabled': True} now")
    assert len(message.strip().splitlines()) == 4


def test_keys_that_do_not_decide_what_is_learned_may_change(finished: dict[str, Any], forks: Forks) -> None:
    whole = final_bytes(folder(finished))
    finished["seppo"]["checkpoint"] = {"every": 2, "keep_last": 1}
    finished["seppo"]["data"]["workers"] = 1
    finished["seppo"]["max_nonfinite"] = 9
    finished["wall_clock_breakdown"] = False
    assert forks.run(finished, "--resume", "auto").status == 0
    now = final_bytes(folder(finished))
    assert [name for name in whole if whole[name] != now[name]] == ["final/README.md"], "the card states the settings"


def test_a_checkpoint_from_before_a_key_existed_is_of_its_default(finished: dict[str, Any], forks: Forks) -> None:
    path = folder(finished) / "checkpoints" / LAST
    state = json.loads((path / "state.json").read_text())
    del state["config"]["seppo"]["reference_score"], state["config"]["seppo"]["sampler"]["compile"]
    del state["pool"]
    (path / "state.json").write_text(json.dumps(state))
    declare_as_before(path)
    finished["seppo"]["reference_score"] = "rollout"
    refused(forks, finished, "seppo.reference_score: 'online' there, 'rollout' now")
    del finished["seppo"]["reference_score"]
    assert forks.run(finished, "--resume", "auto").status == 0


def test_a_checkpoint_of_another_run_is_refused(finished: dict[str, Any], settings: Callable[..., dict[str, Any]], forks: Forks,
                                                tmp_path: Path) -> None:
    other = settings(**{"seppo.output_dir": str(tmp_path / "other"), "seppo.checkpoint.every": 1})
    assert forks.run(other, strike=Strike("seppo_fast.training.trainer:Trainer.report", 1, signal.SIGTERM)).status == 0
    foreign = folder(finished) / "checkpoints" / LAST
    refused(forks, other, f"{foreign} was written by another run", "past policies", resume=str(foreign))
    shutil.copytree(foreign, tmp_path / "other" / "checkpoints" / LAST)
    refused(forks, other, "was written by another run")
    empty = settings(**{"seppo.output_dir": str(tmp_path / "empty"), "seppo.checkpoint.every": 1})
    refused(forks, empty, "holds no run", resume=str(foreign))


def test_a_checkpoint_of_an_earlier_version_is_refused(finished: dict[str, Any], forks: Forks) -> None:
    """It had DeepSpeed's own files, of as many ranks as there were."""
    path = folder(finished) / "checkpoints" / LAST
    (path / "deepspeed").mkdir()
    (path / "engine.json").rename(path / "deepspeed" / "mp_rank_00_model_states.pt")
    declare(path, {})
    refused(forks, finished, f"{path} was written by an earlier version of this program", f"seppo.model.start_from={path}")


def test_another_batch_is_refused(finished: dict[str, Any], forks: Forks) -> None:
    finished["train_batch_size"] = 16
    refused(forks, finished, "pairs of an update: 8 there, 16 now")
    finished["train_batch_size"], finished["zero_optimization"] = 8, {"stage": 1, "zero_quantized_gradients": True}
    refused(forks, finished, "zero_optimization: None there, {'zero_quantized_gradients': True} now")


def test_other_data_are_refused(finished: dict[str, Any], forks: Forks, demonstrations: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(demonstrations, tmp_path / "demonstrations"))
    (changed / "0.png").write_bytes((changed / "1.png").read_bytes())
    state = folder(finished) / "checkpoints" / LAST / "state.json"
    # The path may stay while its content changes: the same path, as the checkpoint knows it.
    state.write_text(state.read_text().replace(str(demonstrations), str(changed)))
    declare(state.parent, {})
    finished["seppo"]["data"]["source"] = str(changed)
    refused(forks, finished, "was trained on other data", "restore seppo.data.source")


def test_moved_and_touched_data_are_the_same(finished: dict[str, Any], forks: Forks, demonstrations: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(demonstrations, tmp_path / "moved", copy_function=shutil.copyfile))
    os.utime(moved / "0.png", (0, 0))
    raw = json.loads(json.dumps(finished))
    raw["seppo"]["data"] |= {"source": str(moved), "cache_dir": str(tmp_path / "another cache")}  # where content alone can tell
    result = forks.run(raw, "--resume", "auto")
    assert result.status == 0, result.output[-2000:]
    (moved / "1.png").write_bytes((moved / "0.png").read_bytes())
    refused(forks, raw, "was trained on other data")


def test_an_earlier_checkpoint_can_be_chosen_and_the_later_one_is_set_aside(finished: dict[str, Any], forks: Forks) -> None:
    run = folder(finished)
    whole = final_bytes(run)
    result = forks.run(finished, "--resume", str(run / "checkpoints" / BEFORE))
    assert result.status == 0 and "set aside the later checkpoint" in result.output
    assert final_bytes(run) == whole
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"set_aside_{LAST}", BEFORE, LAST]


@pytest.mark.parametrize("path", ["nowhere", "pool", "."])
def test_a_wrong_path_to_resume_from(path: str, finished: dict[str, Any], forks: Forks) -> None:
    wrong = folder(finished) / path
    lack = "there is no such folder" if path == "nowhere" else "it has no complete.json"
    refused(forks, finished, f"--resume {wrong}: {lack}; complete checkpoints: ", LAST, resume=str(wrong))


def test_a_folder_that_holds_a_run_is_not_overwritten(finished: dict[str, Any], forks: Forks) -> None:
    refused(forks, finished, "already holds a run: add --resume auto", resume=None)
    (folder(finished) / "run.json").write_text("{")
    refused(forks, finished, "run.json is damaged")
    (folder(finished) / "run.json").unlink()
    for resume in (None, "auto"):
        refused(forks, finished, "holds checkpoints and metrics.jsonl and final but no run.json", resume=resume)


def test_resuming_where_there_is_nothing_starts_at_update_0(settings: Callable[..., dict[str, Any]], forks: Forks,
                                                            tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    left = tmp_path / "run" / ".skipped.jsonl.e1e3bc17.tmp"  # by a kill while the list was written
    left.touch()
    result = forks.run(settings(**{"seppo.iterations": 1, "seppo.updates_per_iteration": 1}), "--resume", "auto")
    assert result.status == 0 and "has no complete checkpoint: starting at update 0" in result.output
    assert not left.exists()


def test_a_past_policy_that_is_missing_or_torn(finished: dict[str, Any], forks: Forks) -> None:
    finished["seppo"]["iterations"] = 4
    pool = folder(finished) / "pool"
    os.truncate(pool / "policy_00000.safetensors", 100)
    finished["seppo"]["reference"] = "initial"
    for path in (folder(finished) / "checkpoints").glob("*/state.json"):
        path.write_text(path.read_text().replace('"reference": "uniform"', '"reference": "initial"'))
        declare(path.parent, {})
    result = forks.run(finished, "--resume", "auto")
    assert result.status == 2 and f"{pool / 'policy_00000.safetensors'}: cannot be read" in result.output
    assert "Traceback" not in result.output
    (pool / "policy_00001.safetensors").unlink()
    refused(forks, finished, f"{pool} lacks past policies [1]")


@pytest.mark.parametrize("megabytes", [5, 2])  # a rank's file has 9.5 MB, a past policy 3.2
def test_no_room_for_a_file_stops_the_run_and_the_checkpoint_before_stays(
        megabytes: int, finished: dict[str, Any], settings: Callable[..., dict[str, Any]], forks: Forks, tmp_path: Path) -> None:
    raw = settings(**{"seppo.output_dir": str(tmp_path / "limited"), "seppo.checkpoint.every": 1})
    assert forks.run(raw, strike=Strike("seppo_fast.training.trainer:Trainer.report", 1, signal.SIGTERM)).status == 0
    good = tmp_path / "limited" / "checkpoints" / "update_00000001"
    result = forks.run(raw, "--resume", "auto", file_limit=megabytes * 10**6)
    assert result.status == 2 and result.output.count("seppo_fast: ") == 1 and "Traceback" not in result.output
    words = ["policy_00001.safetensors: past policy 1", "File too large", "make room"] if megabytes == 2 else [
        "could not write the checkpoint", "update_00000002", "File too large", f"the last complete checkpoint is {good}"]
    for word in words:
        assert word in result.output, result.output[-1500:]
    assert checkpoint.complete(good.parent) == [good]
    assert forks.run(raw, "--resume", "auto").status == 0
    assert not list(good.parent.glob(".*")), "what was half written is gone"
    assert final_bytes(tmp_path / "limited") == final_bytes(folder(finished))


def test_one_of_two_ranks_without_room_stops_both(settings: Callable[..., dict[str, Any]], forks: Forks, tmp_path: Path) -> None:
    raw = settings(**{"seppo.checkpoint.every": 1, "zero_optimization": {"stage": 1}})
    # ZeRO-1 halves the optimizer state: what each of the two writes is above the limit, a past policy is not.
    result = forks.run(raw, ranks=2, file_limit=4 * 10**6)
    assert 0 not in result.statuses and 2 in result.statuses
    assert result.output.count("seppo_fast: ") == 1 and "could not write the checkpoint" in result.output
    assert checkpoint.complete(tmp_path / "run" / "checkpoints") == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems may not be mounted here; the file size limit above tests the same paths")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def resize(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def test_a_full_disk_stops_the_run_and_the_checkpoint_before_stays(
        small_disk: Path, finished: dict[str, Any], settings: Callable[..., dict[str, Any]], forks: Forks) -> None:
    """Too small at the start, it is refused; filled by others after the second checkpoint, there is a warning, and then an end."""
    raw = settings(**{"seppo.output_dir": str(small_disk / "run"), "seppo.checkpoint.every": 1})
    checkpoints = small_disk / "run" / "checkpoints"
    refused = forks.run(raw)
    assert refused.status == 2 and not checkpoints.exists() and refused.output.count("seppo_fast: ") == 1
    assert f"seppo_fast: {small_disk / 'run'} (seppo.output_dir): " in refused.output and "checkpoints" in refused.output

    def fill() -> None:
        while len(checkpoint.complete(checkpoints)) < 2:  # after the iteration's past policy, which would be the first to fail
            time.sleep(0.002)
        resize(small_disk, shutil.disk_usage(small_disk).used + 2 * 10**6)

    resize(small_disk, 300 * 10**6)
    others = threading.Thread(target=fill, daemon=True)
    others.start()
    result = forks.run(raw)
    others.join()
    assert result.status == 2 and "Traceback" not in result.output and result.output.count("seppo_fast: ") == 1
    good = checkpoint.complete(checkpoints)
    assert good and f"the last complete checkpoint is {good[-1]}" in result.output
    assert result.output.count("the disk fills up: ") == 1, result.output[-3000:]
    resize(small_disk, 300 * 10**6)
    assert forks.run(raw, "--resume", "auto").status == 0
    assert final_bytes(small_disk / "run") == final_bytes(folder(finished))
