"""Samples to values: every rank scores its share. The result names what a score lacks, and samples without a score."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from seppo_fast.errors import UserError
from seppo_fast.evaluation.files import clip_file, read_image, read_video
from seppo_fast.evaluation.prompts import Prompt
from seppo_fast.evaluation.report.table import in_group, rows_of
from seppo_fast.evaluation.request import Request
from seppo_fast.evaluation.scores import IMAGE_SCORES
from seppo_fast.evaluation.scores.base import Score
from seppo_fast.evaluation.scores.vendi import VENDI, VENDI_PROMPT, SetScore
from seppo_fast.evaluation.video.frechet import Moments, frechet
from seppo_fast.evaluation.video.real import read_clip
from seppo_fast.evaluation.video.scores import VIDEO_SCORES, VideoScore
from seppo_fast.evaluation.weights import locate, source
from seppo_fast.extras import need
from seppo_fast.nodes import agreed, in_turn
from seppo_fast.ranks import Ranks
from seppo_fast.reference.batching import chunks

Sample = dict[str, Any]  # as in scores.json
AnyScore = Score | SetScore | VideoScore


@dataclass(frozen=True)
class Scored:
    """`scores` and `samples` as in scores.json; `set_rows` are the table's for scores that have one value a set."""

    scores: list[dict[str, Any]]
    samples: list[Sample]
    set_rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """A request, and this rank's share of all models' samples."""

    request: Request
    samples: list[Sample]
    ranks: Ranks

    def of(self, model: str, group: str) -> Callable[[Sample], bool]:
        """Whether a sample is the model's, for a prompt of the group."""
        return lambda sample: sample["model"] == model and in_group(self.prompt(sample).sets, group)

    def prompt(self, sample: Sample) -> Prompt:
        return self.request.prompts[sample["prompt"]]

    def path(self, sample: Sample) -> Path:
        return self.request.out / sample["file"]


def scores_of(video: bool) -> tuple[AnyScore, ...]:
    """All scores of images, or of videos."""
    return VIDEO_SCORES if video else (*IMAGE_SCORES, VENDI, VENDI_PROMPT)


def requested(request: Request) -> list[AnyScore]:
    """The scores of the request, in their own order."""
    return [score for score in scores_of(request.video) if score.name in request.scores]


def score_all(job: Job, missing: Mapping[str, str] | None = None) -> Scored:
    """The result, complete on the first rank; every rank calls with its share. `missing`: the scores to leave out, and why."""
    request, about, set_rows = job.request, [], []
    for score in requested(request):
        why = (missing or {}).get(score.name)
        if why is None:
            try:
                set_rows += apply(score, loaded(score, job), job)
            except UserError as error:  # on all ranks alike
                why = str(error)
        about.append({"name": score.name, "label": score.label, "better": score.better, "kind": kind_of(score),
                      "weights": {part: source(score, part, request.weights) for part in score.wants},
                      "published": dict(score.wants), "missing": why})
    together = [sample for share in job.ranks.objects(job.samples) for sample in share]
    place = {name: index for index, name in enumerate(request.models)}
    together.sort(key=lambda sample: (place[sample["model"]], sample["prompt"], sample["sample"]))
    return Scored(about, together, set_rows)


def kind_of(score: AnyScore) -> str:
    """"sample"; "prompt" for a score with one value for each prompt's samples; "set" for one with one value for all samples."""
    if isinstance(score, SetScore):
        return "prompt" if score.within_prompts else "set"
    return score.kind if isinstance(score, VideoScore) else "sample"


def loaded(score: AnyScore, job: Job) -> Any:
    """The score's network."""
    return in_turn(job.ranks, lambda: score.load(found(score, job.request), job.ranks.device))


def find_all(request: Request, ranks: Ranks) -> dict[str, str]:
    """Score -> what it lacks, for the scores that lack something. Downloads from the hub. Every rank must call."""
    missing = {}
    for score in requested(request):
        try:
            in_turn(ranks, lambda score=score: found(score, request))
        except UserError as error:
            missing[score.name] = str(error)
    return missing


