"""The faults, by the name that the table has for them. Each is done to a run and says how the run took it, or raises `Wrong`."""

import json
import math
import random
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from forked import Result, Strike

from faults.damage import checkpoints, damage, files_in, one_line
from faults.runs import Run, Wrong, files_of, said

WENT_ON, REFUSED, MISSED = "went on", "refused", "missed"  # missed: the run was done before it came
ALONE = "one rank killed"  # needs two
Fault = Callable[[Run], str]

# Where a strike comes: functions, how often each is called in an update (0: once a run), and how many seconds it takes, about.
AREAS: dict[str, tuple[tuple[str, float, float], ...]] = {
    "the cache": (("seppo_fast.data.cache:write_part", 0, 0.4), ("seppo_fast.data.cache:encode_prompts", 0, 0.3)),
    "sampling": (("seppo_fast.reference.sampler:Sampler.draw", 2, 0.1),),
    "an update": (("seppo_fast.training.objective:Objective.__call__", 2, 0.1),),
    "the metrics": (("seppo_fast.training.reporter:Reporter.update", 1, 0.01),),
    "a past policy": (("seppo_fast.reference.pool:Pool.add", 0.5, 0.1),),
    "a checkpoint": (("seppo_fast.training.checkpoint:save", 1, 0.3),),
    "a grid": (("seppo_fast.training.samples:Grids.write", 0.5, 0.2),),
    "the export": (("seppo_fast.run:export", 0, 0.3),),
    "an fsync or a rename": (("os:fsync", 12, 0.0), ("os:replace", 1, 0.0), ("os:rename", 1, 0.0)),
    "any time": (("", 0, 0.0),),
}
OF_RANK_0 = ("a grid", "an fsync or a rename")
AFTER_THE_FIRST = Strike("seppo_fast.training.trainer:Trainer.report", 2)


def strike(run: Run, area: str, signum: int, rank: int = 0, alone: bool = False) -> Strike:
    """A signal somewhere in an area, in one of the updates that are left; one at the cache makes a new one necessary."""
    function, often, seconds = run.dice.choice(AREAS[area])
    later = run.dice.uniform(0.2, run.plain.seconds) if not function else run.dice.choice((0.0, run.dice.uniform(0.0, seconds)))
    number = run.dice.randint(1, max(1, int(often * run.updates_left)))
    if area == "the cache":
        run.start_new_cache()
    return Strike(function, number, signum, run.dice.random() < 0.3, 0 if area in OF_RANK_0 else rank, alone, later)


def killed(run: Run, area: str) -> str:
    """SIGKILL to all ranks at once."""
    result = run.resume(strike=strike(run, area, signal.SIGKILL))
    if result.struck is None:
        return finished(result)
    expect(set(result.statuses) <= {0, -signal.SIGKILL}, "a rank outlived SIGKILL", result)
    return WENT_ON


def stopped(run: Run) -> str:
    """SIGTERM or SIGINT to one rank: a clean stop."""
    signum = run.dice.choice((signal.SIGTERM, signal.SIGINT))
    result = run.resume(strike=strike(run, run.dice.choice([*AREAS]), signum, run.dice.randrange(run.ranks)))
    if result.struck is None:
        return finished(result)
    run.waited(result.struck, result)
    expect("Traceback" not in result.output and min(result.statuses) >= 0, "no clean stop", result)
    done = "done: the trained model" in result.output
    expect(done or "stopped by" in result.output, "nothing says what happened", result)
    expect(done or signum == signal.SIGTERM or 130 in result.statuses, "SIGINT without status 130", result)
    return WENT_ON


def one_rank_killed(run: Run) -> str:
    """SIGKILL to one rank alone: the others must notice."""
    blow = strike(run, run.dice.choice([*AREAS]), signal.SIGKILL, run.dice.randrange(run.ranks), alone=True)
    result = run.resume(strike=blow)
    if result.struck is None:
        return finished(result)
    run.waited(result.struck, result)
    expect(min(status for other, status in enumerate(result.statuses) if other != blow.rank) >= 0, "the others did not end", result)
    expect("Traceback" not in result.output, "no clear end", result)
    return WENT_ON


def full_disk(run: Run) -> str:
    """No file may become larger than some size."""
    if run.dice.random() < 0.3:
        run.start_new_cache()
    result = run.resume(file_limit=int(math.exp(run.dice.uniform(math.log(3e4), math.log(4e6)))))
    if not any(result.statuses):
        return finished(result)
    refused(run, result)
    return WENT_ON


def damaged_checkpoint(run: Run) -> str:
    """A file of the newest checkpoint: the one before is taken, and the words say so."""
    if not prepared(run):
        return MISSED
    newest = checkpoints(run.folder)[-1]
    return damaged(run, [run.dice.choice(files_in(newest))], may=(WENT_ON,), says=f"{newest}: ")


def damaged_checkpoints(run: Run) -> str:
    """A file in each checkpoint: there is nothing to go on from."""
    if not prepared(run):
        return MISSED
    return damaged(run, [run.dice.choice(files_in(path)) for path in checkpoints(run.folder)], may=(REFUSED,))


