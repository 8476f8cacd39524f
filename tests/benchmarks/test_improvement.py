"""Table, text, settings and decisions of the second paper's toy, from runs that were not made."""

import json
from pathlib import Path

import pytest

from benchmarks.by_seed import Run, changed
from benchmarks.improvement.__main__ import main
from benchmarks.improvement.plots import figures
from benchmarks.improvement.readme import improvement
from benchmarks.improvement.report import CLAIMS, MEASURES, agreement, headline, judged, report, table
from benchmarks.improvement.runs import BASE, IMPROVEMENT, METHODS, Settings, overrides, policies
from seppo_fast.configfile import load_config

WINNERS = 0.4
LEVELS = {BASE: [0.65], IMPROVEMENT: [0.38, 0.2, 0.1], "sft": [0.5, 0.45, WINNERS], "dpo": [0.5, 0.45, 0.44],
          "spin": [0.5, 0.45, WINNERS], "iterative": [0.45, 0.3, 0.2], "iterative_few": [0.5, 0.4, 0.35],
          "iterative_spin": [0.35, 0.25, 0.15]}


def point(level: float) -> dict[str, float]:
    return {"level": level, "prompt_accuracy": 1 - level, "distance": 3 + level, "vendi": 3 - level, "samples": 400}


def made(seed: int, method: str, levels: list[float]) -> Run:
    run: Run = {"seed": seed, "method": method, "points": [point(level + 0.05 * seed) for level in levels], "commit": "abc"}
    if method == BASE:
        run["data"] = {"losers": point(0.65 + 0.05 * seed), "winners": point(WINNERS + 0.05 * seed)}
    return run


def result(seeds: int = 3, **changes: list[float]) -> dict:
    """Every method as the paper would have it, but for `changes`."""
    runs = [made(seed, method, levels) for method, levels in (LEVELS | changes).items() for seed in range(seeds)]
    return {"machine": {"cpu": "Some CPU"}, "versions": {"torch": "2.99"}, "seconds": {"processor": 120}, "runs": runs,
            "commits_of_runs": ["abc"], "settings": vars(Settings()) | {"seeds": seeds, "side_by_side": 2}}


def test_runs_as_in_the_paper_disagree_nowhere() -> None:
    text = agreement(result())
    assert "Where the digits disagree with the paper:\n\n- nowhere\n" in text
    assert len(judged(result())) == sum(len(claim.measures) for claim in CLAIMS)


def test_what_is_against_the_paper_is_named_with_its_difference() -> None:
    """Less is better for level and distance, and the pairs are taken by seed: the seeds differ by more than the methods."""
    text = agreement(result(iterative_spin=[0.5, 0.5, 0.55]))
    disagreeing = text[text.index("disagree with"):text.index("do not tell")]
    for sentence in ("- iterative DPO from SPIN is better than SPIN (Table 1): level -0.15 [-0.15, -0.15]",
                     "- iterative DPO from SPIN is better than SPIN (Table 1): prompt accuracy -15.0 [-15.0, -15.0]",
                     "- iterative DPO from SPIN is more diverse than SPIN (Table 1): Vendi -0.15",
                     "- iterative DPO from SPIN goes past the winners' mean (Section 6): level -0.15"):
        assert sentence in disagreeing
    assert "SPIN is better than the base" not in disagreeing


def test_one_seed_tells_nothing() -> None:
    alone = result(seeds=1)
    assert {name for name, _ in judged(alone)} == {"open"}
    assert "one seed (so no intervals)" in report(alone) and "±" not in table(alone)


def test_the_table_has_a_row_for_each_iteration_and_application() -> None:
    rows = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:] for line in table(result()).splitlines()[2:]}
    assert len(rows) == 3 + 3 + 2 + 4 * 3
    assert rows["base's samples, improved twice"][0].startswith("0.25") and rows["the data's winners"][0].startswith("0.45")
    assert rows["SPIN, iteration 1"][0].startswith("0.55") and rows["SFT on the winners"][1].startswith("55.0% ± 12.4")


def test_methods_that_were_left_out_are_not_spoken_of(tmp_path: Path) -> None:
    some = result()
    some["runs"] = [run for run in some["runs"] if run["method"] in (BASE, IMPROVEMENT, "spin")]
    assert not any("iterative" in sentence or "SFT" in sentence for _, sentence in judged(some))
    assert len(table(some).splitlines()) == 2 + 3 + 3 + 3
    figures(tmp_path, some)


def test_the_readme_has_text_figure_and_headline(tmp_path: Path) -> None:
    assert improvement(tmp_path).startswith("Not measured yet")
    (tmp_path / "improvement.json").write_text(json.dumps(result()))
    text = improvement(tmp_path)
    assert text.startswith(report(result()).rstrip()) and text.endswith("(results/improvement.png)")
    assert "2 minutes of processor time on Some CPU" in text and "commit `abc`" in text
    assert "over its base: level +0.45 [+0.45, +0.45], distance +0.45" in headline(result())
    figures(tmp_path, result())
    assert (tmp_path / "improvement.png").stat().st_size > 10_000


@pytest.mark.parametrize("method", [IMPROVEMENT, *METHODS])
def test_each_method_is_what_it_says(method: str, tmp_path: Path) -> None:
    name = "quickstart_improvement.json" if method == IMPROVEMENT else "quickstart_iterative_dpo.json"
    ours = load_config(name, overrides(tmp_path, 3, method, Settings())).seppo
    assert ours.seed == 3 and ours.model.path == str(tmp_path / "base") and ours.output_dir == str(tmp_path / method)
    if method == IMPROVEMENT:
        assert ours.method == "improvement" and ours.updates == Settings().improvement_updates
        return
    assert ours.method == METHODS[method].method and ours.updates == 90
    assert (ours.improvement.path is not None) == (ours.method == "iterative_dpo")
    assert ours.sampler.samples_per_iteration == {"sft": None, "dpo": None, "iterative_few": 64}.get(method, 640)
    if method == "iterative_spin":
        assert ours.model.start_from == str(policies(tmp_path / "spin", "spin", Settings())[-1])
        assert ours.reference_model.path == str(tmp_path / "base")


def test_the_settings_are_the_quickstarts() -> None:
    """One change at most: the method's own."""
    stage = load_config("quickstart_iterative_dpo.json")
    mine = load_config("quickstart_iterative_dpo.json", overrides(Path("work"), 0, "iterative", Settings()))
    for key, value in stage.deepspeed.items():
        assert mine.deepspeed[key] == value, key
    same = {key for key, value in stage.as_dict()["seppo"].items() if mine.as_dict()["seppo"][key] == value}
    assert stage.as_dict()["seppo"].keys() - same <= {"model", "data", "output_dir", "seed", "checkpoint", "improvement"}
    guidance = ("guidance_scale", "image_guidance_scale")
    assert all(getattr(stage.seppo.improvement, name) == getattr(mine.seppo.improvement, name) for name in guidance)


@pytest.mark.parametrize(("argv", "said"), [
    (["--methods", "iterative_spin"], "--methods iterative_spin begins with SPIN's policy: give spin, too"),
    (["--methods", "seppo"], "--methods seppo: not known; there are improvement, sft, dpo, spin"),
    (["--set", "samples=1.5"], "samples must be a positive integer")])
def test_bad_input_is_one_message(argv: list[str], said: str, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path), "--work", str(tmp_path / "work"), *argv]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_settings_are_changed_by_name() -> None:
    assert changed(Settings(), ["lr=2e-5", "samples=64"]) == Settings(lr=2e-5, samples=64)
    assert set(MEASURES) <= set(point(0.5))
