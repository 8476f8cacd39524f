"""Which model is shown as the best."""

import random
from typing import Any

import pytest

from seppo_fast.evaluation.report.table import markdown, tabulate

PROMPTS = 40


def result(better: str = "higher", prompts: int = PROMPTS, **gains: float) -> dict[str, Any]:
    """Models that have, from the same noise, so much more than the first, with noise of their own of 0.1."""
    draw = random.Random(0)
    of_prompt = [draw.gauss(20, 2) for _ in range(prompts)]
    samples = [{"prompt": i, "sample": 0, "model": model, "file": "x.png", "problem": None,
                "values": {"s": of_prompt[i] + gain + draw.gauss(0, 0.1)}} for model, gain in gains.items() for i in range(prompts)]
    made = {"models": [{"name": model} for model in gains], "groups": ["all"], "samples": samples,
            "scores": [{"name": "s", "label": "S", "kind": "sample", "better": better, "missing": None, "weights": {},
                        "published": {}}]}
    return made | {"table": tabulate(made, [("set",)] * prompts)}


@pytest.mark.parametrize(("better", "gains", "best"), [
    ("higher", {"base": 0.0, "tuned": 0.5}, ["tuned"]),  # the means' own intervals overlap: only pairs can tell
    ("lower", {"base": 0.0, "tuned": 0.5}, ["base"]),
    ("higher", {"base": 0.0, "tuned": 0.01}, []),
    ("higher", {"base": 0.0, "tuned": 0.5, "sft": 0.51}, []),  # better than the first, but not than the other
    ("higher", {"base": 0.0, "tuned": 0.5, "sft": 1.0}, ["sft"]),
    ("higher", {"base": 0.0}, []),
])
def test_bold_is_what_is_clearly_better_than_every_other(better: str, gains: dict[str, float], best: list[str]) -> None:
    made = result(better, **gains)
    assert [row["model"] for row in made["table"] if row["best"]] == best
    bold = [line.split("|")[1].strip() for line in markdown(made).splitlines() if "**" in line]
    assert bold == best and ("clear of zero" in markdown(made)) == bool(best)


def test_one_prompt_makes_no_model_the_best() -> None:
    assert not any(row["best"] for row in result(prompts=1, base=0.0, tuned=5.0)["table"])


def test_a_model_without_values_is_no_rival() -> None:
    made = result(base=0.0, tuned=0.5, broken=9.0)
    for sample in made["samples"]:
        if sample["model"] == "broken":
            sample["values"]["s"] = None
    assert [row["model"] for row in tabulate(made, [("set",)] * PROMPTS) if row["best"]] == ["tuned"]


def test_only_pairs_that_have_both_values_count() -> None:
    made = result(base=0.0, tuned=0.5)
    for sample in made["samples"]:
        if sample["model"] == "tuned" and sample["prompt"] > 0:
            sample["values"]["s"] = None if sample["prompt"] % 2 else float("nan")
    assert not any(row["best"] for row in tabulate(made, [("set",)] * PROMPTS))  # one pair is left
