"""The quickstart's report, from made-up metrics; and its configuration and command line."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from seppo_fast.configfile import batch_plan, load_config
from seppo_fast.quickstart.__main__ import main
from seppo_fast.quickstart.digits import split_digits
from seppo_fast.quickstart.judge import Judge, Scores
from seppo_fast.quickstart.report import curves, iteration_mean, read_metrics, side_by_side, table, write_result
from seppo_fast.quickstart.steps import overrides

BEFORE, AFTER = Scores(0.7, 0.4, 500), Scores(0.85, 0.625, 500)


@pytest.fixture(scope="module")
def judge():
    learnt, held_out = split_digits(0)
    return Judge(held_out, learnt)


@pytest.fixture
def rows():
    keys = ("loss", "model_mse_winner", "model_mse_loser", "seconds_sampling", "seconds_training", "seconds_data")
    return [
        {"update": 3 * k + u + 1, "iteration": k + 1, "aaf_rate": 0.5 + 0.1 * k, "implicit_acc": 0.6 + 0.01 * u}
        | {key: 0.25 for key in keys}
        for k in range(2) for u in range(3)
    ]


def test_means_over_an_iteration(rows, tmp_path):
    assert iteration_mean(rows, "aaf_rate", 0) == pytest.approx(0.5)
    assert iteration_mean(rows, "aaf_rate", -1) == pytest.approx(0.6)
    rows[0]["implicit_acc"] = None
    assert iteration_mean(rows, "implicit_acc", 0) == pytest.approx(0.615)
    for row in rows:
        row["loss"] = None
    assert math.isnan(iteration_mean(rows, "loss", 0))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_metrics(tmp_path / "metrics.jsonl") == rows


def test_table_states_what_was_measured(rows, judge):
    text = table(BEFORE, AFTER, judge, rows)
    lines = {line[:22].strip(): line[22:].split() for line in text.splitlines()}
    assert lines["prompt accuracy"] == ["70.0%", "85.0%", "+15.0"]
    assert lines["cleanliness"] == ["40.0%", "62.5%", "+22.5"]
    assert lines["AAF rate"] == ["0.50", "0.60"]
    assert lines["implicit accuracy"] == ["0.61", "0.61"]
    worse = table(AFTER, BEFORE, judge, rows)
    assert "-15.0" in worse


def test_pictures_show_base_left_and_trained_right(rows, tmp_path):
    labels = [index % 10 for index in range(20)]
    side_by_side(tmp_path / "side.png", torch.zeros(20, 3, 16, 16), torch.ones(20, 3, 16, 16), labels, per_prompt=2)
    picture = np.asarray(Image.open(tmp_path / "side.png").convert("L"))
    middle, width = picture[picture.shape[0] // 2], picture.shape[1]
    assert (middle[: width // 2] == 0).sum() > 100 and (middle[width // 2 :] == 0).sum() < 20
    rows[2]["loss"] = None
    curves(tmp_path / "curves.png", rows)
    assert np.asarray(Image.open(tmp_path / "curves.png").convert("L")).std() > 5


def test_result_holds_the_figures(rows, judge, tmp_path):
    write_result(tmp_path / "result.json", BEFORE, AFTER, judge, rows, {"base": 1.234, "total": 5.0}, {"seed": 0})
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["seppo"]["prompt_accuracy"] == 0.85 and result["base"]["cleanliness"] == 0.4
    assert result["seconds"] == {"base": 1.2, "total": 5.0} and result["updates"] == 6
    assert result["seconds_in_training"] == {"sampling": 1.5, "training": 1.5, "data": 1.5}
    assert result["machine"]["cpu"] and result["machine"]["cores"] >= 1
    assert result["versions"]["torch"] == torch.__version__


def test_shipped_configuration_is_valid_and_is_the_method(tmp_path):
    config = load_config("quickstart.json", overrides(tmp_path, seed=3))
    seppo = config.seppo
    assert (seppo.method, seppo.reference, seppo.flipper, seppo.seed) == ("seppo", "uniform", "aaf", 3)
    assert seppo.model.path == str(tmp_path / "base") and seppo.data.source == str(tmp_path / "demonstrations")
    assert seppo.data.resolution == 16 and not seppo.data.flip  # a mirrored two is no two
    assert batch_plan(config.deepspeed, 1).size == 64


def test_a_folder_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file" / "out")]) == 2
    assert str(tmp_path / "file" / "out") in capsys.readouterr().err
