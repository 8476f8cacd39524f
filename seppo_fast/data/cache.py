"""Winners and prompts are encoded once, by all ranks, into Arrow files on disk; a run that was interrupted goes on.

Of clips whose frames are drawn anew in each epoch the files are probed once instead, and `ClipStream` encodes them.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from tqdm import tqdm

from seppo_fast import config
from seppo_fast.checksums import Hashing
from seppo_fast.data.content import Content, content_of, settle
from seppo_fast.data.encode import decoded, encoded
from seppo_fast.data.files import readable
from seppo_fast.data.fingerprint import cache_folder, digest, made_of, of_files_alone
from seppo_fast.data.latents import (
    PROMPTS_PER_SHARD,
    LatentCache,
    PromptCache,
    open_images,
    prompt_shard,
    prompt_shards,
    row_shard,
)
from seppo_fast.data.memory import give_back_memory
from seppo_fast.data.progress import Progress
from seppo_fast.data.prompt_encoder import PromptEncoder, embedded, keeps_prompts, longer, prompt_bytes, together
from seppo_fast.data.rows import Part, Skipped, Source
from seppo_fast.data.shards import Shard, remove_stale, replacing
from seppo_fast.data.skips import check_skipped, most_skippable, stop_early, tell_truncated
from seppo_fast.data.stamps import declare, is_damaged, read_stamp, unusable
from seppo_fast.data.turns import in_turn
from seppo_fast.data.video.decoder import Decoder
from seppo_fast.data.video.reading import decoded_clips, described
from seppo_fast.data.video.source import streams
from seppo_fast.data.video.stream import ClipStream
from seppo_fast.models import Conditions
from seppo_fast.models.tokens import token_counter

PROMPTS_AT_ONCE = 32  # whose embeddings are written at once
FILE_SYSTEM_LAG = 60  # seconds until a network file system shows what another machine wrote
Batches = Iterator[tuple[dict[str, Any], list[Skipped], int]]  # columns, unusable rows, rows read


@dataclass(frozen=True)
class Job:
    """What is needed to write a part's shard; `holds` is "latents" or, for a stream, "clips"."""

    source: Source
    model: Any
    data: config.Data
    seed: int
    needs_loser: bool
    output_dir: Path
    folder: Path
    holds: str
    latent_size: int
    device: str | torch.device
    say: Callable[[str], None]


@readable()
def build_cache(source: Source, model: Any, data: config.Data, *, seed: int, needs_loser: bool, output_dir: Path,
                rank: int = 0, world: int = 1, device: str | torch.device = "cpu",
                barrier: Callable[[], None] = lambda: None, progress: bool = True,
                agree: Callable[[str], None] = lambda names: None,
                room: Callable[[Path, int], None] = lambda folder, size: None) -> LatentCache | ClipStream:
    """The cache of this source, model and preprocessing. What is not in it yet is made first; each rank makes its share.

    Every rank calls it with the same arguments; `barrier` must wait for all, and `agree` may refuse the digest of the
    files' names, sizes and times. Rank 0 writes `output_dir/skipped.jsonl`, and calls `room` with the cache's folder and the bytes
    that are about to be added, as far as they are known.
    """
    streaming = streams(source, data, model.video)
    names, written = source.identity()
    agree(names)
    about = made_of(source, names, model, data, seed, needs_loser, streaming)
    fingerprint = digest(about)
    kept = of_files_alone(about) if streaming else about
    folder, holds = cache_folder(data, digest(kept)), "clips" if streaming else "latents"
    show = progress and rank == 0
    say = partial(print, flush=True) if show else lambda line: None
    patience = FILE_SYSTEM_LAG if world > 1 else 0
    folder = settle(folder, kept, source, holds, list(written), data.workers, rank, patience, barrier, say)
    remove_stale(folder)
    job = Job(source, model, data, seed, needs_loser, Path(output_dir), folder, holds, prod(about["shape"]), device, say)
    if rank == 0:
        room(folder, latent_bytes(job))
    write_parts(job, range(rank, len(source.parts), world), show)
    barrier()
    images = open_images(folder, len(source.parts), patience, holds)
    check_skipped(images.stamps, data.max_skipped, source.name, job.output_dir, write=rank == 0)
    on_disk = keeps_prompts(model, data, len(images.prompts.texts))
    say(of_prompts(len(images.prompts.texts), prompt_bytes(model, data), on_disk))
    if rank == 0:
        room(folder, embedding_bytes(job, images.prompts.texts) if on_disk else 0)
    if on_disk:
        encode_prompts(job, images.prompts.texts, range(rank, prompt_shards(images.prompts), world), show)
    barrier()
    content = content_of(about, images.stamps)
    prompts = (PromptCache(folder, images.prompts, patience) if on_disk else
               PromptEncoder(model, images.prompts.texts, data, device))
    if rank == 0:
        tell_truncated(prompts.stamps, images.prompts, job.output_dir, say)
    if not streaming:
        return LatentCache(folder, images, patience, content, prompts)
    return ClipStream(images, prompts, source.root, model, data, seed=seed,
                      fingerprint=fingerprint, content=content, shape=tuple(about["shape"]), device=device, say=say)