def found(score: AnyScore, request: Request) -> dict[str, Path]:
    """Part -> file of a score's weights; a UserError where something that the score needs is missing."""
    if isinstance(score, VideoScore) and request.real is None:
        raise UserError(f"{score.label} compares with real clips: give their folder by --real")
    if kind_of(score) == "prompt" and request.drawing.per_prompt == 1:
        raise UserError(f"{score.label} compares the samples of a prompt: give --per-prompt 2 or more")
    check_packages(score)
    return locate(score, request.weights)


def check_packages(score: AnyScore) -> None:
    """UserError where a package that a score needs is not installed."""
    for name in score.packages:
        need(name, f"{score.label} ({score.name})", "seppo-fast[evaluation]")


def apply(score: AnyScore, scorer: Any, job: Job) -> list[dict[str, Any]]:
    """Write a score's values into the samples. Returns, on the first rank, the table's rows of a score with one value a set."""
    if isinstance(score, SetScore):
        return score_sets(score, scorer, job)
    if isinstance(score, VideoScore) and score.kind == "set":
        return score_clip_sets(score, scorer, job)
    for samples, values in agreed(job.ranks, lambda: list(values_of(score, scorer, job))):
        put(score, samples, values)
    return []


def values_of(score: Score | VideoScore, scorer: Any, job: Job) -> Iterator[tuple[list[Sample], Tensor]]:
    """This rank's samples and their values (N,), batch by batch."""
    if isinstance(score, Score):
        for images, samples in images_of(score.label, job):
            yield samples, scorer(images, [job.prompt(sample).text for sample in samples])
    else:
        for generated, real, sample in pairs_of(score.label, job):
            yield [sample], scorer(generated[None], real[None])


def put(score: AnyScore, samples: Sequence[Sample], values: Tensor) -> None:
    """Write values into their samples; a value that is not finite is left out and noted as a problem."""
    for sample, value in zip(samples, values.tolist(), strict=True):
        sample["values"][score.name] = value if math.isfinite(value) else None
        if not math.isfinite(value):
            note(sample, f"{score.label} is {value}")


def usable(score: AnyScore, sample: Sample, features: Tensor) -> bool:
    """Whether a sample's features are finite. If not, the sample is noted and left out, and its set still gets a value."""
    finite = bool(features.isfinite().all())
    if not finite:
        note(sample, f"{score.label}: its features are not finite")
    return finite


def note(sample: Sample, problem: str) -> None:
    """Add a problem to a sample, unless it has it already."""
    known = sample["problem"] or ""
    if problem not in known:
        sample["problem"] = f"{known}; {problem}".removeprefix("; ")


def images_of(label: str, job: Job) -> Iterator[tuple[list[Image.Image], list[Sample]]]:
    """Batches of the samples that can be read."""
    batches = list(chunks(job.samples, job.request.batch))
    for batch in tqdm(batches, desc=label, unit="batch", disable=job.ranks.rank != 0):
        read = [(image, sample) for sample in batch
                if (image := given(sample, lambda sample=sample: read_image(job.path(sample)))) is not None]
        if read:
            yield [image for image, _ in read], [sample for _, sample in read]


def pairs_of(label: str, job: Job) -> Iterator[tuple[Tensor, Tensor, Sample]]:
    """Generated clips (F, 3, H, W) in [0, 1] with the real clips of their prompts, where both can be read.

    Clips of one prompt follow one another, and share the tensor of the real clip, which is decoded once.
    """
    read_once = lru_cache(maxsize=1)(read_clip)
    samples = sorted(job.samples, key=lambda sample: sample["prompt"])
    for sample in tqdm(samples, desc=label, unit="clip", disable=job.ranks.rank != 0):
        generated = given(sample, lambda sample=sample: read_video(job.path(sample), job.request.drawing.frames))
        if generated is None:
            continue
        frames, *_, side = generated.shape
        real = given(sample, lambda sample=sample, of=(frames, side): read_once(real_file(job, sample), *of))
        if real is not None:
            yield generated, real, sample


def real_file(job: Job, sample: Sample) -> Path:
    """The real clip of a sample's prompt."""
    clip = job.prompt(sample).clip
    if clip is None:
        raise UserError("its prompt names no real clip (a column videoid or file_name)")
    return clip_file(job.request.real, clip)


