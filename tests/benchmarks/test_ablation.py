"""Intervals, table, text and decisions of the ablation, from runs that were not made."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.ablation.__main__ import arguments, main
from benchmarks.ablation.readme import ablation, ablation_flow
from benchmarks.ablation.report import CLAIMS, agreement, judged, report, table
from benchmarks.ablation.runs import BASE, METHODS, ROWS, SETTINGS, Settings, overrides, policies, recipe_of, take_bases
from benchmarks.by_seed import Run, alone_in, changed, make_all, open_work, result_file, unfinished
from benchmarks.intervals import Interval, interval, verdict
from seppo_fast.configfile import load_config
from seppo_fast.errors import UserError
from seppo_fast.quickstart.models import KINDS


def made(seed: int, method: str, accuracies: list[float], aaf: tuple[float, float] = (0.6, 0.7)) -> Run:
    run: Run = {"seed": seed, "method": method, "seconds": 9.0, "cpu_seconds": 8.0, "commit": "abc",
                "points": [{"update": 15 * k, "prompt_accuracy": value, "cleanliness": value / 2} for k, value in
                           enumerate(accuracies, 1)]}
    return run if method in (BASE, "sft") else run | {"aaf_rate": [*aaf], "implicit_acc": [0.5, 0.65]}


def result(seeds: int = 3, **changes: list[float]) -> dict:
    """Every method over 4 iterations as the paper would have it, but for `changes`."""
    ends = {BASE: [0.5], "sft": [0.7, 0.75, 0.75, 0.75], "no_aaf": [0.5], "indicator": [0.8], "initial": [0.6, 0.7, 0.75, 0.65],
            "latest": [0.6, 0.7, 0.6, 0.76], "seppo_w": [0.6, 0.65, 0.7, 0.8], "seppo_r": [0.78], "shared": [0.8]} | changes
    # The seeds differ by more than most methods do, which pairing takes out; and by a little that it does not.
    runs = [made(seed, method, [value + 0.1 * seed + 0.001 * seed * (-1) ** place for value in values])
            for place, (method, values) in enumerate(ends.items()) for seed in range(seeds)]
    return {"machine": {"cpu": "Some CPU"}, "versions": {"torch": "2.99"}, "seconds": {"processor": 120}, "runs": runs,
            "commits_of_runs": ["abc"],
            "settings": vars(Settings()) | {"iterations": 2, "seeds": seeds, "side_by_side": 2, "threads_of_each": 1}}


def test_the_interval_is_students() -> None:
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3 and found.half == pytest.approx(2.7764 * (2.5 / 5) ** 0.5, abs=1e-3)  # the quantile of 4 degrees
    assert interval([0.7]) == Interval(0.7, None)


@pytest.mark.parametrize(("found", "alike", "said"), [
    (Interval(0.1, 0.05), False, "agrees"), (Interval(-0.1, 0.05), False, "disagrees"), (Interval(0.1, 0.2), False, "open"),
    (Interval(0.1, 0.2), True, "agrees"), (Interval(0.1, 0.05), True, "disagrees"), (Interval(0.1, None), False, "open"),
    (Interval(0.0, 0.0), True, "agrees")])
def test_an_interval_decides_about_a_finding(found: Interval, alike: bool, said: str) -> None:
    assert verdict(found, alike) == said


def test_runs_as_in_the_paper_disagree_nowhere() -> None:
    text = agreement(result())
    assert "Where the digits disagree with the paper:\n\n- nowhere\n" in text
    assert len(judged(result())) == sum(len(claim.measures) for claim in CLAIMS)


def test_what_is_against_the_paper_is_named_with_its_difference() -> None:
    text = agreement(result(sft=[0.7, 0.8, 0.85, 0.9], no_aaf=[0.85]))
    disagreeing = text[text.index("disagree with"):text.index("do not tell")]
    for sentence in ("- SePPO-w is better than SFT (Table 1): prompt accuracy -9.8 [-10.3, -9.3]",
                     "- SePPO-w is better than without AAF (Table 4): prompt accuracy -5.0 [",
                     "- SFT no longer improves in the second half of the training (Figure 3, right):"):
        assert sentence in disagreeing
    assert "Table 1): cleanliness" in disagreeing and "initial" not in disagreeing


def test_one_seed_tells_nothing() -> None:
    alone = result(seeds=1)
    assert {name for name, _ in judged(alone)} == {"open"}
    assert "one seed (so no intervals)" in report(alone) and "±" not in table(alone)


def test_the_table_pairs_by_seed() -> None:
    lines = table(result()).splitlines()
    assert len(lines) == 2 + 1 + len(METHODS)
    rows = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:] for line in lines[2:]}
    assert rows["base"][:2] == ["60.1% ± 25.1", "-30.0 [-30.0, -30.0]"] and rows["base"][4:] == ["", " |"]
    assert rows["SFT"][1] == "-5.2 [-5.7, -4.7]" and rows["without AAF (reference uniform)"][4:] == ["0.70", "0.65 |"]
    assert rows[METHODS["seppo_w"].label][1] == ""


def test_methods_that_were_left_out_are_not_spoken_of() -> None:
    some = result()
    some["runs"] = [run for run in some["runs"] if run["method"] in (BASE, "no_aaf")]
    assert judged(some) == [] and len(table(some).splitlines()) == 4


def test_the_readme_block_has_text_and_figures(tmp_path: Path) -> None:
    assert ablation(tmp_path).startswith("Not measured yet")
    (tmp_path / "ablation.json").write_text(json.dumps(result()))
    text = ablation(tmp_path)
    assert text.startswith(report(result()).rstrip()) and "results/ablation_figure2.png" in text
    assert "2 minutes of processor time on Some CPU" in text and "commit `abc`" in text and "The same with" not in text
    other = result()
    other["settings"] |= {"lr": 1e-4, "seeds": 1}
    (tmp_path / "ablation_lr").mkdir()
    (tmp_path / "ablation_lr" / "ablation.json").write_text(json.dumps(other))
    instead = f"The same with lr 0.0001 instead of {result()['settings']['lr']:g}, 1 seed:"
    assert ablation(tmp_path).endswith(f"{instead}\n\n{table(other)}")


def test_what_is_reported_is_not_made_again(tmp_path: Path) -> None:
    assert unfinished(tmp_path, range(2), ["seppo_w", "sft"]) == [(0, "seppo_w"), (0, "sft"), (1, "seppo_w"), (1, "sft")]
    file = result_file(tmp_path, 0, "sft")
    (file.parent / "sft" / "final").mkdir(parents=True)  # trained, and not judged
    assert (0, "sft") in unfinished(tmp_path, range(2), ["sft"])
    file.write_text("{}")
    assert unfinished(tmp_path, range(2), ["seppo_w", "sft"]) == [(0, "seppo_w"), (1, "seppo_w"), (1, "sft")]


def test_every_method_is_one_change_of_the_quickstart(tmp_path: Path) -> None:
    like_it = Settings(batch_size=64, sampler_steps=8, updates=15)
    configs = {method: load_config("quickstart.json", overrides(tmp_path, 3, method, like_it)).as_dict() for method in METHODS}
    quickstart = load_config("quickstart.json").as_dict()
    main_one = configs["seppo_w"]
    for key, value in quickstart.items():
        assert main_one[key] == value or key == "seppo"
    same = {key for key, value in quickstart["seppo"].items() if main_one["seppo"][key] == value}
    assert quickstart["seppo"].keys() - same == {"model", "data", "output_dir", "seed", "checkpoint"}
    for method, keys in {"no_aaf": {"flipper"}, "indicator": {"flipper"}, "initial": {"reference"}, "latest": {"reference"},
                         "seppo_r": {"data"}, "shared": {"noise"}, "sft": {"method", "reference", "flipper", "checkpoint"}}.items():
        differing = {key for key, value in main_one["seppo"].items() if configs[method]["seppo"][key] != value}
        assert differing == keys | {"output_dir"}


def test_with_a_flow_the_main_rows_change_the_flows_quickstart(tmp_path: Path) -> None:
    given = arguments(["--model", "flow", "--out", str(tmp_path / "out"), "--set", "lr=1e-4"])
    assert (given.work, given.methods) == (Path("runs/ablation_flow"), ["sft", "no_aaf", "seppo_w"])
    assert (given.settings.model, given.settings.lr) == ("flow", 1e-4) and given.settings.beta != Settings().beta
    assert recipe_of(2, given.settings) == replace(KINDS["flow"].recipe, seed=2)
    quickstart = load_config("quickstart_flow.json").as_dict()["seppo"]
    for method in ROWS["flow"]:
        changes = overrides(tmp_path, 0, method, SETTINGS["flow"])
        found = load_config(KINDS["flow"].config, changes).as_dict()["seppo"]
        assert found["sampler"]["solver"] == quickstart["sampler"]["solver"] == "euler"
    own = arguments(["--out", str(tmp_path / "out")])
    assert own.work == Path("runs/ablation") and own.methods == [*METHODS] and own.settings == Settings()


def test_the_readme_block_on_the_flow_speaks_of_its_rows_alone(tmp_path: Path) -> None:
    assert ablation_flow(tmp_path).startswith("Not measured yet (`python -m benchmarks.ablation --model flow")
    some = result()
    some["runs"] = [run for run in some["runs"] if run["method"] in (BASE, *ROWS["flow"])]
    (tmp_path / "ablation_flow.json").write_text(json.dumps(some))
    text = ablation_flow(tmp_path)
    assert text == report(some).rstrip() and "SePPO-r" not in text and "SePPO-w is better than SFT" in text
    assert "SePPO-r on one picture" in report(result())


def test_the_text_says_which_reference_without_aaf_has(tmp_path: Path) -> None:
    """What it says is what the configuration resolves to."""
    found = load_config("quickstart.json", overrides(tmp_path, 0, "no_aaf", Settings())).seppo
    assert (found.method, found.reference, found.flipper) == ("seppo", "uniform", "none")
    said = "Without AAF, the sign is always -1 (flipper none) and the rest is SePPO-w's: the reference is uniform, a past policy"
    assert said in report(result()) and METHODS["no_aaf"].label == "without AAF (reference uniform)"
    some = result()
    some["runs"] = [run for run in some["runs"] if run["method"] != "no_aaf"]
    assert "Without AAF" not in report(some)


def test_past_policies_are_where_the_trainer_leaves_them(tmp_path: Path) -> None:
    settings = Settings(iterations=2, updates=15)
    assert {update: str(path) for update, path in policies(Path("run"), "sft", settings).items()} == {
        15: "run/checkpoints/update_00000015/policy.safetensors", 30: "run/checkpoints/update_00000030/policy.safetensors"}
    assert policies(Path("run"), "latest", settings)[15] == Path("run/pool/policy_00001.safetensors")
    assert list(policies(Path("run"), "indicator", settings)) == [30]


@pytest.mark.parametrize(("argv", "said"), [
    (["--seeds", "0"], "--seeds 0: at least one"), (["--methods", "sft", "spo"], "--methods spo: not known; there are sft, no_aaf"),
    (["--set", "gamma=1"], "there is no 'gamma'; there are vae_steps"),
    (["--set", "updates=1.5"], "updates must be a positive integer"),
    (["--set", "lr=nan"], "lr must be a positive number"), (["--set", "beta"], "beta must be a positive number")])
def test_bad_input_is_one_message(argv: list[str], said: str, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path), "--work", str(tmp_path / "work"), *argv]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_work_folder_belongs_to_its_settings(tmp_path: Path) -> None:
    for _ in range(2):
        open_work(tmp_path / "work", Settings())
    with pytest.raises(UserError, match="other settings .updates 12 there, 5 now; beta 250.0 there, 500.0 now"):
        open_work(tmp_path / "work", changed(Settings(), ["beta=500", "updates=5"]))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(UserError, match="holds other things"):
        open_work(tmp_path / "other", Settings())
    with pytest.raises(UserError, match="is in use by another"), alone_in(tmp_path / "work"), alone_in(tmp_path / "work"):
        pass


def test_bases_of_another_folder_are_taken_where_they_fit(tmp_path: Path) -> None:
    earlier, now = tmp_path / "earlier", tmp_path / "now"
    for work, settings in ((earlier, Settings()), (now, Settings(lr=1e-4))):
        open_work(work, settings)
    finished = result_file(earlier, 0, BASE)
    (finished.parent / "base").mkdir(parents=True)
    finished.write_text('{"seed": 0}')
    take_bases(now, earlier, 2, Settings(lr=1e-4))
    assert unfinished(now, range(2), [BASE]) == [(1, BASE)] and result_file(now, 0, BASE).read_text() == '{"seed": 0}'
    assert (now / "seed_0" / "base").resolve() == (finished.parent / "base").resolve()
    with pytest.raises(UserError, match="made or judged otherwise .denoiser_steps 700 there, 9 now"):
        take_bases(now, earlier, 2, Settings(denoiser_steps=9))
    with pytest.raises(UserError, match="nowhere"):
        take_bases(now, tmp_path / "nowhere", 2, Settings())


def test_a_failure_or_an_interruption_stops_the_others(capsys: pytest.CaptureFixture) -> None:
    begun, stopped = [], []

    def make(seed: int, method: str) -> Run:
        begun.append(seed)
        if method == "fails":
            raise KeyboardInterrupt if seed == 9 else UserError("its last words")
        return made(seed, method, [0.5])

    make_all([(0, "seppo_w"), (1, "seppo_w")], make, lambda: stopped.append(1))
    assert "2/2 after" in capsys.readouterr().out and not stopped
    for seed, error in ((0, UserError), (9, KeyboardInterrupt)):
        with pytest.raises(error):
            make_all([(seed, "fails"), *[(number, "seppo_w") for number in range(2)]], make, lambda: stopped.append(1))
    assert len(stopped) == 2
