"""The evaluation's figures as a list, as Markdown tables shaped like the paper's, and as CSV; pure functions of the result."""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from seppo_fast.evaluation.report.statistics import is_finite, mean_of, win_rate

ALL = "all"
ARROWS = {"higher": "↑", "lower": "↓"}


def groups_of(sets: Sequence[tuple[str, ...]]) -> list[str]:
    """All prompts together first; then the sets, and their parts, where they are not the same again."""
    names = list(dict.fromkeys(name for own in sets for name in own))
    return [ALL, *(name for name in names if not all(name in own for own in sets))]


def in_group(own: tuple[str, ...], group: str) -> bool:
    """Whether a prompt of these sets counts in the group."""
    return group == ALL or group in own


def tabulate(result: Mapping[str, Any], sets: Sequence[tuple[str, ...]]) -> list[dict[str, Any]]:
    """The rows of `result["table"]` for scores of single samples: means and win rates against the first model, per group."""
    rows = []
    by_model = {model["name"]: [sample for sample in result["samples"] if sample["model"] == model["name"]]
                for model in result["models"]}
    first = next(iter(by_model))
    for group in result["groups"]:
        for score in result["scores"]:
            if score["kind"] != "sample":
                continue
            name = score["name"]
            of_first = {(sample["prompt"], sample["sample"]): sample["values"].get(name) for sample in by_model[first]}
            for model, every in by_model.items():
                samples = [sample for sample in every if in_group(sets[sample["prompt"]], group)]
                values, owners = [sample["values"].get(name) for sample in samples], [sample["prompt"] for sample in samples]
                others = [of_first.get((sample["prompt"], sample["sample"])) for sample in samples]
                won = None if model == first else asdict(win_rate(values, others, owners, score["better"]))
                rows.append({"model": model, "group": group, "score": name, **asdict(mean_of(values, owners)), "win_rate": won})
    return rows


def markdown(result: Mapping[str, Any]) -> str:
    """Means as in Tables 1 and 2 (models down, scores and sets across, the best bold), then intervals and win rates."""
    groups = result["groups"][1:] or result["groups"]
    columns = [(score, group) for score in result["scores"] for group in groups]
    cells = {(row["model"], row["group"], row["score"]): row for row in result["table"]}
    several = len(groups) > 1
    names = [f"{score['label']} {ARROWS[score['better']]}{f' {group}' if several else ''}" for score, group in columns]
    lines = ["| Model | " + " | ".join(names) + " |", "|---" * (len(columns) + 1) + "|"]
    for model in result["models"]:
        shown = [mean_cell(cells, result["models"], model["name"], group, score) for score, group in columns]
        lines.append(f"| {escaped(model['name'])} | " + " | ".join(shown) + " |")
    first = result["models"][0]["name"]
    heading = ("Model", "Prompts", "Score", "Mean", "95 % interval", f"Better than {escaped(first)}", "95 % interval")
    lines += ["", "| " + " | ".join(heading) + " |", "|---" * len(heading) + "|"]
    labels = {score["name"]: score["label"] for score in result["scores"]}
    for row in result["table"]:
        won = row["win_rate"] or {"mean": None, "low": None, "high": None}
        lines.append(f"| {escaped(row['model'])} | {escaped(row['group'])} | {labels[row['score']]} | {number(row['mean'])}"
                     f" | {between(row)} | {share(won['mean'])} | {between(won, share)} |")
    missing = [f"- {score['label']}: {score['missing']}" for score in result["scores"] if score["missing"]]
    return "\n".join([*lines, *(["", "Missing:", *missing] if missing else [])]) + "\n"


def mean_cell(cells: Mapping[tuple[str, str, str], Mapping[str, Any]], models: Sequence[Mapping[str, str]], model: str, group: str,
              score: Mapping[str, Any]) -> str:
    """One mean, bold where no model's is better."""
    if score["missing"]:
        return "missing"
    means = {each["name"]: cells.get((each["name"], group, score["name"]), {"mean": None})["mean"] for each in models}
    known = [mean for mean in means.values() if is_finite(mean)]
    best = (max if score["better"] == "higher" else min)(known, default=None)
    text = number(means[model])
    return f"**{text}**" if len(known) > 1 and means[model] == best else text


def write_csv(result: Mapping[str, Any], path: Path) -> None:
    """A row a sample: model, set, prompt, file, one column a score; empty where there is no value."""
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
    """As many digits as the paper has."""
    if not is_finite(value):
        return "no value"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def between(row: Mapping[str, Any], shown: Callable[[float], str] = number) -> str:
    return "" if row["low"] is None else f"{shown(row['low'])} to {shown(row['high'])}"


def escaped(text: str) -> str:
    return text.replace("|", "\\|")
