"""The text on ablation.json: the table, and where the digits agree or disagree with the paper."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any

from benchmarks.ablation.runs import BASE, METHODS
from benchmarks.intervals import Interval, interval, minus, verdict

MEASURES = {"prompt_accuracy": "prompt accuracy", "cleanliness": "cleanliness"}
MAIN = "seppo_w"
Result = Mapping[str, Any]


def runs_of(result: Result, method: str) -> list[Mapping[str, Any]]:
    """A method's runs, by seed."""
    return sorted((run for run in result["runs"] if run["method"] == method), key=lambda run: run["seed"])


def ends(result: Result, method: str, measure: str) -> list[float]:
    """A measure of the last policy of each seed."""
    return [run["points"][-1][measure] for run in runs_of(result, method)]


def late_changes(result: Result, method: str, measure: str) -> list[float]:
    """The last policy's measure minus that of the policy in the middle of the training."""
    return [run["points"][-1][measure] - run["points"][(len(run["points"]) - 1) // 2][measure] for run in runs_of(result, method)]


def restlessness(result: Result, method: str, measure: str) -> list[float]:
    """How far a measure moves from one past policy to the next, on average."""
    every = [[point[measure] for point in run["points"]] for run in runs_of(result, method)]
    return [mean([abs(b - a) for a, b in zip(points, points[1:], strict=False)] or [0.0]) for points in every]


def rises(result: Result, method: str, measure: str) -> list[float]:
    """The rate of the last iteration minus that of the first."""
    return [run[measure][-1] - run[measure][0] for run in runs_of(result, method)]


@dataclass(frozen=True)
class Claim:
    """A finding of the paper. Its value for each seed is positive where the digits agree, zero if it says that two are `alike`."""

    sentence: str
    needs: tuple[str, ...]
    value: Callable[[Result, str], list[float]]
    alike: bool = False
    measures: tuple[str, ...] = tuple(MEASURES)


def above(better: str, worse: str) -> Callable[[Result, str], list[float]]:
    """The last policies' difference of two methods, as a claim's value."""
    return lambda result, measure: minus(ends(result, better, measure), ends(result, worse, measure))


CLAIMS = (
    Claim("SePPO-w is better than the base (Table 1)", (MAIN,), above(MAIN, BASE)),
    Claim("SFT is better than the base (Table 1)", ("sft",), above("sft", BASE)),
    Claim("SePPO-w is better than SFT (Table 1)", (MAIN, "sft"), above(MAIN, "sft")),
    Claim("SePPO-w is better than SePPO-r (Table 1)", (MAIN, "seppo_r"), above(MAIN, "seppo_r")),
    Claim("SePPO-r is better than SFT (Table 1, three scores of four)", ("seppo_r", "sft"), above("seppo_r", "sft")),
    Claim("SePPO-w is better than without AAF (Table 4)", (MAIN, "no_aaf"), above(MAIN, "no_aaf")),
    Claim("the indicator is as good as the sign (Table 4)", (MAIN, "indicator"), above(MAIN, "indicator"), alike=True),
    Claim("uniform is better than reference = initial (Table 4)", (MAIN, "initial"), above(MAIN, "initial")),
    Claim("uniform is better than reference = latest (Table 4)", (MAIN, "latest"), above(MAIN, "latest")),
    Claim("reference = initial falls in the second half of the training (Figure 2)", ("initial",),
          lambda result, measure: [-change for change in late_changes(result, "initial", measure)]),
    Claim("reference = latest is less steady than uniform (Figure 2)", (MAIN, "latest"),
          lambda result, measure: minus(restlessness(result, "latest", measure), restlessness(result, MAIN, measure))),
    Claim("SePPO's AAF rate rises from the first to the last iteration (Figure 3, left)", (MAIN,),
          lambda result, measure: rises(result, MAIN, measure), measures=("aaf_rate",)),
    Claim("SePPO still improves in the second half of the training (Figure 3, right)", (MAIN,),
          lambda result, measure: late_changes(result, MAIN, measure)),
    Claim("SFT no longer improves in the second half of the training (Figure 3, right)", ("sft",),
          lambda result, measure: late_changes(result, "sft", measure), alike=True),
)


def judged(result: Result) -> list[tuple[str, str]]:
    """(verdict, sentence) for each claim and measure that has runs."""
    methods = {run["method"] for run in result["runs"]}
    sentences = []
    for claim in CLAIMS:
        for measure in claim.measures if methods.issuperset(claim.needs) else ():
            found = interval(claim.value(result, measure))
            sentence = f"{claim.sentence}: {MEASURES.get(measure, 'AAF rate')} {points(found)}"
            sentences.append((verdict(found, claim.alike), sentence))
    return sentences


def points(found: Interval) -> str:
    """A difference of shares in percentage points, with its interval."""
    text = f"{100 * found.mean:+.1f}"
    return text if found.half is None else f"{text} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def agreement(result: Result) -> str:
    """The claims in three lists: the digits disagree with the paper, they do not tell, and they agree."""
    claims, lines = judged(result), []
    for name, heading in (("disagrees", "Where the digits disagree with the paper:"),
                          ("open", "Where these seeds do not tell (the interval contains zero, or there is only one seed):"),
                          ("agrees", "Where they agree:")):
        found = [f"- {sentence}" for each, sentence in claims if each == name]
        lines += [heading, "", *(found or ["- nowhere"]), ""]
    return "\n".join([
        "Each line below is a finding of the paper, with a difference measured here in percentage points and its 95 % t-interval"
        " over the seeds, paired by seed. A positive difference agrees with the finding. Where the finding is \"as good as\" or"
        " \"no longer improves\", zero agrees with it.", "", *lines]).rstrip()


def table(result: Result) -> str:
    """A table like Table 4, a row for each method: shares of the last policy's samples, and rates of the last iteration."""
    methods = [BASE, *(method for method in METHODS if runs_of(result, method))]
    compared = bool(runs_of(result, MAIN))
    lines = ["| | prompt accuracy | to SePPO-w | cleanliness | to SePPO-w | AAF rate | implicit accuracy |", "|---" * 7 + "|"]
    for method in methods:
        cells = []
        for measure in MEASURES:
            cells.append(share(interval(ends(result, method, measure))))
            cells.append(points(interval(above(method, MAIN)(result, measure))) if compared and method != MAIN else "")
        for rate in ("aaf_rate", "implicit_acc"):
            values = [run[rate][-1] for run in runs_of(result, method) if rate in run]
            cells.append(f"{mean(values):.2f}" if values else "")
        lines.append(f"| {METHODS[method].label if method != BASE else 'base'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def share(found: Interval) -> str:
    return f"{found.mean:.1%}" + ("" if found.half is None else f" ± {100 * found.half:.1f}")


def about(result: Result) -> str:
    """How it was measured."""
    settings, machine = result["settings"], result["machine"]
    seeds = f"{settings['seeds']} seeds" if settings["seeds"] > 1 else "one seed (so no intervals)"
    unpreferred = (", SePPO-r on one picture of each pair at random. A picture that is not preferred is a bad scan, a wrong"
                   " digit, or both, like some that the base learnt from")
    without = (" Without AAF, the sign is always -1 (flipper none) and the rest is SePPO-w's: the reference is uniform, a past"
               " policy picked anew for each iteration, and draws the losers. So this is neither SPIN, whose reference is the"
               " latest policy, nor Diffusion-DPO on losers of the data.") * bool(runs_of(result, "no_aaf"))
    return (
        f"Means over {seeds}; each seed has its own base model, data and trainings. ± and [ ] are 95 % t-intervals over the seeds;"
        " those in [ ] are of differences paired by seed. SFT and SePPO-w train on the preferred picture of each pair"
        f"{unpreferred * bool(runs_of(result, 'seppo_r'))}. All other rows are SePPO-w with one change.{without}"
        " There are"
        f" {settings['iterations']} iterations of {settings['updates']} updates of {settings['batch_size']} pairs, with learning"
        f" rate {settings['lr']:g} and beta {settings['beta']:g}; reference samples take {settings['sampler_steps']} steps at"
        f" guidance {settings['guidance_scale']:g}. Prompt accuracy and cleanliness: the quickstart's judge on"
        f" {settings['judge_samples']} samples of the last policy in {settings['judge_steps']} steps, from the same noise for all"
        " policies of a seed. AAF rate: share of pairs with sign -1 (App. B.2); implicit accuracy: share of logits > 0; both in the"
        f" last iteration. {result['seconds']['processor'] / 60:.0f} minutes of processor time on {machine['cpu']},"
        f" {settings['side_by_side']} runs side by side; torch {result['versions']['torch']}, commit"
        f" `{'`, `'.join(result['commits_of_runs'])}`."
    )


def report(result: Result) -> str:
    """The whole text, as Markdown."""
    return "\n\n".join([table(result), about(result), agreement(result)]) + "\n"
