"""The text on flipper.json: what the sign tells about the loser, and whether acting on more noises ends better."""

from collections.abc import Sequence
from typing import Any

from benchmarks.ablation.report import points, share
from benchmarks.flipper.comparisons import COMPARISONS, ENDS, MEASURES, Comparison, Result, runs_of, told
from benchmarks.flipper.runs import BASE, METHODS, TIMES, WATCHED
from benchmarks.intervals import Interval, interval, minus

COLUMNS = {"base": "better", "said": "s = +1", "precision": "precision", "recall": "recall", "balanced": "balanced accuracy",
           "auc": "AUC", "signed": "balanced accuracy within an update", "within": "AUC within an update"}
LITTLE = 5  # points above chance
FEW = ("base", "precision", "signed", "within")  # of the tables by level and iteration


def verdict(found: Interval) -> str:
    """`above`, `below` or `open`, by whether the interval is on one side of 0."""
    if found.half is None or found.low <= 0 <= found.high:
        return "open"
    return "above" if found.low > 0 else "below"


def judged(result: Result) -> list[tuple[Comparison, Interval]]:
    """Each comparison that has runs, with its interval."""
    there = {run["method"] for run in result["runs"]}
    values = [(comparison, comparison.values(result)) for comparison in COMPARISONS if there.issuperset(comparison.needs)]
    return [(comparison, interval(found)) for comparison, found in values if found]


def cell(result: Result, measure: str, key: str, *place: str | int) -> str:
    """A figure's mean over the seeds that have it, with its interval."""
    values = [value for value in told(result, measure, key, *place) if value is not None]
    return share(interval(values)) if values else ""


