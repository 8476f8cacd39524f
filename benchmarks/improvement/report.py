"""What improvement.json says, for its own text and the README: the table, and where the digits disagree with the paper."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.improvement.runs import APPLIED, BASE, IMPROVEMENT, METHODS
from benchmarks.intervals import Interval, interval, minus, verdict

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Measure:
    """How a score is called and written; `sign` is -1 where less is better."""

    label: str
    sign: int = 1
    unit: int = 1
    digits: int = 2


MEASURES = {"level": Measure("level", -1), "prompt_accuracy": Measure("prompt accuracy", 1, 100, 1),
            "distance": Measure("distance", -1), "vendi": Measure("Vendi")}
QUALITY = ("level", "prompt_accuracy", "distance")
TIMES = ("once", "twice", "three times")


def runs_of(result: Result, method: str) -> list[Mapping[str, Any]]:
    """A method's runs, by seed."""
    return sorted((run for run in result["runs"] if run["method"] == method), key=lambda run: run["seed"])


def scores(result: Result, method: str, measure: str, point: int = -1) -> list[float]:
    """A measure of each seed after an iteration, by default the last."""
    return [run["points"][point][measure] for run in runs_of(result, method)]


def of_data(result: Result, name: str, measure: str) -> list[float]:
    """A measure of the data's losers or winners, of each seed."""
    return [run["data"][name][measure] for run in runs_of(result, BASE)]


@dataclass(frozen=True)
class Claim:
    """What the paper found, as a value a seed that is positive where the digits agree; `alike`: where it is zero."""

    said: str
    needs: tuple[str, ...]
    value: Callable[[Result, str], list[float]]
    measures: tuple[str, ...] = QUALITY
    alike: bool = False


def above(better: str, worse: str, point: int = -1, other: int = -1) -> Callable[[Result, str], list[float]]:
    """By how much the first is better, paired by seed."""
    return lambda result, measure: [MEASURES[measure].sign * value for value in minus(
        scores(result, better, measure, point), scores(result, worse, measure, other))]


def beyond_winners(method: str) -> Callable[[Result, str], list[float]]:
    """By how much a method's samples are better than the data's winners are on average."""
    return lambda result, measure: [MEASURES[measure].sign * value for value in minus(
        scores(result, method, measure), of_data(result, "winners", measure))]


ITERATIVE, FROM_SPIN, FEW = "iterative", "iterative_spin", "iterative_few"
CLAIMS = (
    Claim("iterative DPO from SPIN is better than SPIN (Table 1)", (FROM_SPIN, "spin"), above(FROM_SPIN, "spin")),
    Claim("iterative DPO from SPIN is more diverse than SPIN (Table 1)", (FROM_SPIN, "spin"), above(FROM_SPIN, "spin"),
          ("vendi",)),
    Claim("iterative DPO from SPIN is better than offline DPO (Table 1)", (FROM_SPIN, "dpo"), above(FROM_SPIN, "dpo")),
    Claim("iterative DPO from SPIN is better than the base (Table 4)", (FROM_SPIN,), above(FROM_SPIN, BASE)),
    Claim("SPIN is better than the base (Table 1)", ("spin",), above("spin", BASE)),
    Claim("more samples an iteration are better (Table 2)", (ITERATIVE, FEW), above(ITERATIVE, FEW)),
    Claim("the improvement model, applied once, improves the base's samples (Table 3)", (), above(IMPROVEMENT, BASE, 0)),
    Claim("the improvement model, applied once, is better than SPIN on the training's prompts (Table 3)", ("spin",),
          above(IMPROVEMENT, "spin", 0)),
    Claim("SFT ends at the winners' mean (Section 6)", ("sft",), beyond_winners("sft"), ("level",), alike=True),
    Claim("SPIN ends at the winners' mean (Section 6)", ("spin",), beyond_winners("spin"), ("level",), alike=True),
    Claim("iterative DPO from the base goes past the winners' mean (Section 6)", (ITERATIVE,), beyond_winners(ITERATIVE),
          ("level", "distance")),
    Claim("iterative DPO from SPIN goes past the winners' mean (Section 6)", (FROM_SPIN,), beyond_winners(FROM_SPIN),
          ("level", "distance")),
    Claim("iterative DPO from the base: the second iteration gains (Section 3.3)", (ITERATIVE,),
          above(ITERATIVE, ITERATIVE, 1, 0)),
    Claim("iterative DPO from the base: the third iteration gains (Section 3.3)", (ITERATIVE,),
          above(ITERATIVE, ITERATIVE, 2, 1)),
    Claim("iterative DPO from the base is more diverse than SFT (Section 1)", (ITERATIVE, "sft"), above(ITERATIVE, "sft"),
          ("vendi",)),
)


def judged(result: Result) -> list[tuple[str, str]]:
    """(verdict, sentence) of each claim and measure for which there are runs."""
    there = {run["method"] for run in result["runs"]}
    said = []
    for claim in CLAIMS:
        for measure in claim.measures if there.issuperset(claim.needs) else ():
            found = interval(claim.value(result, measure))
            said.append((verdict(found, claim.alike), f"{claim.said}: {MEASURES[measure].label} {difference(found, measure)}"))
    return said


