"""An evaluation from its arguments to its result: samples, scores, tables, page."""

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from seppo_fast.errors import UserError
from seppo_fast.evaluation.generate import Drawing, generate, share_of
from seppo_fast.evaluation.prompts import tell_truncated
from seppo_fast.evaluation.report.page import write_page
from seppo_fast.evaluation.report.table import markdown, tabulate, write_csv
from seppo_fast.evaluation.request import Request
from seppo_fast.evaluation.scoring import Job, Sample, Scored, score_all
from seppo_fast.machine import commit, machine
from seppo_fast.opening import read_object
from seppo_fast.ranks import Ranks

PACKAGES = ("torch", "diffusers", "transformers", "torchmetrics")
SETTINGS = "evaluation.json"


def evaluate(request: Request, ranks: Ranks, say: Callable[[str], None] = print) -> dict[str, Any] | None:
    """Draw, score and report; every rank calls, and the first gets the result, which is in scores.json too."""
    seconds: dict[str, float] = {}
    if ranks.rank == 0:
        remember(request)
    ranks.barrier()
    problems: dict[str, str] = {}
    for candidate in request.candidates:
        start = time.perf_counter()
        tell_truncated(request.prompts, candidate.model, say, f" by {candidate.name}")
        problems |= generate(candidate, request.prompts, request.drawing, request.out, ranks, say)
        seconds[f"samples of {candidate.name}"] = round(time.perf_counter() - start, 1)
    ranks.barrier()
    start = time.perf_counter()
    scored = score_all(Job(request, own_samples(request, problems, ranks), ranks))
    seconds["scores"] = round(time.perf_counter() - start, 1)
    if ranks.rank != 0:
        return None
    result = result_of(request, scored, seconds)
    write(result, request.out)
    return result


def own_samples(request: Request, problems: Mapping[str, str], ranks: Ranks) -> list[Sample]:
    """This rank's share of what there is to score; a sample that was not made has no file."""
    return [{"prompt": slot.prompt, "sample": slot.sample, "model": candidate.name,
             "file": None if slot.file in problems else slot.file, "values": {}, "problem": problems.get(slot.file)}
            for candidate in request.candidates
            for slot in share_of(candidate, request.prompts, request.drawing, ranks)]


def remember(request: Request) -> None:
    """Note in the output folder what its samples are of; a UserError where it holds samples of something else."""
    file = request.out / SETTINGS
    try:
        request.out.mkdir(parents=True, exist_ok=True)
        before = read_object(file) if os.path.lexists(file) else {"drawing": None, "models": {}}
        if not (isinstance(before["models"], dict) and isinstance(before["drawing"], dict | None)):
            raise ValueError
        drawing = settings_of(request.drawing)
        if before["drawing"] is not None and (differing := sorted(
                name for name in drawing if before["drawing"].get(name) != drawing[name])):
            name = differing[0]
            raise UserError(f"--out {request.out} holds samples with {name} {before['drawing'].get(name)!r}, and now it is"
                            f" {drawing[name]!r}: give another folder, or the same {name}")
        models = {candidate.name: candidate.fingerprint() for candidate in request.candidates}
        for name, digest in models.items():
            if before["models"].get(name, digest) != digest:
                raise UserError(f"--out {request.out} holds samples of another model called {name!r} (or its files have changed):"
                                f" give another name or folder, or remove {request.out / 'samples' / name} and {file}")
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps({"drawing": drawing, "models": before["models"] | models}, indent=1) + "\n")
        temporary.replace(file)
    except OSError as error:
        raise UserError(f"--out {request.out}: {error.strerror}; choose another folder") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged, so it is not known what the samples there are of: choose another --out") from error


def settings_of(drawing: Drawing) -> dict[str, Any]:
    """What decides the samples, in JSON's words; not in how large batches they are drawn, nor how many there are."""
    sampler = {name: getattr(drawing.sampler, name) for name in ("solver", "steps", "guidance_scale")}
    return {"seed": drawing.seed, "resolution": drawing.resolution, "frames": drawing.frames,
            "dtype": str(drawing.dtype).removeprefix("torch."), **sampler}


def result_of(request: Request, scored: Scored, seconds: dict[str, float]) -> dict[str, Any]:
    """The contract of scores.json."""
    sets = [prompt.sets for prompt in request.prompts]
    result = {
        "about": {"machine": machine(), "versions": versions(), "commit": commit(),
                  "date": datetime.now(UTC).isoformat(timespec="seconds"),
                  "settings": {**settings_of(request.drawing), "per_prompt": request.drawing.per_prompt}, "seconds": seconds},
        "models": [{"name": candidate.name, "path": candidate.given} for candidate in request.candidates],
        "scores": scored.scores,
        "groups": request.groups,
        "prompts": [{"index": index, "text": prompt.text, "group": prompt.sets[-1] if prompt.sets[-1] in request.groups else None,
                     "id": str(index)} for index, prompt in enumerate(request.prompts)],
        "samples": scored.samples,
    }
    return {**result, "table": [*tabulate(result, sets), *scored.set_rows]}


def versions() -> dict[str, str]:
    """Of the libraries that are installed."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def write(result: dict[str, Any], out: Path) -> None:
    """scores.json, scores.csv, table.md and index.html."""
    (out / "scores.json").write_text(json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    (out / "table.md").write_text(markdown(result), encoding="utf-8")
    write_csv(result, out / "scores.csv")
    write_page(result, out)