def latent_bytes(job: Job) -> int:
    """The bytes of the latents that are not in the cache yet; 0 where it is not known how many rows there are."""
    parts = range(len(job.source.parts))
    missing = sum(read_stamp(row_shard(job.folder, part, job.holds)) is None for part in parts)
    if job.holds == "clips" or not job.source.count or not parts:
        return 0
    tensors = 4 if job.needs_loser else 2  # mean and standard deviation, of each image
    row = tensors * job.latent_size * getattr(torch, job.data.cache_dtype).itemsize
    return job.source.count * row * missing // len(parts)


def embedding_bytes(job: Job, texts: pa.Array) -> int:
    """The bytes of the prompts' embeddings that are not in the cache yet."""
    missing = sum(min(PROMPTS_PER_SHARD, len(texts) - start) for number, start in enumerate(range(0, len(texts), PROMPTS_PER_SHARD))
                  if read_stamp(prompt_shard(job.folder, number)) is None)
    return missing * prompt_bytes(job.model, job.data)


def write_parts(job: Job, mine: range, show: bool) -> None:
    """Encodes (or probes) those of this rank's parts that are missing or damaged."""
    arrows = {part: row_shard(job.folder, part, job.holds) for part in mine}
    todo = unusable(arrows, job.data.workers, show)
    if not todo:
        return
    bad: list[Skipped] = []
    unit = "clip" if job.model.video else "image"
    doing = f"encoding {unit}s" if job.holds == "latents" else "reading videos"
    with (Progress(job.source, list(todo), show, doing, unit) as bar, ThreadPoolExecutor(job.data.workers) as threads,
          reader(job, threads) as read):

        def make(part: int) -> None:
            content = Content()
            done = is_made(arrows[part], todo[part])
            bar.finished(part, 0 if done else write_part(job, part, read(job.source.parts[part], content), content, bar, bad))

        in_turn({part: arrows[part] for part in todo}, make)
    give_back_memory()


def is_made(arrow: Path, damaged: bool) -> bool:
    """Whether another run has made the file in the meantime. `damaged`: the file was there before, but damaged."""
    return not is_damaged(arrow) if damaged else read_stamp(arrow) is not None


@contextmanager
def reader(job: Job, threads: ThreadPoolExecutor) -> Iterator[Callable[[Part, Content], Batches]]:
    """The function that makes the columns of a part; the VAE is freed at the end of the block."""
    data, seed = job.data, job.seed
    if job.holds == "clips":
        yield lambda part, content: described(part, job.source.root, data, seed, threads, content)
        return
    vae = [job.model.load_vae(job.device)]
    decoder = Decoder(data, job.device, job.say) if job.model.video else None
    try:
        if decoder is None:
            yield lambda part, content: encoded(decoded(part, data, seed, threads, content), job.model, vae[0], data, job.device)
        else:
            yield lambda part, content: encoded(decoded_clips(part, data, seed, threads, content, decoder), job.model, vae[0], data,
                                                job.device)
    finally:
        vae.clear()
        if decoder is not None:
            decoder.close()


