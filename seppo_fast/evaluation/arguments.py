"""From the command line of an evaluation to a checked request."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from seppo_fast.config import Improvement, Sampler
from seppo_fast.errors import UserError
from seppo_fast.evaluation.candidates import Candidate, frames_of, open_candidates
from seppo_fast.evaluation.generate import Drawing, check_drawing
from seppo_fast.evaluation.prompts import read_prompts
from seppo_fast.evaluation.request import SCALES, Request
from seppo_fast.evaluation.scoring import kind_of, scores_of
from seppo_fast.evaluation.weights import flags
from seppo_fast.models import Model
from seppo_fast.models.contract import HALF
from seppo_fast.models.vae_memory import VaeMemory
from seppo_fast.nodes import agreed, check_same, in_turn, sizes
from seppo_fast.ranks import Ranks
from seppo_fast.reference.solver import default_solver


def request_of(arguments: argparse.Namespace, ranks: Ranks, say: Callable[[str], None]) -> Request:
    """The request, checked as far as possible before anything is loaded; rank 0 downloads from the hub first."""
    candidates = in_turn(ranks, lambda: open_candidates(arguments.models, arguments.variant, arguments.motion_adapter,
                                                        arguments.frames, VaeMemory(arguments.vae_tiling, arguments.vae_slicing)))
    for candidate in candidates:
        check_same(f"--models {candidate.name}={candidate.given}", sizes(candidate.model.path), ranks)
    video = candidates[0].model.video
    frames = arguments.frames or frames_of(candidates) if video else None
    scores = chosen(arguments.scores, video, "--scores", several=arguments.per_prompt > 1)
    check_real(arguments.real, candidates[0].model, "--real")
    solver = arguments.solver or default_solver(candidate.model for candidate in candidates)
    sampler = Sampler(solver=solver, steps=arguments.steps, guidance_scale=arguments.guidance_scale,
                      batch_size=arguments.batch_size or "auto", compile=arguments.compile)
    drawing = Drawing(arguments.seed, arguments.per_prompt, arguments.resolution, frames,
                      dtype_of(arguments.dtype, ranks.device, candidates), sampler, scales_of(arguments, candidates))
    check_drawing(candidates, drawing)
    prompts = agreed(ranks, lambda: read_prompts(arguments.prompts, arguments.limit, say))
    check_same("--prompts", {f"prompt {number}": prompt.text for number, prompt in enumerate(prompts)}, ranks)
    return Request(candidates, prompts, scores, weights_of(arguments.weights), drawing, arguments.out, arguments.real,
                   arguments.score_batch_size)


def chosen(given: Sequence[str] | None, video: bool, flag: str, several: bool = True) -> list[str]:
    """The names of the given scores in the tables' order; if none was given, all scores, without those that need several
    samples a prompt unless there are `several`."""
    known = [score.name for score in scores_of(video)]
    unknown = [name for name in given or () if name not in known]
    if unknown:
        raise UserError(f"{flag} {unknown[0]}: there is no such score of {'videos' if video else 'images'}; there are"
                        f" {', '.join(known)}")
    if given is None:
        return [score.name for score in scores_of(video) if several or kind_of(score) != "prompt"]
    return [name for name in known if name in given]


def scales_of(arguments: argparse.Namespace, candidates: Sequence[Candidate]) -> Improvement:
    """The guidance scales of models that improve samples; UserError where some are given and there is no such model."""
    given = {name: scale for name in SCALES if (scale := getattr(arguments, name)) is not None}
    if given and not any(candidate.source for candidate in candidates):
        name, scale = next(iter(given.items()))
        raise UserError(f"--{name.replace('_', '-')} {scale}: no model improves another's samples; name one by --models"
                        " NAME=PATH@OTHER, or leave the flag out")
    return Improvement(**{SCALES[name]: scale for name, scale in given.items()})


def check_real(folder: Path | None, model: Model, flag: str) -> None:
    """UserError where a folder of real clips is given that does not exist, or for a model of images."""
    if folder is not None and not folder.is_dir():
        raise UserError(f"{flag} {folder}: no such folder")
    if folder is not None and not model.video:
        raise UserError(f"{flag} {folder}: real clips are compared with videos, and {model.path} makes images")


def weights_of(given: Sequence[str]) -> dict[str, str]:
    """Score or score.part -> path, from arguments `SCORE=PATH` and `SCORE.PART=PATH`."""
    found = {}
    for argument in given:
        name, equals, path = argument.partition("=")
        if not equals or not path:
            raise UserError(f"--weights {argument}: SCORE=PATH is needed")
        found[name] = path
    check_weights(found, "--weights")
    return found


def check_weights(given: Mapping[str, str], flag: str) -> None:
    """UserError unless every name is that of a score or of a part of one."""
    known = {name for score in (*scores_of(False), *scores_of(True)) for part in score.wants for name in flags(score, part)}
    for name, path in given.items():
        if name not in known:
            raise UserError(f"{flag} {name}={path}: no score has weights called {name!r}; there are {', '.join(sorted(known))}")


def dtype_of(name: str, device: torch.device, candidates: Sequence[Candidate]) -> torch.dtype:
    """The precision that all models are drawn with; "auto" on a GPU is the first half precision that all of them have."""
    half = [dtype for dtype in HALF if all(dtype in candidate.model.half for candidate in candidates)]
    if name == "auto":
        return half[0] if device.type == "cuda" else torch.float32
    dtype = getattr(torch, name)
    if dtype in HALF and dtype not in half:
        given = next(candidate.given for candidate in candidates if dtype not in candidate.model.half)
        raise UserError(f"--dtype {name}: the networks of {given} overflow in it; use bfloat16 or float32")
    return dtype