def rows(result: Result, places: Sequence[tuple[str, tuple[str | int, ...]]], keys: Sequence[str]) -> str:
    """A table with a row for each place and columns of both measures."""
    heads = [f"{COLUMNS[key]}, {'digit' if measure == 'prompt' else 'distance'}" for measure in MEASURES for key in keys]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for label, place in places:
        cells = [cell(result, measure, key, *place) for measure in MEASURES for key in keys]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def of_all_pairs(result: Result) -> str:
    """A row for each measure."""
    lines = ["| a better sample by | " + " | ".join(COLUMNS.values()) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    lines += [f"| {label} | " + " | ".join(cell(result, measure, key, "all") for key in COLUMNS) + " |"
              for measure, label in MEASURES.items()]
    return "\n".join(lines)


def levels(result: Result) -> list[tuple[str, tuple[str | int, ...]]]:
    """Labels and places of the noise levels."""
    count = len(runs_of(result, WATCHED)[0]["told"]["measures"]["prompt"]["levels"])
    return [(f"timesteps {1000 * i // count} to {1000 * (i + 1) // count - 1}", ("levels", i)) for i in range(count)]


def by_draws(result: Result) -> str:
    """What the mean over several noises tells; the first row is the sign in training."""
    agreeing = [run["told"]["agreeing"] for run in runs_of(result, WATCHED)]
    lines = ["| noises of the winner | sign as over all of them | " + " | ".join(
        f"AUC within an update, {'digit' if measure == 'prompt' else 'distance'}, {where}"
        for measure in MEASURES for where in ("the pair's timestep", "as many timesteps")) + " |", "|---" * 6 + "|"]
    for n in agreeing[0]:
        cells = [cell(result, measure, "within", where, n) if where == "same" or int(n) <= TIMES else ""
                 for measure in MEASURES for where in ("same", "other")]
        lines.append(f"| {n} | {share(interval([each[n] for each in agreeing]))} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def of_training(result: Result) -> str:
    """The last policies of the runs that act on one noise or more."""
    lines = ["| | prompt accuracy | to one noise | cleanliness | to one noise | AAF rate |", "|---" * 6 + "|"]
    for method in (BASE, *METHODS):
        runs = runs_of(result, method)
        if not runs:
            continue
        cells = []
        for measure in ENDS:
            values = [run["points"][-1][measure] for run in runs]
            ones = [run["points"][-1][measure] for run in runs_of(result, WATCHED)]
            compared = method != WATCHED and len(ones) == len(values)
            cells += [share(interval(values)), points(interval(minus(values, ones))) if compared else ""]
        rates = [sum(run["aaf_rate"]) / len(run["aaf_rate"]) for run in runs if "aaf_rate" in run]
        label = "base" if method == BASE else f"signs of {METHODS[method]} noise{'s' * (METHODS[method] > 1)}"
        lines.append(f"| {label} | " + " | ".join(cells) + f" | {share(interval(rates)) if rates else ''} |")
    return "\n".join(lines)


def compared(result: Result) -> str:
    """The comparisons in three lists."""
    found, lines = judged(result), []
    for name, heading in (("above", "Where the sentence holds:"), ("below", "Where the opposite holds:"),
                          ("open", "Where these seeds do not tell it from chance, or from no difference:")):
        sentences = [f"- {comparison.sentence}: {points(each)}" for comparison, each in found if verdict(each) == name]
        lines += [heading, "", *(sentences or ["- nowhere"]), ""]
    return "\n".join([
        f"The comparisons, which were written down before the run (`benchmarks/flipper/comparisons.py`), in percentage points with"
        f" their 95 % t-intervals over the seeds. Of {len(found)} such intervals one in twenty is expected to miss the truth.", "",
        *lines]).rstrip()


def said(result: Result) -> str:
    """The verdict in plain words."""
    main = {comparison.decides: each for comparison, each in judged(result) if comparison.decides}
    if not main or any(each.half is None for each in main.values()):
        return "One seed tells nothing about chance."
    names, worse = ([label for label, each in main.items() if verdict(each) == name] for name in ("above", "below"))
    most = max(each.high for each in main.values())
    figures = ", ".join(f"balanced accuracy {share(Interval(0.5 + each.mean, each.half))} by the {label}"
                        for label, each in main.items())
    if names:
        gain = 100 * max(main[label].mean for label in names)
        return (f"**The sign is better than chance by {gain:.1f} points** by the {' and the '.join(names)} ({figures}; a coin has"
                f" 50 %): within an update the winner's error says {'little' if gain < LITTLE else 'something'} about which sample"
                " is better.")
    if worse:
        return (f"**The sign is worse than chance** by the {' and the '.join(worse)} ({figures}; a coin has 50 %): within an"
                " update the reference's sample is more often the better one where the sign keeps it as the loser.")
    return ("**The sign is no better than chance**, as far as these seeds tell: within an update the winner's error does not say"
            f" whether the reference's sample is better than the policy's own ({figures}; a coin has 50 %). At most it says"
            f" {100 * most:.1f} points.")


def about(result: Result) -> str:
    """How it was measured."""
    settings, machine = result["settings"], result["machine"]
    seeds = f"{settings['seeds']} seeds" if settings["seeds"] > 1 else "one seed (so no intervals)"
    pairs, averaged = ([run["told"][key] for run in runs_of(result, WATCHED)] for key in ("pairs", "averaged"))
    return (
        f"Means over {seeds}; ± and [ ] are 95 % t-intervals over the seeds. Data, base models and settings are the ablation's"
        f" (SePPO-w: {settings['iterations']} iterations of {settings['updates']} updates of {settings['batch_size']} pairs,"
        f" learning rate {settings['lr']:g}, beta {settings['beta']:g}, reference uniform). In the run with signs of one noise,"
        f" {settings['watched']} updates of each iteration are watched, {pairs[0]} pairs a seed,"
        f" {averaged[0]} of them under all the noises. For each pair the policy draws its"
        " own sample from the noise and prompt from which the reference drew the loser. *Better*: the share of pairs whose"
        " reference's sample is better than the policy's own. By *digit*: the log-probability that the quickstart's judge gives the"
        " prompt's digit (calibrated on digits that it has not learnt from); by *distance*: to the nearest real held-out digit."
        " *Precision* and *recall*: of s = +1 (m_w > q_w: the loser is learnt towards) as a finding that the reference's sample is"
        " better; with a sign that says nothing, precision is the share of better ones, balanced accuracy and AUC are 50 %."
        " *Within an update*: only pairs with the same policy and reference are compared. AUC is that of m_w - q_w."
        f" {result['seconds']['processor'] / 60:.0f} minutes of processor time on {machine['cpu']}, {settings['side_by_side']} runs"
        f" side by side; torch {result['versions']['torch']}, commit `{'`, `'.join(result['commits_of_runs'])}`."
    )


def report(result: Result) -> str:
    """The whole text, as Markdown."""
    if not runs_of(result, WATCHED):
        return of_training(result) + "\n"
    iterations = [(f"iteration {k + 1}", ("iterations", k)) for k in range(result["settings"]["iterations"])]
    parts: list[Any] = [
        said(result), of_all_pairs(result), about(result), "By noise level:", rows(result, levels(result), FEW),
        "Over training:", rows(result, iterations, FEW),
        "What the mean of m_w - q_w over several noises tells, at the pair's timestep (what `aaf_draws` does) and over as many"
        " timesteps:", by_draws(result),
        "Whether acting on the mean (`aaf_draws`) ends better, at equal updates:", of_training(result), compared(result)]
    return "\n\n".join(parts) + "\n"


def headline(result: Result) -> str:
    """One line for the front page."""
    by = ", ".join(f"{share(Interval(0.5 + each.mean, each.half))} by the {comparison.decides}"
                   for comparison, each in judged(result) if comparison.decides)
    return f"The flipper's sign finds the better sample (digits, {result['settings']['seeds']} seeds; a coin has 50 %): {by}."
