"""The text on time_to_quality_TASK.json: what each way costs, where it ends, and what it spends until it is as good as `paper`."""

from collections.abc import Sequence
from math import inf
from statistics import mean, median

from benchmarks.ablation.report import points, share
from benchmarks.intervals import Interval, interval, minus
from benchmarks.time_to_quality.comparisons import COMPARED, COSTS, MARGIN, MEASURES, NOTHING, OPEN, verdict
from benchmarks.time_to_quality.curves import (
    Result,
    at_equal_flops,
    ends,
    made,
    run_of,
    seconds_of_an_update,
    seeds_of,
    shares_until,
    timed,
    totals,
    units,
)
from benchmarks.time_to_quality.ways import BASE, DISTILLED, DRAWN, PAPER, SFT, TASKS

ONE_STEP = "one_step"
NAMES = {"flops": "FLOPs", "seconds": "seconds"}
DISTANCE = "distance to the policy's own samples"
COUNTED = ", its own training counted"


def compared(result: Result) -> list[str]:
    """The ways that were made, without `paper`."""
    return [way for way in COMPARED[result["settings"]["task"]] if made(result, way)]


def label(result: Result, way: str) -> str:
    return TASKS[result["settings"]["task"]].ways[way].label


def rows_of(result: Result) -> list[tuple[str, str, bool]]:
    """(label, way, whether the adapter's training counts) of each row of the tables."""
    ways, rows = TASKS[result["settings"]["task"]].ways, []
    for way in (PAPER, *compared(result)):
        rows.append((label(result, way), way, False))
        if ways[way].adapter and made(result, DISTILLED):
            rows.append((label(result, way) + COUNTED, way, True))
    return rows


def to_paper(result: Result, way: str, measure: str) -> Interval:
    """Where a way ends, less where `paper` does."""
    return interval(minus(ends(result, way, measure), ends(result, PAPER, measure)))


def judgement(result: Result, way: str) -> str:
    return verdict([to_paper(result, way, measure) for measure in MEASURES])


def end_table(result: Result) -> str:
    """A row for each way: what it spends on the whole run, and where that ends."""
    spent, drawn = units(result), made(result, DRAWN)
    header = row("losers", *(f"{NAMES[unit]} of paper's" for unit in spent), "prompt accuracy", "to paper's", "cleanliness",
                 "to paper's", "Vendi", "to paper's", "quality", *[DISTANCE] * drawn)
    lines = [header, "|---" * (header.count("|") - 1) + "|"]
    base = [run_of(result, BASE, seed)["points"][0] for seed in seeds_of(result)]
    shares = [cell for measure in MEASURES for cell in (share(interval([point[measure] for point in base])), "")]
    lines.append(row("base", *[""] * len(spent), *shares, f"{mean(point['vendi'] for point in base):.2f}", *[""] * (2 + drawn)))
    for name, way, counted in rows_of(result):
        cells = [f"{mean(totals(result, way, unit, counted)) / mean(totals(result, PAPER, unit)):.1%}" for unit in spent]
        cells += [""] * 7 if counted else ending(result, way)
        if drawn:
            cells.append("" if counted else distance(result, way))
        lines.append(row(name, *cells))
    return "\n".join(lines)


def ending(result: Result, way: str) -> list[str]:
    """The cells on where a way ends."""
    cells, itself = [], way == PAPER
    for measure in MEASURES:
        cells += [share(interval(ends(result, way, measure))), "" if itself else points(to_paper(result, way, measure))]
    cells += [f"{mean(ends(result, way, 'vendi')):.2f}", "" if itself else number(to_paper(result, way, "vendi"))]
    return [*cells, "" if itself else judgement(result, way)]


def distance(result: Result, way: str) -> str:
    """From the base's samples drawn in this way to those drawn in the paper's from other noise."""
    if way == SFT:
        return ""
    found = interval([run_of(result, DRAWN, seed)["points"][0][way] for seed in seeds_of(result)])
    return f"{found.mean:.3f}" + ("" if found.half is None else f" ± {found.half:.3f}")


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def number(found: Interval) -> str:
    text = f"{found.mean:+.2f}"
    return text if found.half is None else f"{text} [{found.low:+.2f}, {found.high:+.2f}]"


def time_table(result: Result) -> str:
    """A row for each way: what it spends until it is as good as `paper` ends, and the difference at equal FLOPs."""
    spent = units(result)
    reached = [cell for name in MEASURES.values() for cell in (f"{name}: FLOPs", *["seconds"] * (len(spent) - 1), "seeds")]
    header = row("losers", *reached, *(f"{name} at equal FLOPs" for name in MEASURES.values()))
    lines = [header, "|---" * (header.count("|") - 1) + "|"]
    for name, way, counted in rows_of(result):
        cells = []
        for measure in MEASURES:
            found = {unit: shares_until(result, way, measure, unit, counted) for unit in spent}
            cells += [*map(of_whole, found.values()), f"{sum(value < inf for value in found['flops'])}/{len(seeds_of(result))}"]
        cells += ["" if way == PAPER else points(interval(at_equal_flops(result, way, measure, counted))) for measure in MEASURES]
        lines.append(row(name, *cells))
    return "\n".join(lines)


def of_whole(values: Sequence[float]) -> str:
    """The median over the seeds; a seed that never got there counts as more than any other."""
    middle = median(values)
    return f"{middle:.1%}" if middle < inf else "not reached"


