"""The run folder: which run it belongs to, and at which checkpoint that run begins."""

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from seppo_fast.configfile import Config
from seppo_fast.disk import TEMPORARY, complete_or_not
from seppo_fast.errors import UserError
from seppo_fast.lock import Busy, locked
from seppo_fast.ranks import Ranks
from seppo_fast.training import checkpoint

LOCK = "run.lock"


@dataclass(frozen=True)
class RunFolder:
    """`run_id` is in every checkpoint of the run; `resume_from` is None for a run that starts at update 0."""

    path: Path
    run_id: str
    resume_from: Path | None


def open_folder(config: Config, resume: str | None, ranks: Ranks) -> RunFolder:
    """Make or find the run folder and decide where to begin; every rank must call. Nothing of an earlier run is lost."""
    path = Path(config.seppo.output_dir)
    identity = path / "run.json"
    if ranks.rank == 0:
        _prepare(path, identity, resume)
    ranks.barrier()
    try:
        run_id = json.loads(identity.read_text())["run_id"]
        if not isinstance(run_id, str):
            raise TypeError("not a text")
    except OSError as error:
        raise UserError(f"{identity} cannot be read here ({error.strerror}), though rank 0 wrote it") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{identity} is damaged, so the run in {path} cannot be told from others: choose another"
                        " seppo.output_dir") from None
    return RunFolder(path, run_id, _start(path, resume, ranks))


@contextmanager
def alone_in(path: Path, ranks: Ranks) -> Iterator[None]:
    """Keep other runs out of the run folder; rank 0 does it for all. A folder that was made here and stays empty is removed."""
    if ranks.rank != 0:
        yield
        return
    with ExitStack() as after:
        try:
            for folder in reversed([folder for folder in (path, *path.parents) if not folder.exists()]):
                folder.mkdir(exist_ok=True)
                after.callback(_remove_empty, folder)
            after.enter_context(locked(path / LOCK))
        except Busy as other:
            gone = ("" if not other.unproven else ". This file system has no flock, so it cannot be seen from here whether that"
                    f" process still runs: if it does not, remove {path / LOCK} and start again")
            raise UserError(f"{path} (seppo.output_dir) is in use by another run: {other}. Wait for its end, stop it, or choose"
                            f" another seppo.output_dir{gone}") from None
        except OSError as error:
            raise UserError(f"seppo.output_dir {path}: cannot be written ({error.strerror}); choose another folder") from None
        yield


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def results_in(path: Path) -> list[str]:
    """The results of a run in a folder. A run that ended before its first update has none, and another run may begin there."""
    return [name for name in ("checkpoints", "metrics.jsonl", "final") if (path / name).exists()]


def _prepare(path: Path, identity: Path, resume: str | None) -> None:
    results = results_in(path)
    if results and identity.exists() and resume is None:
        raise UserError(f"{path} already holds a run: add --resume auto to go on with it, or choose another"
                        " seppo.output_dir")
    if results and not identity.exists():
        raise UserError(f"{path} (seppo.output_dir) holds {' and '.join(results)} but no run.json, so no run of this program"
                        " can go on there: choose another seppo.output_dir")
    if not identity.exists() and resume not in (None, "auto"):
        raise UserError(f"--resume {resume}: {path} (seppo.output_dir) holds no run, and a checkpoint can only be resumed in"
                        f" the folder of the run that wrote it; {checkpoint.anew(Path(resume))}")
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not identity.exists():
            with complete_or_not(identity) as temporary:
                temporary.write_text(json.dumps({"run_id": uuid.uuid4().hex}) + "\n")
    except OSError as error:
        raise UserError(f"seppo.output_dir {path}: cannot be written ({error.strerror}); choose another folder") from None
    for leftover in [path / ".final.tmp", path / ".best.tmp", *(path / "checkpoints").glob(".update_*.tmp")]:
        shutil.rmtree(leftover, ignore_errors=True)
    for leftover in [*path.glob(f"{TEMPORARY}*"), *path.glob(".*.jsonl.*.tmp"), *(path / "samples").glob(f"{TEMPORARY}*")]:
        leftover.unlink(missing_ok=True)


def _start(path: Path, resume: str | None, ranks: Ranks) -> Path | None:
    if resume is None:
        return None
    folder = path / "checkpoints"
    # Rank 0 looks, and all ranks take what it sees: file systems may lag on another machine.
    good, unusable = ranks.from_first((checkpoint.complete(folder), checkpoint.torn(folder)) if ranks.rank == 0 else ([], []))
    if resume != "auto":
        return _chosen(Path(resume), good, ranks)
    taken = None
    for newest in reversed(good):
        lack = checkpoint.flaw(newest, ranks)
        if lack is None:
            taken = newest
            break
        unusable.append((newest, lack))
    lines = [f"the checkpoint {name}: {lack}" for name, lack in unusable]
    if taken is None and lines:
        raise UserError(f"none of the checkpoints in {folder} is whole: restore one, or remove them all to begin at update 0.\n  "
                        + "\n  ".join(lines))
    if taken is None and (path / "final").exists():
        raise UserError(f"{path} holds a finished run (final/) but no complete checkpoint to go on from: choose another"
                        " seppo.output_dir to train anew")
    if ranks.rank == 0:
        lines = [f"ignored {line}" for line in lines]
        lines.append(f"resuming from {taken}" if taken else f"{path} has no complete checkpoint: starting at update 0")
        print("\n".join(lines), flush=True)
    return taken


def _chosen(path: Path, good: list[Path], ranks: Ranks) -> Path:
    """The checkpoint that `--resume` names, which must be whole."""
    lack = ranks.from_first((checkpoint.missing(path) if path.is_dir() else "there is no such folder") if ranks.rank == 0 else None)
    lack = lack or checkpoint.flaw(path, ranks)
    if lack:
        others = ", ".join(str(other) for other in good if other != path)
        raise UserError(f"--resume {path}: {lack}; complete checkpoints: {others or 'none'}")
    return path