@torch.no_grad()
def write_part(job: Job, part: int, batches: Batches, content: Content, bar: Progress, bad: list[Skipped]) -> int:
    """Writes one part's shard, a batch after the other; returns the rows read, and adds unusable ones to `bad`.

    `content` is filled while the batches are made.
    """
    arrow = row_shard(job.folder, part, job.holds)
    most = most_skippable(job.source, job.data.max_skipped)
    read, ties, before = 0, 0, len(bad)
    latents = [] if job.holds == "clips" else ["mean", "std", *(["loser_mean", "loser_std"] if job.needs_loser else [])]
    texts = ["caption", "key", *(["clip"] if job.holds == "clips" else [])]
    with replacing(arrow) as file:
        stream = Hashing(file)
        shard = Shard(stream, dict.fromkeys(latents, job.latent_size), texts, job.data.cache_dtype)
        for columns, unusable, count in batches:
            if columns:
                shard.add(columns)
            read += count
            ties += sum(row.tie for row in unusable)
            bad += [row for row in unusable if not row.tie]
            bar.update(count)
            if len(bad) > most:
                stop_early(bad, job.source.name, job.output_dir, job.data.max_skipped)
        shard.finish()
    declare(arrow, stream, {"part": job.source.parts[part].name, "read": read, "rows": shard.rows, "ties": ties,
                            "skipped": [[row.key, row.reason] for row in bad[before:]], "content": content.digests()})
    return read


def of_prompts(count: int, size: int, kept: bool) -> str:
    """How large the embeddings of so many distinct prompts of `size` bytes are, and where they are."""
    how = "kept in the cache" if kept else "embedded when they are needed, by text encoders that rest in host memory"
    return f"prompt embeddings: {count} different prompts of {size / 1e6:.3g} MB, {count * size / 1e9:.3g} GB in all, {how}"


def encode_prompts(job: Job, texts: pa.Array, mine: range, show: bool) -> None:
    """Encodes the distinct prompts of those of this rank's shards that are missing or damaged."""
    arrows = {number: prompt_shard(job.folder, number) for number in mine}
    todo = unusable(arrows, job.data.workers, show)
    if not todo:
        return
    shards = {number: texts.slice(number * PROMPTS_PER_SHARD, PROMPTS_PER_SHARD) for number in todo}
    encode_shards(job, shards, arrows, todo, show)
    give_back_memory()


def encode_shards(job: Job, shards: dict[int, pa.Array], arrows: dict[int, Path], damaged: dict[int, bool], show: bool) -> None:
    """Loads the text encoder and writes the shards, except those that another run writes."""
    embed, (tokens, limit) = job.model.load_text(job.device), token_counter(job.model)
    total = sum(map(len, shards.values()))
    with tqdm(desc="encoding prompts", total=total, unit="prompt", disable=not show) as bar:

        def make(number: int) -> None:
            texts = shards[number].to_pylist()
            if not is_made(arrows[number], damaged[number]):
                encode_prompt_shard(job, number, texts, embed, {"limit": limit, "cut": longer(texts, tokens, limit)})
            bar.update(len(texts))

        in_turn({number: arrows[number] for number in shards}, make)


def encode_prompt_shard(job: Job, number: int, prompts: list[str], embed: Callable[[list[str]], Conditions],
                        about: dict[str, Any]) -> None:
    """Writes one shard of embeddings and the JSON beside it, which also holds `about`."""
    arrow, shard, shapes = prompt_shard(job.folder, number), None, {}
    with replacing(arrow) as file:
        stream = Hashing(file)
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            batch = prompts[start:start + PROMPTS_AT_ONCE]
            conditions = together(embedded(embed, batch, job.data.cache_dtype))
            if shard is None:
                shapes = {name: list(values.shape[1:]) for name, values in conditions.items()}
                lengths = {name: prod(shape) for name, shape in shapes.items()}
                shard = Shard(stream, lengths, ["text"], job.data.cache_dtype)
            shard.add(conditions | {"text": batch})
        shard.finish()
    declare(arrow, stream, {"rows": shard.rows, "shapes": shapes} | about)
