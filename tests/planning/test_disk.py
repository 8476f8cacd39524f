"""The room on the disk: what runs really wrote, what is still to come, a refusal and a warning while there is room."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_sd

from seppo_fast.configfile import batch_plan, parse_config
from seppo_fast.errors import UserError
from seppo_fast.models import open_model
from seppo_fast.planning import disk
from seppo_fast.planning.cost import estimate
from seppo_fast.planning.disk import Part
from seppo_fast.planning.dry_run import dry_run

Settings = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with so many weights that the files' headers do not count."""
    return tiny_sd(tmp_path_factory.mktemp("models") / "wide")


def planned(raw: dict[str, Any]) -> dict[str, Part]:
    config = parse_config(raw)
    batch, model = batch_plan(config.deepspeed, 1), open_model(config.seppo.model.path)
    return disk.parts_of(config, batch, estimate(model, config, batch), model)


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size


@pytest.mark.parametrize("changes", [
    {"seppo.samples.every": 2, "seppo.sampler.samples_per_iteration": 8}, {"bf16": {"enabled": True}},
    {"zero_optimization": {"stage": 2}}, {"zero_optimization": {"stage": 3}}, {"seppo.model.lora": {"rank": 64}},
], ids=["fp32", "bf16", "zero 2", "zero 3", "lora"])
def test_what_runs_wrote(changes: dict[str, Any], wide: Path, settings: Settings, train: Any) -> None:
    """One iteration of two updates, so that no file has been removed yet: there are as many as planned."""
    raw = settings(**{"seppo.model.path": str(wide), "seppo.iterations": 1, "seppo.checkpoint.every": 1, **changes})
    parts = planned(raw)
    run = train(raw)
    assert parts.keys() == {"checkpoints", "past policies", "final/", *(("grids", "sample sets") if len(changes) == 2 else ())}
    for name, part in parts.items():
        found = sorted(run.glob(part.pattern))
        assert len(found) == part.count, name
        for path in found:
            real = size_of(path)
            if name == "grids":  # four pictures of 16 pixels, with room for their captions
                assert real < 100_000 > part.size
            else:
                assert part.size == pytest.approx(real, rel=0.1), name
    assert disk.left_of(parts, run, 2) == {}
    (found[0].rename(run / "elsewhere"))
    assert disk.left_of(parts, run, 2) == {name: part.size}


def test_checkpoints_that_are_there_at_once(settings: Settings) -> None:
    def count(**changes: Any) -> int:
        config = parse_config(settings(**{"seppo.iterations": 10, **changes}))
        return disk.kept_checkpoints(config.seppo)

    assert count() == 2 + 1 + 1, "the last two, the last sound one, and one that is written"
    assert count(**{"seppo.checkpoint.keep_last": 100}) == 10, "no more than there will be"
    best = {"seppo.data.hold_out": 4, "seppo.evaluation": {"every": 5, "keep_best": True}}
    assert count(**best) == 5
    assert count(**best, **{"seppo.checkpoint.every": 20}) == 1 + 4


def test_unused_rollouts_are_counted(settings: Settings) -> None:
    """With a window of an iteration of 2 updates of 8 pairs, a checkpoint after the first holds 8 samples of 4 x 8 x 8 in fp32."""
    plain, ahead = (planned(settings(**{"seppo.checkpoint.every": 1, "seppo.sampler.window": window}))["checkpoints"].size
                    for window in ("update", "iteration"))
    assert ahead - plain == 8 * 4 * 8 * 8 * 4


def test_a_run_that_has_no_room_is_refused_before_it_begins(settings: Settings, train: Any, tmp_path: Path) -> None:
    """A hundred million past policies are more than any disk has; nothing is encoded for them."""
    raw = settings(**{"seppo.iterations": 10**8, "seppo.data.cache_dir": str(tmp_path / "cache")})
    with pytest.raises(UserError) as refused:
        train(raw)
    words = str(refused.value)
    assert words.startswith(f"{tmp_path / 'run'} (seppo.output_dir): ") and "free on its disk" in words
    assert "past policies " in words and f"the cache in {tmp_path / 'cache'}" in words and "Quotas are not seen" in words
    assert all(key in words for key in ("seppo.checkpoint.keep_last", "seppo.output_dir", "seppo.data.cache_dir"))
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_the_plan_says_what_is_needed(settings: Settings) -> None:
    said = dry_run(parse_config(settings(**{"seppo.iterations": 7})), 1)
    (line,) = [line for line in said.splitlines() if line.startswith("  disk ")]
    assert "checkpoints 4 x " in line and "past policies 8 x " in line and "final/ " in line and "GB free, quotas apart" in line


def test_a_cache_on_the_same_disk_is_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "free", lambda folder: 10**9)
    disk.check(tmp_path / "run", {"final/": 4 * 10**8}, tmp_path / "cache", 4 * 10**8)
    words = r"1 GB are free .* needs about 1.05 GB \(final/ 0.45 GB, the cache in .* 0.5 GB, and a margin\)"
    with pytest.raises(UserError, match=words):
        disk.check(tmp_path / "run", {"final/": 45 * 10**7}, tmp_path / "cache", 5 * 10**8)
    disk.check(tmp_path / "run", {}, tmp_path / "cache", 0)


def test_the_warning_comes_once_a_crossing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One checkpoint of 10 GB of three is there; the two to come and their share of margin are 21 GB."""
    (tmp_path / "checkpoints" / "update_00000001").mkdir(parents=True)
    room = [22 * 10**9]
    monkeypatch.setattr(disk, "free", lambda folder: room[0])
    look = disk.watched(tmp_path, {"checkpoints": Part(10**10, 3, "checkpoints/update_*", every=5)})
    assert look(100) is None
    said = []
    for room[0] in (int(20.9e9), int(19e9), int(21.1e9), int(15e9)):
        said.append(look(6))
    assert said[1] is said[2] is None
    assert "20.9 GB are free" in said[0] and "needs about 21 GB (checkpoints 20 GB, and a margin)" in said[0]
    assert "15 GB are free" in said[3]
    assert look(5) is None, "only one is still to come"
    room[0] = 0
    assert look(0) is None, "and now none"


def test_a_run_goes_on_and_warns(settings: Settings, train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second checkpoint on there is less room than the rest needs with its margin of 100 MB."""
    checkpoints = tmp_path / "run" / "checkpoints"
    monkeypatch.setattr(disk, "free", lambda folder: 5 * 10**7 if any(checkpoints.glob("update_*")) else 10**12)
    run = train(settings(**{"seppo.checkpoint.every": 1}))
    assert (run / "final").exists() and capsys.readouterr().out.count("the disk fills up: 50 MB are free") == 1
