"""An evaluation from its arguments to its result: samples, scores, tables, page."""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from seppo_fast.disk import complete_or_not
from seppo_fast.errors import UserError
from seppo_fast.evaluation.candidates import Candidate
from seppo_fast.evaluation.generate import generate, share_of
from seppo_fast.evaluation.prompts import tell_truncated
from seppo_fast.evaluation.report.page import write_page
from seppo_fast.evaluation.report.table import markdown, tabulate, write_csv
from seppo_fast.evaluation.request import SCALES, Request
from seppo_fast.evaluation.scoring import Job, Sample, Scored, find_all, score_all
from seppo_fast.machine import commit, machine
from seppo_fast.opening import read_object
from seppo_fast.ranks import Ranks

PACKAGES = ("torch", "diffusers", "transformers", "torchmetrics")
SETTINGS = "evaluation.json"


def evaluate(request: Request, ranks: Ranks, say: Callable[[str], None] = print) -> dict[str, Any] | None:
    """Draw, score and report; every rank calls. The first rank returns the result, as scores.json has it."""
    if ranks.rank == 0:
        remember(request)
    ranks.barrier()
    missing = find_all(request, ranks)  # before drawing, which may take hours
    tell_missing(missing, request, say)
    problems: dict[str, str] = {}
    for candidate in request.candidates:
        tell_truncated(request.prompts, candidate.model, say, f" by {candidate.name}")
        with timed(request.out, candidate) if ranks.rank == 0 else nullcontext():
            problems |= generate(candidate, request.prompts, request.drawing, request.out, ranks, say)
    ranks.barrier()
    start = time.perf_counter()
    scored = score_all(Job(request, own_samples(request, problems, ranks), ranks), missing)
    if ranks.rank != 0:
        return None
    spent = read_object(request.out / SETTINGS)["seconds"]
    seconds = {f"samples of {name}": round(spent.get(name, 0.0), 1) for name in request.models}
    seconds["scores"] = round(time.perf_counter() - start, 1)
    result = result_of(request, scored, seconds)
    write(result, request.out)
    return result


def tell_missing(missing: Mapping[str, str], request: Request, say: Callable[[str], None]) -> None:
    """Say what the scores lack, and what happens without them."""
    for why in missing.values():
        say(f"missing: {why}")
    if len(missing) == len(request.scores):
        say("no score can be given; samples and page are made all the same, and the same command scores them later")


def nothing_scored(result: Mapping[str, Any]) -> bool:
    """Whether every score that was asked for is missing."""
    return all(score["missing"] for score in result["scores"])


@contextmanager
def timed(out: Path, candidate: Candidate) -> Iterator[None]:
    """Add the block's seconds to those of earlier runs for the candidate's samples, also when the block is interrupted."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - start
        with suppress(OSError, UserError):  # on a full disk the block's own error matters
            noted = read_object(out / SETTINGS)
            total = noted["seconds"].get(candidate.name, 0.0) + seconds
            write_whole(out / SETTINGS, noted | {"seconds": noted["seconds"] | {candidate.name: round(total, 3)}})


def own_samples(request: Request, problems: Mapping[str, str], ranks: Ranks) -> list[Sample]:
    """This rank's samples, ready to be scored; a sample that could not be drawn has no file."""
    return [{"prompt": slot.prompt, "sample": slot.sample, "model": candidate.name,
             "file": None if slot.file in problems else slot.file, "values": {}, "problem": problems.get(slot.file)}
            for candidate in request.candidates
            for slot in share_of(candidate, request.prompts, request.drawing, ranks)]


def remember(request: Request) -> None:
    """Write settings and models into the output folder; a UserError where it holds samples of others."""
    file = request.out / SETTINGS
    try:
        request.out.mkdir(parents=True, exist_ok=True)
        before = read_object(file) if os.path.lexists(file) else {"drawing": None, "models": {}}
        seconds = before.get("seconds", {})  # an earlier version noted none
        if not (isinstance(before["models"], dict) and isinstance(before["drawing"], dict | None) and isinstance(seconds, dict)
                and all(isinstance(value, int | float) for value in seconds.values())):
            raise ValueError
        drawing = settings_of(request)
        # What the samples that are there do not depend on, or an earlier version did not have, unless it is noted.
        unused = {"vae_tiling": False} | {name: drawing[name] for name in SCALES if name in drawing}
        noted = drawing if before["drawing"] is None else unused | before["drawing"]
        if differing := sorted(name for name in drawing if noted.get(name) != drawing[name]):
            name = differing[0]
            raise UserError(f"--out {request.out} holds samples with {name} {noted.get(name)!r}, and now it is"
                            f" {drawing[name]!r}: give another folder, or the same {name}")
        models = {candidate.name: candidate.fingerprint() for candidate in request.candidates}
        for name, digest in models.items():
            if before["models"].get(name, digest) != digest:
                raise UserError(f"--out {request.out} holds samples of another model called {name!r} (or its files have changed):"
                                f" give another name or folder, or remove {request.out / 'samples' / name} and {file}")
        write_whole(file, {"drawing": noted | drawing, "models": before["models"] | models, "seconds": seconds})
    except OSError as error:
        raise UserError(f"--out {request.out}: {error.strerror}; choose another folder") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged, so it is not known what the samples there are of: choose another --out") from error


def write_whole(file: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as JSON into `file`; all of it or nothing."""
    with complete_or_not(file) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def settings_of(request: Request) -> dict[str, Any]:
    """The settings that decide a sample, as JSON: without the batch size and the number of samples."""
    drawing = request.drawing
    improvement = {name: getattr(drawing.improvement, key) for name, key in SCALES.items()} if request.improves else {}
    sampler = {name: getattr(drawing.sampler, name) for name in ("solver", "steps", "guidance_scale")}
    return {"seed": drawing.seed, "resolution": drawing.resolution, "frames": drawing.frames,
            "dtype": str(drawing.dtype).removeprefix("torch."), **sampler, **improvement,
            "vae_tiling": any(candidate.model.vae_memory.tiling for candidate in request.candidates)}


def result_of(request: Request, scored: Scored, seconds: dict[str, float]) -> dict[str, Any]:
    """The content of scores.json."""
    sets = [prompt.sets for prompt in request.prompts]
    result = {
        "about": {"machine": machine(), "versions": versions(), "commit": commit(),
                  "date": datetime.now(UTC).isoformat(timespec="seconds"),
                  "settings": {**settings_of(request), "per_prompt": request.drawing.per_prompt}, "seconds": seconds},
        "models": [{"name": candidate.name, "path": candidate.given, "local": candidate.local,
                    "improves": candidate.source and candidate.source.name} for candidate in request.candidates],
        "scores": scored.scores,
        "groups": request.groups,
        "prompts": [{"index": index, "text": prompt.text, "group": prompt.sets[-1] if prompt.sets[-1] in request.groups else None,
                     "id": str(index)} for index, prompt in enumerate(request.prompts)],
        "samples": scored.samples,
    }
    return {**result, "table": [*tabulate(result, sets), *scored.set_rows]}


def versions() -> dict[str, str]:
    """Library -> version, for the libraries that are installed."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def write(result: dict[str, Any], out: Path) -> None:
    """Write scores.json, scores.csv, table.md and index.html."""
    (out / "scores.json").write_text(json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    (out / "table.md").write_text(markdown(result), encoding="utf-8")
    write_csv(result, out / "scores.csv")
    write_page(result, out)