def judged(result: Result) -> str:
    """The ways by what their intervals say."""
    ways = {way: judgement(result, way) for way in compared(result)}
    lines = []
    for kind, heading in ((COSTS, "Costs quality (an interval lies below zero)"),
                          (NOTHING, f"Costs nothing measurable (no interval lies below zero or reaches -{100 * MARGIN:g} points)"),
                          (OPEN, "These seeds do not tell")):
        lines.append(f"- {heading}: " + ("; ".join(label(result, way) for way in ways if ways[way] == kind) or "none") + ".")
    return "\n".join(lines)


def floor(result: Result) -> str:
    """What the poorest losers say about the task."""
    if not made(result, ONE_STEP):
        return ""
    kind = judgement(result, ONE_STEP)
    said = {COSTS: "So losers matter here, and this task can tell good ones from bad ones.",
            NOTHING: "So the quality of losers does not reach the result here, and cheap rollouts cost nothing *where losers do not"
                     " matter*, which is less than that they cost nothing.",
            OPEN: "So these seeds do not tell whether losers matter here."}[kind]
    ended = ", ".join(f"{name} {points(to_paper(result, ONE_STEP, measure))}" for measure, name in MEASURES.items())
    return f"The poorest losers, of {label(result, ONE_STEP)}, end at {ended} points to the paper's. {said}"


def obvious(result: Result) -> str:
    """The obvious trainer's seconds for the same losers, beside ours."""
    clock, settings = timed(result), result["settings"]
    if clock is None or not clock["obvious"]:
        return ""
    updates, ours = settings["iterations"] * settings["updates"], mean(totals(result, PAPER, "seconds"))
    theirs = {name: updates * clock["obvious"][key]
              for key, name in (("a_prompt_a_call", "a prompt a call"), ("a_batch_a_call", "a batch a call"))}
    each = ", ".join(f"{seconds:.0f} s with {name} ({seconds / ours:.2g}x)" for name, seconds in theirs.items())
    return (f"The obvious trainer would take {each} for the same updates with the paper's losers, by the median of"
            f" {clock['turns']} updates that were timed in turn with ours; ours takes {ours:.0f} s. It makes the same step, so its"
            " curve is the paper's by construction, and only its time was measured.")


def about_seconds(result: Result) -> str:
    """Where the seconds are from."""
    clock = timed(result)
    if clock is None:
        return " Seconds: not timed."
    return (" Seconds: updates times the seconds of one update's sampling and training of the way, medians of what was timed in one"
            f" process on seed {clock['seed']}'s base, one way after the other, in {clock['turns']} turns, because the runs had"
            f" others beside them (it had a processor for {min(1.0, clock['busy']):.0%} of the time);"
            f" {seconds_of_an_update(clock, PAPER):.3g} s an update and"
            f" {mean(totals(result, PAPER, 'seconds')):.0f} s in all of the paper's. Data, checkpoints and judging are not in them."
            f" Where an adapter's training is counted, they include {clock['points'][0]['distillation_s']:.0f} s of its"
            " distillation.")


def about_distance(result: Result) -> str:
    """What the distance is."""
    if not made(result, DRAWN):
        return ""
    return (f" {DISTANCE.capitalize()}: the energy distance, within a prompt and in the judge's 8x8 grey, of"
            f" {run_of(result, DRAWN, seeds_of(result)[0])['samples']} samples that the"
            " base draws in this way to as many that it draws in the paper's from other noise, estimated without bias; the first"
            " row's is what chance leaves of none. It says how true losers are to the policy, which the judge does not: it likes"
            " averaged pictures.")


def about(result: Result) -> str:
    """How it was measured."""
    settings, machine = result["settings"], result["machine"]
    count = len(seeds_of(result))
    seeds = f"{count} seeds" if count > 1 else "one seed (so no intervals)"
    paper = mean(totals(result, PAPER, "flops"))
    pairs = settings["iterations"] * settings["updates"] * settings["batch_size"]
    return (
        f"Means over {seeds}; each seed has its own base model, data and trainings. ± and [ ] are 95 % t-intervals over the seeds;"
        " those in [ ] are of differences paired by seed, in percentage points, of Vendi in its own unit. There are"
        f" {settings['iterations']} iterations of {settings['updates']} updates of {settings['batch_size']} pairs, with learning"
        f" rate {settings['lr']:g} and beta {settings['beta']:g}; each row is the first one with one change. FLOPs: as the"
        f" trainer's plan counts them, samples, training and scoring; the paper's are {paper / 1e12:.3g} TFLOP for {pairs} pairs."
        f"{about_seconds(result)}{about_distance(result)}"
        " A run ends at the mean of its last two judged policies. What is spent until a quality is reached is the median over the"
        " seeds, a share of all that the paper's run spends; what is reached is where the same seed's run with the paper's losers"
        " ends; between two judged policies we interpolate. At equal FLOPs: where the way's run ends, or at half of the paper's"
        " FLOPs if it ends later. Prompt accuracy and cleanliness: the quickstart's judge on"
        f" {settings['judge_samples']} samples in {settings['judge_steps']} steps, from the same noise for all policies of a seed,"
        f" every {settings['judged_every']} iterations. Vendi: within a prompt, in 12 principal components of real digits."
        f" {result['seconds']['processor'] / 60:.0f} minutes of processor time on {machine['cpu']},"
        f" {settings['side_by_side']} runs side by side; torch {result['versions']['torch']}, commit"
        f" `{'`, `'.join(result['commits_of_runs'])}`."
    )


def report(result: Result) -> str:
    """The whole text, as Markdown."""
    parts = [end_table(result), time_table(result), judged(result), floor(result), obvious(result), about(result)]
    return "\n\n".join(part for part in parts if part) + "\n"
