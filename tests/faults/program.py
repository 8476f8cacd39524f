"""Cases, one after the other until the time is up: a configuration and up to three faults, then the comparison."""

import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from forked import Forks

from faults.kinds import ALONE, KINDS, MISSED, REFUSED, choose
from faults.runs import CONFIGURATIONS, Bench, Run, Wrong


@dataclass
class Row:
    """What became of one kind of fault. `refused`: by a message, and the same bytes once the damage was put right."""

    equal: int = 0
    refused: int = 0
    wrong: int = 0
    longest: float = 0.0


@dataclass
class Tally:
    """The table, and the cases that went wrong in words."""

    rows: dict[str, Row] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def add(self, kind: str, longest: float, **counts: int) -> None:
        """Count one fault."""
        row = self.rows.setdefault(kind, Row())
        row.longest = max(row.longest, longest)
        for name, count in counts.items():
            setattr(row, name, getattr(row, name) + count)

    def table(self) -> str:
        """Markdown."""
        lines = ["| fault | times | same bytes | refused, then same bytes | wrong | longest wait, s |", "|---|---|---|---|---|---|"]
        rows = [self.rows[kind] for kind in KINDS if kind in self.rows]
        total = Row(sum(row.equal for row in rows), sum(row.refused for row in rows), sum(row.wrong for row in rows),
                    max((row.longest for row in rows), default=0.0))
        return "\n".join([*lines, *(line(kind, self.rows[kind]) for kind in KINDS if kind in self.rows), line("all", total)])


def line(name: str, row: Row) -> str:
    """A row of the table."""
    times = row.equal + row.refused + row.wrong
    return f"| {name} | {times} | {row.equal} | {row.refused} | {row.wrong} | {row.longest:.1f} |"


def play(run: Run, kinds: list[str], tally: Tally) -> str | None:
    """Do these faults to a run, one after the other, and let it come to its end; returns what went wrong.

    An end with other bytes is counted as the last fault's.
    """
    met: list[tuple[str, str, float]] = []
    wrong = None
    try:
        for kind in kinds:
            run.longest, outcome = 0.0, MISSED
            met.append((kind, outcome, 0.0))
            outcome = KINDS[kind][0](run)
            met[-1] = kind, outcome, run.longest
        run.finish()
    except Wrong as error:
        kind, *_ = met.pop()
        tally.add(kind, run.longest, wrong=1)
        wrong = f"after {', '.join([*(name for name, *_ in met), kind])}: {error}"
    for kind, outcome, longest in met:
        if outcome != MISSED:
            tally.add(kind, longest, refused=outcome == REFUSED, equal=outcome != REFUSED)
    return wrong


def case(bench: Bench, seed: int, number: int, tally: Tally, among: Sequence[str]) -> None:
    """The case of this number, chosen by the seed; its folder stays where something went wrong."""
    dice = random.Random(f"{seed}/{number}")
    name = dice.choice([*CONFIGURATIONS])
    ranks = 2 if {*among} == {ALONE} else dice.choice(CONFIGURATIONS[name][0])
    folder = Path(bench.folder) / f"case {number}"
    run = bench.run(name, ranks, folder, dice)
    kinds = [choose(dice, ranks, among) for _ in range(dice.randint(1, 3))]
    title = f"case {number}: {name}, {ranks} rank{'s' * (ranks > 1)}: {', '.join(kinds)}"
    wrong = play(run, kinds, tally)
    print(f"{title}: {'WRONG' if wrong else 'right'}", flush=True)
    if wrong:
        tally.wrong.append(f"{title} (--seed {seed} --case {number})\n{wrong}\n")
        print(tally.wrong[-1], flush=True)
        folder.rename(Path(tempfile.mkdtemp(prefix="wrong-case-")) / "case")
    else:
        shutil.rmtree(folder)


def play_for(seconds: float, seed: int, among: Sequence[str] = (*KINDS,), first: int = 1, cases: int | None = None) -> Tally:
    """The tally of all cases that begin within the time (or of so many), of these faults."""
    tally, forks = Tally(), Forks()
    try:
        with tempfile.TemporaryDirectory(prefix="faults-") as folder:
            bench, end, number = Bench(Path(folder), forks), time.monotonic() + seconds, first
            while time.monotonic() < end and (cases is None or number < first + cases):
                case(bench, seed, number, tally, among)
                number += 1
    finally:
        forks.close()
        forks.wait()
    return tally
