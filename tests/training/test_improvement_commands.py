"""The literal commands of both stages, with the configurations that the package ships."""

from pathlib import Path
from typing import Any

import pytest
from outcomes import rows

TINY = ("seppo.data.resolution=16", "seppo.iterations=2", "seppo.updates_per_iteration=2", "seppo.sampler.steps=2",
        "seppo.sampler.batch_size=4", "train_batch_size=4", "train_micro_batch_size_per_gpu=2", "seppo.samples.every=2")


def test_the_dry_runs_at_full_size(forks: Any, tmp_path: Path) -> None:
    first, second = (forks.run(f"ds_a100_{name}.json", "--dry-run", "--set", f"seppo.output_dir={tmp_path / 'run'}")
                     for name in ("improvement", "iterative_dpo"))
    for result, lines in (
        (first, ["improvement, tasks improve 0.6, reconstruct 0.2, unconditional 0.2", "200000 = 200 iterations x 1000",
                 "2048 pairs = 8 a rank x 256 accumulated", "859.5 M parameters (859.5 M trained)",
                 "before you train: seppo.data.source is not set", "NVIDIA A100: "]),
        (second, ["iterative_dpo, reference initial, flipper none, beta 2000", "15000 = 3 iterations x 5000",
                  "115200 in all, 38400 an iteration, used 267 times",
                  "before you train: seppo.improvement.path runs/sd15_improvement/final is not there yet", "NVIDIA A100: "]),
    ):
        assert result.status == 0, result.output[-2000:]
        for line in [*lines, "dry run: nothing was trained or written"]:
            assert line in result.output, f"{line}\n{result.output}"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_both_stages_one_after_the_other_at_tiny_size(forks: Any, sd: Path, pickapic: Path, demonstrations: Path, cache_dir: Path,
                                                      tmp_path: Path) -> None:
    common = (*TINY, f"seppo.model.path={sd}", f"seppo.data.cache_dir={cache_dir}")
    first = forks.run("ds_a100_improvement.json", "--set", *common, f"seppo.data.source={pickapic}",
                      f"seppo.output_dir={tmp_path / 'one'}")
    assert first.status == 0, first.output[-3000:]
    second = forks.run("ds_a100_iterative_dpo.json", "--set", *common, f"seppo.data.source={demonstrations}",
                       f"seppo.improvement.path={tmp_path / 'one' / 'final'}", f"seppo.reference_model.path={sd}",
                       "seppo.sampler.samples_per_iteration=8", f"seppo.output_dir={tmp_path / 'two'}")
    assert second.status == 0, second.output[-3000:]
    for stage in ("one", "two"):
        assert [row["skipped_steps"] for row in rows(tmp_path / stage)] == [0] * 4
        assert len(list((tmp_path / stage / "samples").iterdir())) == 3
