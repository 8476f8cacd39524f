"""Checks the past policies of a resumed run: damaged or lost ones are restored from a checkpoint, else the run stops."""

from pathlib import Path

from seppo_fast.config import METHODS
from seppo_fast.configfile import Config
from seppo_fast.errors import UserError
from seppo_fast.ranks import Ranks
from seppo_fast.reference.pool import Pool, pick
from seppo_fast.training import checkpoint
from seppo_fast.training.checkpoint import State
from seppo_fast.training.engine import pool_dtype


def check_past(config: Config, folder: Path, state: State, ranks: Ranks) -> None:
    """Check that all past policies are there, and that those that the run will need are undamaged."""
    ours = config.seppo
    if ours.reference is None:
        return
    done = state.update // ours.updates_per_iteration
    pool = Pool(folder / "pool", pool_dtype(config), 0, state.pool)
    needed = {pick(ours.reference, k, ours.seed) for k in range(done + 1, ours.iterations + 1)} & {*range(done + 1)}
    if METHODS[ours.method].losers == "latest":
        needed.add(done)
    lost = {index: "" for index in range(done + 1) if index not in pool.indices()}
    share = sorted(needed - {*lost})[ranks.rank :: ranks.world]  # it takes as long as the disk needs to read them
    found = ranks.objects((lost, {index: flaw for index in share if (flaw := pool.flaw(index)) is not None}))
    lost, damaged = ({index: flaw for each in found for index, flaw in each[kind].items()} for kind in (0, 1))
    if ranks.rank == 0:
        for index in sorted({*lost, *damaged}):
            if _restore(pool, index, folder / "checkpoints", ours.updates_per_iteration):
                lost.pop(index, None)
                damaged.pop(index, None)
    lost, damaged, checksums = ranks.from_first((lost, damaged, pool.checksums))
    state.pool.update(checksums)
    if not lost and not damaged:
        return
    first = min({*lost, *damaged})
    earlier = [path for path in checkpoint.complete(folder / "checkpoints")
               if checkpoint.update_of(path) < first * ours.updates_per_iteration]
    advice = (f"restore from a copy, or go on with --resume {earlier[-1]}, which makes them again" if earlier else
              "restore from a copy, or start anew in another seppo.output_dir")
    if lost:
        raise UserError(f"{pool.folder} lacks past policies {sorted(lost)}, which the checkpoint needs: {advice}")
    lines = [f"{pool.path(index)}: cannot be read ({flaw})" for index, flaw in sorted(damaged.items())]
    raise UserError("; ".join(lines) + f"; the checkpoint needs it: {advice}")


def _restore(pool: Pool, index: int, checkpoints: Path, updates_per_iteration: int) -> bool:
    """Put a policy back into the pool from a checkpoint; returns whether one had it."""
    for path in checkpoint.of_update(checkpoints, index * updates_per_iteration) if index else []:
        try:
            weights = checkpoint.policy_of(path)
        except UserError:
            continue
        pool.add(index, weights, write=True)
        print(f"{pool.path(index)} was damaged or lost, and is made again from {path}", flush=True)
        return True
    return False
