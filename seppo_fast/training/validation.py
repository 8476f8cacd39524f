"""Scores of the policy while it is trained: what `seppo_fast.evaluate` does, on samples of fixed prompts."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seppo_fast.configfile import Config
from seppo_fast.data.memory import give_back_memory
from seppo_fast.errors import UserError
from seppo_fast.evaluation.arguments import check_real, check_weights, chosen
from seppo_fast.evaluation.candidates import Candidate
from seppo_fast.evaluation.generate import Drawing, Renderer, render, share_of
from seppo_fast.evaluation.prompts import Prompt, read_prompts, tell_truncated
from seppo_fast.evaluation.report.table import ALL, tabulate
from seppo_fast.evaluation.request import Request
from seppo_fast.evaluation.run import own_samples
from seppo_fast.evaluation.scoring import Job, find_all, score_all, scores_of
from seppo_fast.models import Conditions, Model
from seppo_fast.ranks import Ranks
from seppo_fast.reference.batching import chunks
from seppo_fast.reference.network import Reference
from seppo_fast.training.engine import precision

SECTION = "seppo.evaluation"


@dataclass(frozen=True)
class Validation:
    """Samples go to `request.out`/samples/update_00000030. `embeds`: a prompt's conditions, on the CPU; `shape`: (C, ..., h, w)."""

    request: Request
    model: Model
    embeds: Mapping[str, Conditions]
    shape: tuple[int, ...]
    ranks: Ranks

    def __call__(self, update: int, reference: Reference, check: Callable[[], None]) -> tuple[dict[str, Any], list[str]]:
        """Draw from the reference's network and score: the means, how many samples have a problem, and notes for people.

        Every rank calls. `check` is called between batches by all ranks alike, and may raise.
        """
        ranks = self.ranks
        policy = Candidate(f"update_{update:08d}", str(self.model.path), self.model, lora=None)
        request = replace(self.request, candidates=[policy])
        folder = request.out / "samples" / policy.name
        if ranks.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier attempt
            folder.mkdir(parents=True)
        ranks.barrier()

        def draw(noise: Tensor, conditions: Conditions) -> Tensor:
            check()
            return reference.shown.draw(noise, conditions)

        todo = share_of(policy, request.prompts, request.drawing, ranks)
        batches = -(-len(todo) // reference.batch_size)
        more = ranks.largest(batches) - batches  # another rank has more batches, and all ranks must check equally often
        vae = self.model.load_vae(ranks.device)
        renderer = Renderer(self.shape, self.embed, draw, partial(self.model.decode, vae), reference.batch_size, ranks.device,
                            self.model.frame_rate)
        problems = render(todo, request.prompts, request.drawing.seed, request.out, renderer, lambda: None)
        for _ in range(more):
            check()
        del renderer, vae
        scored = score_all(Job(request, own_samples(request, problems, ranks), ranks))
        give_back_memory()
        row, notes = summary(request, scored.scores, scored.samples, scored.set_rows)
        return ranks.from_first((row, notes))  # a set's value is the first rank's alone

    def embed(self, prompts: list[str]) -> Conditions:
        """Their conditions on the device."""
        each = [self.embeds[prompt] for prompt in prompts]
        return {name: torch.stack([one[name] for one in each]).to(self.ranks.device) for name in each[0]}

    @property
    def better(self) -> dict[str, str]:
        """Score -> "higher" or "lower"."""
        return {score.name: score.better for score in scores_of(self.request.video)}


def summary(request: Request, scores: list[dict[str, Any]], samples: list[dict[str, Any]], set_rows: list[dict[str, Any]]
            ) -> tuple[dict[str, Any], list[str]]:
    """The numbers of a row of metrics.jsonl, and what a person should know beside them."""
    result = {"models": [{"name": name} for name in request.models], "groups": [ALL], "scores": scores, "samples": samples}
    rows = [*tabulate(result, [prompt.sets for prompt in request.prompts]), *(row for row in set_rows if row["group"] == ALL)]
    faulty = [sample for sample in samples if sample["problem"]]
    notes = [f"{score['label']} is missing: {score['missing']}" for score in scores if score["missing"]]
    notes += [f"{len(faulty)} of {len(samples)} samples have a problem, the first: {faulty[0]['problem']}"] if faulty else []
    row = {**{f"eval_{row['score']}": row["mean"] for row in rows}, "eval_samples": len(samples), "eval_problems": len(faulty)}
    return row, notes


def request_of(config: Config, model: Model, say: Callable[[str], None]) -> Request:
    """The section as an evaluation in the run folder's `evaluation`, checked without loading or fetching anything."""
    ours = config.seppo
    asked = ours.evaluation
    scores = chosen(asked.scores, model.video, f"{SECTION}.scores")
    real = None if asked.real is None else Path(asked.real)
    check_real(real, model, f"{SECTION}.real")
    check_weights(asked.weights, f"{SECTION}.weights")
    drawing = Drawing(asked.seed, asked.per_prompt, ours.data.resolution, ours.data.video.frames if model.video else None,
                      precision(config.deepspeed).dtype, ours.shown)
    prompts = prompts_of(config, say)
    tell_truncated(prompts, model, say)
    return Request([], prompts, scores, dict(asked.weights), drawing,
                  Path(ours.output_dir) / "evaluation", real, asked.batch_size)


def prompts_of(config: Config, say: Callable[[str], None]) -> list[Prompt]:
    """Those of the file, or those that are given, each once."""
    asked = config.seppo.evaluation
    if isinstance(asked.prompts, str):
        return read_prompts([asked.prompts], asked.limit, say, f"{SECTION}.prompts")
    texts = list(dict.fromkeys(prompt.strip() for prompt in asked.prompts))[: asked.limit]
    if not all(texts):
        raise UserError(f"{SECTION}.prompts has an empty prompt; remove it")
    return [Prompt(text, ("prompts",)) for text in texts]


def check_scores(request: Request, ranks: Ranks) -> None:
    """Find what the scores need, on the hub too; every rank calls. A UserError says which score lacks what."""
    if missing := find_all(request, ranks):
        raise UserError(f"{SECTION}.scores: {' '.join(missing.values())} In a configuration the flags are keys of {SECTION}, e.g."
                        f' {SECTION}.weights {{"SCORE": "PATH"}}; or leave the score out')


def open_validation(request: Request, model: Model, dtype: torch.dtype, shape: tuple[int, ...], ranks: Ranks) -> Validation:
    """Embed this rank's prompts."""
    mine = share_of(Candidate("policy", str(model.path), model, lora=None), request.prompts, request.drawing, ranks)
    texts = list(dict.fromkeys(request.prompts[slot.prompt].text for slot in mine))
    embed = model.load_text(ranks.device)
    embeds: dict[str, Conditions] = {}
    for some in chunks(texts, request.batch):
        batch = {name: value.to("cpu", dtype) for name, value in embed(list(some)).items()}
        embeds |= {text: {name: value[i].clone() for name, value in batch.items()} for i, text in enumerate(some)}
    del embed
    give_back_memory()
    return Validation(request, model, embeds, shape, ranks)
