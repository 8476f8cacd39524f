"""The evaluation's figures as a list, as Markdown tables shaped like the paper's, and as CSV; pure functions of the result."""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from seppo_fast.evaluation.report.statistics import is_finite, mean_of, win_rate

ALL = "all"
ARROWS = {"higher": "↑", "lower": "↓"}
BOLD = "Bold: the 95 % interval of the difference to every other model is clear of zero."

Values = Mapping[tuple[int, int], float | None]  # prompt and sample -> a model's value of a score


def groups_of(sets: Sequence[tuple[str, ...]]) -> list[str]:
    """The groups of prompts: all together first, then the sets and their parts, except those that hold all prompts."""
    names = list(dict.fromkeys(name for own in sets for name in own))
    return [ALL, *(name for name in names if not all(name in own for own in sets))]


def in_group(own: tuple[str, ...], group: str) -> bool:
    """Whether a prompt of these sets belongs to the group."""
    return group == ALL or group in own


def tabulate(result: Mapping[str, Any], sets: Sequence[tuple[str, ...]]) -> list[dict[str, Any]]:
    """The rows of `result["table"]` for scores of single samples: means and win rates against the first model, per group."""
    rows = []
    by_model = {model["name"]: [sample for sample in result["samples"] if sample["model"] == model["name"]]
                for model in result["models"]}
    for group in result["groups"]:
        inside = {model: [sample for sample in samples if in_group(sets[sample["prompt"]], group)]
                  for model, samples in by_model.items()}
        for score in (score for score in result["scores"] if score["kind"] == "sample"):
            values = {model: {(sample["prompt"], sample["sample"]): sample["values"].get(score["name"]) for sample in samples}
                      for model, samples in inside.items()}
            rows += rows_of(values, group, score)
    return rows


def rows_of(values: Mapping[str, Values], group: str, score: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each model, with its values of one score in one group. `best`: clearly better than every other model."""
    rows, first = [], next(iter(values))
    means = {model: mean_of([*own.values()], [prompt for prompt, _ in own]) for model, own in values.items()}
    best = clearly_best(values, {model: found.mean for model, found in means.items()}, score["better"])
    for model, own in values.items():
        owners = [prompt for prompt, _ in own]
        won = None if model == first else asdict(win_rate([*own.values()], paired(own, values[first]), owners, score["better"]))
        rows.append({"model": model, "group": group, "score": score["name"], **asdict(means[model]), "win_rate": won,
                     "best": model == best})
    return rows


def paired(own: Values, other: Values) -> list[float | None]:
    """The other model's values from the same noise."""
    return [other.get(slot) for slot in own]


def clearly_best(values: Mapping[str, Values], means: Mapping[str, float | None], better: str) -> str | None:
    """The model whose difference to each other one has a 95 % interval above zero (below, where lower is better).

    None where there is no such model, or only one model, or two models share only one prompt: its interval has no width.
    """
    sign = 1 if better == "higher" else -1
    known = [model for model, mean in means.items() if mean is not None]
    if len(known) < 2:
        return None
    best = max(known, key=lambda model: sign * means[model])
    for model in (model for model in known if model != best):
        both = [slot for slot, value in values[best].items() if is_finite(value) and is_finite(values[model].get(slot))]
        owners = [prompt for prompt, _ in both]
        found = mean_of([sign * (values[best][slot] - values[model][slot]) for slot in both], owners)
        if len(set(owners)) < 2 or found.low <= 0:
            return None
    return best


def markdown(result: Mapping[str, Any]) -> str:
    """Means as in Tables 1 and 2 (models down, scores and sets across, clearly best values in bold), then intervals, win rates,
    weights that were given by path, and what is missing."""
    groups = result["groups"][1:] or result["groups"]
    columns = [(score, group) for score in result["scores"] for group in groups]
    cells = {(row["model"], row["group"], row["score"]): row for row in result["table"]}
    several = len(groups) > 1
    names = [f"{score['label']} {ARROWS[score['better']]}{f' {group}' if several else ''}" for score, group in columns]
    lines = ["| Model | " + " | ".join(names) + " |", "|---" * (len(columns) + 1) + "|"]
    for model in result["models"]:
        shown = [mean_cell(cells.get((model["name"], group, score["name"])), score) for score, group in columns]
        lines.append(f"| {escaped(model['name'])} | " + " | ".join(shown) + " |")
    first = result["models"][0]["name"]
    heading = ("Model", "Prompts", "Score", "Mean", "95 % interval", f"Better than {escaped(first)}", "95 % interval")
    lines += ["", BOLD] if any(row["best"] for row in result["table"]) else []
    lines += ["", "| " + " | ".join(heading) + " |", "|---" * len(heading) + "|"]
    labels = {score["name"]: score["label"] for score in result["scores"]}
    for row in result["table"]:
        won = row["win_rate"] or {"mean": None, "low": None, "high": None}
        lines.append(f"| {escaped(row['model'])} | {escaped(row['group'])} | {labels[row['score']]} | {number(row['mean'])}"
                     f" | {between(row)} | {share(won['mean'])} | {between(won, share)} |")
    given = [f"- {score['label']}, {part}: {place} (published: {score['published'][part]})" for score in result["scores"]
             if not score["missing"] for part, place in score["weights"].items() if place != score["published"][part]]
    missing = [f"- {score['label']}: {score['missing']}" for score in result["scores"] if score["missing"]]
    lines += ["", "Weights given by path, not compared with the published ones:", *given] if given else []
    return "\n".join([*lines, *(["", "Missing:", *missing] if missing else [])]) + "\n"


def mean_cell(row: Mapping[str, Any] | None, score: Mapping[str, Any]) -> str:
    """One mean, in bold where it is clearly the best."""
    if score["missing"]:
        return "missing"
    text = number(row["mean"] if row else None)
    return f"**{text}**" if row and row["best"] else text


def write_csv(result: Mapping[str, Any], path: Path) -> None:
    """A row for each sample: model, set, prompt, file, a column for each score; empty where there is no value."""
    names = [score["name"] for score in result["scores"] if score["kind"] == "sample"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "group", "prompt", "sample", "file", *names, "problem"])
        for sample in result["samples"]:
            prompt = result["prompts"][sample["prompt"]]
            values = ["" if sample["values"].get(name) is None else repr(sample["values"][name]) for name in names]
            writer.writerow([sample["model"], prompt["group"], prompt["text"], sample["sample"], sample["file"], *values,
                             sample["problem"] or ""])


def number(value: float | None) -> str:
    """A number with as many digits as the paper has."""
    if not is_finite(value):
        return "no value"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def between(row: Mapping[str, Any], shown: Callable[[float], str] = number) -> str:
    return "" if row["low"] is None else f"{shown(row['low'])} to {shown(row['high'])}"


def escaped(text: str) -> str:
    return text.replace("|", "\\|")