def difference(found: Interval, measure: str) -> str:
    """A difference in the measure's unit, with its interval."""
    unit, digits = MEASURES[measure].unit, MEASURES[measure].digits
    text = f"{unit * found.mean:+.{digits}f}"
    return text if found.half is None else f"{text} [{unit * found.low:+.{digits}f}, {unit * found.high:+.{digits}f}]"


def agreement(result: Result) -> str:
    """Where the digits disagree with the paper, where they do not tell, and where they agree."""
    said, lines = judged(result), []
    for name, heading in (("disagrees", "Where the digits disagree with the paper:"),
                          ("open", "Where these seeds do not tell (the interval holds zero, or there is one seed):"),
                          ("agrees", "Where they agree:")):
        found = [f"- {sentence}" for each, sentence in said if each == name]
        lines += [heading, "", *(found or ["- nowhere"]), ""]
    return "\n".join([
        "The paper's findings, each with the difference that is positive where it holds here (of level and distance, by how much"
        " less they are; zero where two are said to be alike; prompt accuracy in points), and its 95 % t-interval over the seeds,"
        " paired by seed.", "", *lines]).rstrip()


def rows_of(result: Result) -> list[tuple[str, Callable[[str], list[float]]]]:
    """The table's rows: a label, and a measure's values by seed."""
    rows: list[tuple[str, Callable[[str], list[float]]]] = [
        ("the data's losers", lambda measure: of_data(result, "losers", measure)),
        ("the data's winners", lambda measure: of_data(result, "winners", measure)),
        ("base", lambda measure: scores(result, BASE, measure))]
    for index in range(APPLIED if runs_of(result, IMPROVEMENT) else 0):
        rows.append((f"base's samples, improved {TIMES[index]}",
                     lambda measure, index=index: scores(result, IMPROVEMENT, measure, index)))
    for method, row in METHODS.items():
        runs = runs_of(result, method)
        points = range(len(runs[0]["points"])) if runs else ()
        for index in points if row.method in ("spin", "iterative_dpo") else points[-1:]:
            after = f", iteration {index + 1}" if row.method in ("spin", "iterative_dpo") else ""
            rows.append((row.label + after,
                         lambda measure, method=method, index=index: scores(result, method, measure, index)))
    return rows


def table(result: Result) -> str:
    """A row for each method and iteration."""
    lines = ["| | " + " | ".join(measure.label for measure in MEASURES.values()) + " |", "|---" * (1 + len(MEASURES)) + "|"]
    for label, values in rows_of(result):
        cells = (written(interval(values(name)), measure) for name, measure in MEASURES.items())
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def written(found: Interval, measure: Measure) -> str:
    """A mean and half its interval."""
    percent = "%" if measure.unit == 100 else ""
    text = f"{measure.unit * found.mean:.{measure.digits}f}{percent}"
    return text if found.half is None else f"{text} ± {measure.unit * found.half:.{measure.digits}f}"


def about(result: Result) -> str:
    """How it was measured."""
    settings, machine = result["settings"], result["machine"]
    seeds = f"{settings['seeds']} seeds" if settings["seeds"] > 1 else "one seed (so no intervals)"
    return (
        f"Means over {seeds}, each with a base model, pairs, an improvement model and trainings of its own; ± and [ ] are 95 %"
        " t-intervals over the seeds, those in [ ] of the differences paired by seed. Pairs show one digit degraded twice: the"
        " loser by a level from [0.3, 1], the winner by 0.15 to 0.4 less, and not below 0; the base has learnt losers, a fifth of"
        f" them under a wrong caption. The improvement model: {settings['improvement_updates']} updates of"
        f" {settings['batch_size']}; it is drawn from with s_T {settings['text_scale']:g} and s_I {settings['image_scale']:g}. All"
        f" others: {settings['iterations']} x {settings['updates']} updates of {settings['batch_size']}, beta"
        f" {settings['beta']:g}, learning rate {settings['lr']:g}, of SFT {settings['sft_lr']:g}; {settings['samples']} samples an"
        f" iteration, {settings['few_samples']} where few, in {settings['sampler_steps']} steps at guidance"
        f" {settings['guidance_scale']:g}. Scores: of {settings['judge_samples']} samples in {settings['judge_steps']} steps, from"
        " the same noise for all policies of a seed. Level: degradation that a regressor reads (0 a clean digit, 1 hardly"
        " visible); prompt accuracy: share that a classifier reads as the prompt's digit; distance: to the nearest held-out digit;"
        " Vendi: within a prompt, of restored samples, so that grain counts little."
        f" {result['seconds']['processor'] / 60:.0f} minutes of processor time on {machine['cpu']}, {settings['side_by_side']} runs"
        f" side by side; torch {result['versions']['torch']}, commit `{'`, `'.join(result['commits_of_runs'])}`."
    )


def report(result: Result) -> str:
    """The whole text, as Markdown."""
    return "\n\n".join([table(result), about(result), agreement(result)]) + "\n"


def headline(result: Result) -> str:
    """One line for the front page."""
    def over(other: str) -> str:
        gains = {measure: interval(above(ITERATIVE, other)(result, measure)) for measure in ("level", "distance", "vendi")}
        return ", ".join(f"{MEASURES[measure].label} {difference(gain, measure)}" for measure, gain in gains.items())

    return (f"Iterative DPO with an improvement model on digits, {result['settings']['seeds']} seeds, with 95 % intervals, positive"
            f" is better: over its base: {over(BASE)}; over SFT: {over('sft')}.")