def damaged_pool(run: Run) -> str:
    """A past policy: another model must not come out of it."""
    return damaged(run, [run.dice.choice(files_in(run.folder / "pool"))], may=(WENT_ON, REFUSED)) if prepared(run) else MISSED


def damaged_cache(run: Run) -> str:
    """A shard of the cache or what is known of it: made anew."""
    return damaged(run, [run.dice.choice(files_in(run.cache))], may=(WENT_ON,)) if prepared(run) else MISSED


def damaged_identity(run: Run) -> str:
    """run.json."""
    return damaged(run, [run.folder / "run.json"], may=(WENT_ON, REFUSED)) if prepared(run) else MISSED


def damaged(run: Run, files: list[Path], may: tuple[str, ...], says: str = "") -> str:
    """Damage files and resume. What goes on must go on to its end; what is refused must go on once the files are as they were."""
    done = [damage(file, run.dice) for file in files]
    broken = [file.read_bytes() for file in files]
    which = ", ".join(map(one_line, done))
    result = run.resume()
    if any(result.statuses):
        refused(run, result, which)
        expect(REFUSED in may, f"it need not have been refused ({which})", result)
    else:
        expect(WENT_ON in may, f"it went on with damaged files ({which})", result)
        expect(says in result.output, f"nothing says what was damaged ({which})", result)
    for file, was, content in zip(files, done, broken, strict=True):
        if file.exists() and file.read_bytes() == content:  # refused, or no longer needed
            was.mend()
    return REFUSED if any(result.statuses) else WENT_ON


def two_in_one_folder(run: Run) -> str:
    """The same command twice: one of them is refused."""
    results = run.forks.run_both(run.raw, run.raw, "--resume", "auto", ranks=run.ranks, apart=apart(run))
    done = [result for result in results if not any(result.statuses)]
    for result in results:
        if any(result.statuses):
            expect(len(done) == 1, "none of two runs at once came to its end", result)
            refused(run, result)
    first, second = sorted(results, key=lambda result: result.ended)
    together = first.ended - max(first.started, second.started)
    expect(len(done) < 2 or together < run.plain.seconds / 2, f"two runs went on in one folder for {together:.1f} s", second)
    return WENT_ON if len(done) == 1 else MISSED


def two_on_one_cache(run: Run) -> str:
    """Two runs in folders of their own make the same cache: both come to their ends."""
    folder = run.folder.with_name("beside")
    run.start_new_cache()
    beside = replace(run, raw=json.loads(json.dumps(run.raw)))
    beside.raw["seppo"]["output_dir"] = str(folder)
    beside.raw["csv_monitor"]["output_path"] = str(folder / "monitor")
    for result in run.forks.run_both(run.raw, beside.raw, "--resume", "auto", ranks=run.ranks, apart=apart(run)):
        expect(not any(result.statuses), "a run did not come to its end beside another one", result)
    expect(files_of(folder) == run.plain.files, "the run beside ended with other bytes", result)
    return WENT_ON


def apart(run: Run) -> float:
    """Seconds between two starts: at once, or while the other one runs."""
    return run.dice.choice((0.0, run.dice.uniform(0.0, run.plain.seconds)))


def prepared(run: Run) -> bool:
    """Whether the run has two checkpoints, and is not done yet: what there is not is trained."""
    while len(checkpoints(run.folder)) < 2:
        if run.resume(strike=AFTER_THE_FIRST).struck is None:
            return False
    return True


def finished(result: Result) -> str:
    """The strike did not come: the run must be done."""
    expect(not any(result.statuses), "it did not come to its end", result)
    return MISSED


def refused(run: Run, result: Result, what: str = "") -> None:
    """A refusal: status 2, no rank that thinks it is done, one message for a person, soon."""
    about = f" ({what})" if what else ""
    expect(2 in result.statuses and 0 not in result.statuses, f"neither done nor refused{about}", result)
    expect("Traceback" not in result.output and result.output.count("seppo_fast: ") == 1, f"not one message{about}", result)
    run.waited(result.started, result)


def expect(holds: bool, what: str, result: Result) -> None:
    """`Wrong` unless it holds."""
    if not holds:
        raise Wrong(f"{what}: {said(result)}")


KINDS: dict[str, tuple[Fault, int]] = {  # and how often, relative to the others
    **{f"SIGKILL: {area}": (partial(killed, area=area), 2) for area in AREAS},
    "SIGTERM or SIGINT": (stopped, 7),
    ALONE: (one_rank_killed, 5),
    "full disk": (full_disk, 4),
    "damaged: the newest checkpoint": (damaged_checkpoint, 4),
    "damaged: every checkpoint": (damaged_checkpoints, 2),
    "damaged: a past policy": (damaged_pool, 3),
    "damaged: the cache": (damaged_cache, 3),
    "damaged: run.json": (damaged_identity, 1),
    "two runs in one folder": (two_in_one_folder, 3),
    "two runs on one empty cache": (two_on_one_cache, 1),
}


def choose(dice: random.Random, ranks: int, among: Sequence[str]) -> str:
    """The name of one of these faults that can be done to so many ranks."""
    names = [name for name in among if ranks > 1 or name != ALONE]
    return dice.choices(names, [KINDS[name][1] for name in names])[0]