def given(sample: Sample, read: Callable[[], Any]) -> Any:
    """What `read` returns, or None for a sample that was not made or cannot be read; that is noted in the sample."""
    if sample["file"] is None:
        return None
    try:
        return read()
    except UserError as error:
        note(sample, str(error))
        return None


def score_sets(score: SetScore, embed: Callable[[Sequence[Image.Image]], Tensor], job: Job) -> list[dict[str, Any]]:
    """The table's rows, one for each model and group, from the images of all ranks."""
    mine = agreed(job.ranks, lambda: [({name: sample[name] for name in ("model", "prompt")}, vector)
                                      for images, samples in images_of(score.label, job)
                                      for sample, vector in zip(samples, embed(images), strict=True)
                                      if usable(score, sample, vector)])
    every = [pair for share in job.ranks.objects(mine) for pair in share]
    if score.within_prompts:
        return rows_within_prompts(score, every, job)
    rows = []
    for model in job.request.models:
        for group in job.request.groups:
            vectors = [vector for sample, vector in every if job.of(model, group)(sample)]
            rows.append(set_row(score, model, group, len(vectors), score.of(torch.stack(vectors)) if vectors else None))
    return rows


def rows_within_prompts(score: SetScore, every: Sequence[tuple[Sample, Tensor]], job: Job) -> list[dict[str, Any]]:
    """The table's rows of a score that each prompt has a value of; with fewer than two images it has none."""
    vectors: dict[tuple[str, int], list[Tensor]] = {}
    for sample, vector in every:
        vectors.setdefault((sample["model"], sample["prompt"]), []).append(vector)
    values = {key: score.of(torch.stack(own)) for key, own in vectors.items() if len(own) > 1}
    rows = []
    for group in job.request.groups:
        inside = [i for i, prompt in enumerate(job.request.prompts) if in_group(prompt.sets, group)]
        rows += rows_of({model: {(i, 0): values.get((model, i)) for i in inside} for model in job.request.models}, group,
                        {"name": score.name, "better": score.better})
    return rows


def score_clip_sets(score: VideoScore, features: Callable[[Tensor], Tensor], job: Job) -> list[dict[str, Any]]:
    """The table's rows: the Frechet distance of each model's clips of a group to the real clips of the same prompts."""
    shares = job.ranks.objects(agreed(job.ranks, lambda: moments_of(score, features, job)))
    if job.ranks.rank != 0:  # only the first rank reports, and the root of a large covariance takes a core seconds
        return []
    rows = []
    for key in ((model, group) for model in job.request.models for group in job.request.groups):
        parts = [share[key] for share in shares if key in share]
        both = [reduce(add, side) for side in zip(*parts, strict=True)]
        enough = bool(both) and min(side.count for side in both) > 1
        rows.append(set_row(score, *key, both[0].count if both else 0, frechet(*both) if enough else None))
    return rows


def moments_of(score: VideoScore, features: Callable[[Tensor], Tensor], job: Job) -> dict[tuple[str, str], tuple[Moments, Moments]]:
    """(model, group) -> the moments of this rank's clips, and of the real clips of their prompts."""
    sums: dict[tuple[str, str], tuple[Moments, Moments]] = {}
    of_real = lru_cache(maxsize=1)(lambda clip: Moments.of(features(clip[None])))  # by the tensor itself, not by its values
    for generated, real, sample in pairs_of(score.label, job):
        found = features(generated[None])
        if not usable(score, sample, found):
            continue
        one, other = Moments.of(found), of_real(real)
        for group in (group for group in job.request.groups if job.of(sample["model"], group)(sample)):
            key = sample["model"], group
            sums[key] = (sums[key][0] + one, sums[key][1] + other) if key in sums else (one, other)
    return sums


def set_row(score: AnyScore, model: str, group: str, count: int, value: float | None) -> dict[str, Any]:
    """A row of the table. A single value has no bootstrap interval (resampled sets are less diverse), so it is never called the
    best."""
    value = value if value is not None and math.isfinite(value) else None
    return {"model": model, "group": group, "score": score.name, "mean": value, "low": None, "high": None, "count": count,
            "win_rate": None, "best": False}
