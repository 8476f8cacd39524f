"""The plan: what a run will do and what it costs, as text, before it starts."""

from dataclasses import replace
from itertools import islice
from math import prod
from pathlib import Path

import torch

from seppo_fast import __version__
from seppo_fast.config import METHODS, Data, Evaluation, Sampler, Seppo
from seppo_fast.config import Model as ModelSettings
from seppo_fast.configfile import Batch, Config
from seppo_fast.data.fingerprint import cache_root, latent_shape
from seppo_fast.data.order import split
from seppo_fast.data.prompt_encoder import LARGEST_CACHE, keeps_prompts, prompt_bytes
from seppo_fast.data.rows import Row, Source
from seppo_fast.data.sizes import enlarged, size_of
from seppo_fast.data.video.frames import is_fixed
from seppo_fast.data.video.source import streams
from seppo_fast.models import Model
from seppo_fast.models.animatediff import AnimateDiff
from seppo_fast.models.tokens import cut_off, token_counter
from seppo_fast.planning.cost import Cost
from seppo_fast.planning.disk import free, gb, in_words, parts_of
from seppo_fast.planning.engine_bytes import adam_temporaries, uses_bf16_optimizer
from seppo_fast.training.beta import FIRST, PRODUCT
from seppo_fast.training.engine import engine_config, pool_dtype, precision

LOOKED_AT = 1000  # rows that the plan reads
STREAMED = "none: clips are decoded and encoded while it trains, with the VAE on the device"


def cache_bytes(model: Model, config: Config) -> int:
    """Bytes of a demonstration's latents in the cache."""
    data = config.seppo.data
    tensors = 4 if METHODS[config.seppo.method].needs_losers else 2  # mean and standard deviation, of each image
    return tensors * prod(latent_shape(model, data)) * getattr(torch, data.cache_dtype).itemsize


def plan(config: Config, batch: Batch, cost: Cost | None, model: Model | None, source: Source | None) -> str:
    """The plan of a run. `cost`, `model` and `source` are None where the model or the data are missing."""
    ours = config.seppo
    clips = ours.model.motion_adapter is not None or source is not None and source.kind == "video"
    video = clips if model is None else model.video
    row_bytes = None if model is None else cache_bytes(model, config)
    rows = None if source is None else source.count
    streamed = _streams(source, ours.data, video)
    if cost is not None and model is not None:
        cost = with_data(cost, ours.data, model, source)
    method = METHODS[ours.method]
    updates = ours.updates
    kept = ours.sampler.samples_per_iteration
    samples = (ours.iterations * kept if kept else updates * batch.size) if method.draws else 0
    lines = {
        "method": ours.method + (f", reference {ours.reference}, flipper {ours.flipper}, beta {_beta(ours)}, noise"
                                 f" {ours.noise}" if ours.flipper else "")
                  + (f", signs of {ours.aaf_draws} noises" if ours.aaf_draws > 1 else "")
                  + (f", SFT weight {ours.sft_weight:g}" if ours.sft_weight else "") + _tasks(ours),
        "model": f"{ours.model.path}{f' with {ours.model.motion_adapter}' * bool(ours.model.motion_adapter)}{_size(cost)}, "
                 + _trained(ours.model, model) + (f", from the policy {ours.model.start_from}" if ours.model.start_from else ""),
        "data": f"{ours.data.source or 'not set'} at {ours.data.resolution} pixels"
                + (f", {ours.data.video.frames} frames ({ours.data.video.choice})" if video else "")
                + (f", {rows} demonstrations" if rows is not None else ""),
        **_first_rows(config, model, source),
        "latent cache": STREAMED if streamed else _cache(config, row_bytes, rows),
        "prompt embeddings": of_prompts(ours.data, model, rows),
        "effective batch": f"{batch.size} pairs = {batch.micro} a rank x {batch.accumulation} accumulated x {batch.world}"
                           f" rank{'s' * (batch.world > 1)}",
        "precision": _precision(config),
        "updates": f"{updates} = {ours.iterations} iterations x {ours.updates_per_iteration}",
        "learning rate": _learning_rate(config),
        "checkpoints": f"every {ours.checkpoint.every or ours.updates_per_iteration} updates, the last"
                       f" {ours.checkpoint.keep_last} kept",
    }
    if ours.evaluation.draws:
        lines["evaluation"] = _evaluation(ours.evaluation)
    if ours.data.hold_out is not None:
        lines["held out"] = _held_out(ours, rows)
    if samples:
        size = "a size that is measured" if ours.sampler.batch_size == "auto" else ours.sampler.batch_size
        each = f"{kept} an iteration, used {updates * batch.size / samples:.3g} times" if kept else f"{batch.size} an update"
        if (unused := (kept or 0) - ours.updates_per_iteration * batch.size) > 0:
            each = f"{kept} an iteration, of which {unused} are never used"
        lines["reference samples"] = f"{samples} in all, {each}, in batches of {size}; {_drawn(ours.sampler)}"
    if ours.shown is not ours.sampler:
        lines["grids, evaluations"] = f"the policy by itself; {_drawn(ours.shown)}"
    if method.winners == "improvement":
        lines["winners"] = (f"as many, made of the reference samples by {ours.improvement.path}, guidance"
                            f" {ours.improvement.guidance_scale:g}, image guidance {ours.improvement.image_guidance_scale:g}"
                            + (", in host memory while the policy is trained" if ours.improvement.offload else ""))
    if samples and kept and model is not None:
        tensors = 2 if method.winners == "improvement" else 1
        lines["sample store"] = (f"{gb(4 * tensors * kept * prod(latent_shape(model, ours.data)))} an iteration, in"
                                 f" {ours.output_dir}/rollouts; kept as long as a checkpoint of the iteration")
    if ours.reference_model.path is not None:
        lines["reference"] = f"{ours.reference_model.path}, in place of the initial policy"
    if method.references:
        size = "" if cost is None else f", {gb(cost.trained * pool_dtype(config).itemsize)} each"
        kept = f"{ours.pool.host_memory_gb:g} GB of host memory, the rest on disk"
        lines["pool"] = f"{ours.iterations + 1} past policies at the end{size}; {kept}"
    if cost is not None and model is not None:
        lines["disk"] = (f"{in_words(parts_of(config, batch, cost, model))}; in {ours.output_dir}"
                         f" ({gb(free(Path(ours.output_dir)))} free, quotas apart)")
    if cost:
        lines["compute"] = (f"{cost.forward / 1e12:.3g} TFLOP a forward, {cost.pair / 1e12:.3g} a pair,"
                            f" {cost.sampling_share:.0%} of it for reference samples"
                            + (f" and their winners ({cost.sample / 1e12:.3g} and {cost.improved / 1e12:.3g} TFLOP each)"
                               if cost.improved else ""))
        lines["memory a rank"], lines["of it"] = _memory(config, cost)
        if cost.embeds:
            lines["host memory"] = f"{gb(cost.encoders.text)} a rank for the text encoders, while they rest"
    for number, line in enumerate(advice(config, batch, cost), 1):
        lines[f"advice {number}"] = line
    width = max(map(len, lines))
    return "\n".join([f"seppo_fast {__version__}: the plan", *(f"  {k:<{width}}  {v}" for k, v in lines.items())])


def advice(config: Config, batch: Batch, cost: Cost | None) -> list[str]:
    """Settings of DeepSpeed that cost more than they need to, as read in its source (0.19); those of one rank are tested."""
    raw = engine_config(config, batch)
    dtype, stage = precision(raw).dtype, int(raw.get("zero_optimization", {}).get("stage", 0))
    offload = (raw.get("zero_optimization", {}).get("offload_optimizer") or {}).get("device", "none") != "none"
    lines = []
    if stage >= 2 and batch.world > 1 and batch.accumulation > 1:
        size = "" if cost is None else f" ({gb(cost.trained * dtype.itemsize)})"
        lines.append(f"zero_optimization.stage {stage} reduces the gradients{size} between the ranks in each of the"
                     f" {batch.accumulation} micro-batches of an update; stage 1 does so once")
    if dtype.itemsize < 4 and batch.accumulation > 1 and raw.get("data_types", {}).get("grad_accum_dtype") != "fp32":
        lines.append(f"gradients of {batch.accumulation} micro-batches are summed in {str(dtype).removeprefix('torch.')};"
                     " data_types.grad_accum_dtype fp32 sums them exactly, for more memory")
    if uses_bf16_optimizer(raw):
        if raw.get("communication_data_type") != "fp32":
            lines.append("the fp32 gradient sums are rounded to bf16 before they are reduced, on one rank too; not so with"
                         ' "communication_data_type": "fp32"')
        if not raw["bf16"].get("immediate_grad_update"):
            size = "" if cost is None else f" of {gb(2 * cost.trained)}"
            lines.append("gradients are kept in bf16 beside their fp32 sums; bf16.immediate_grad_update true saves that"
                         f" copy{size}")
    if config.seppo.model.quantize in ("int8", "fp8") and not config.seppo.model.gradient_checkpointing:
        lines.append(f"{config.seppo.model.quantize} weights stay in {str(dtype).removeprefix('torch.')} from forward to backward,"
                     " as large as without quantization; with seppo.model.gradient_checkpointing true those of one block at a time")
    if adam_temporaries(raw) and not offload:
        size = "" if cost is None else f" {gb(adam_temporaries(raw) * cost.trained // (batch.world if stage else 1))}"
        lines.append(f"optimizer.params.fused true saves{size or ' memory'} at the optimizer's update, and many launches")
    return lines


def _precision(config: Config) -> str:
    """The dtypes of policy, reference, past policies, VAE and cache."""
    dtype, autocast = precision(config.deepspeed)
    name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    whose = "policy and reference" if METHODS[config.seppo.method].references else "policy"
    runs = f", run under autocast in {name[autocast]}" if autocast else ""
    text = f" (text in {config.seppo.model.quantize_text})" if config.seppo.model.quantize_text else ""
    pool = f", past policies kept in {name[pool_dtype(config)]}" if METHODS[config.seppo.method].references else ""
    return f"{whose} in {name[dtype]}{runs}{pool}; VAE and text encoder in fp32{text}, the cache in {config.seppo.data.cache_dtype}"


def _drawn(settings: Sampler) -> str:
    """How samples are drawn."""
    spaced = f", {settings.spacing} spacing" if settings.spacing else ""
    text = f"{settings.solver}, {settings.steps} steps{spaced}, guidance {settings.guidance_scale:g}"
    if "guidance_interval" in settings.limits:
        low, high = settings.guidance_interval
        text += f" at noise levels from {low:g} to {high:g}"
    if settings.unconditional_every > 1:
        text += f", the branch without the prompt every {settings.unconditional_every} steps"
    scaled = f" x {settings.adapter_scale:g}" if settings.adapter_scale != 1 else ""
    return text + (f", with the adapter {settings.adapter}{scaled}" if settings.adapter else "")


def _beta(ours: Seppo) -> str:
    return f"{ours.beta:g}" if ours.beta != "auto" else f"auto ({PRODUCT} / median |margin|, {FIRST:g} at first)"


def _tasks(ours: Seppo) -> str:
    """The shares of the improvement model's tasks, where that is trained."""
    if ours.method != "improvement":
        return ""
    return ", tasks " + ", ".join(f"{name} {share:g}" for name, share in ours.improvement.tasks.model_dump().items())


def _trained(settings: ModelSettings, model: Model | None) -> str:
    motion = settings.motion_adapter is not None or isinstance(model, AnimateDiff)
    if settings.lora is None:
        return "the motion modules" if motion else "all weights"
    base = f" over weights in {settings.quantize}" if settings.quantize else ""
    return f"LoRA rank {settings.lora.rank}" + (f" on the {settings.lora.layers or 'temporal'} layers" if motion else "") + base


def _evaluation(asked: Evaluation) -> str:
    """What is scored, when, and what the scores decide."""
    prompts = asked.prompts if isinstance(asked.prompts, str) else f"{len(asked.prompts)} prompts"
    apart = "not in time below, nor are the networks that score in memory"
    return f"{', '.join(asked.scores)} of {prompts} every {asked.every} updates{_watched(asked)}; {apart}"


def _held_out(ours: Seppo, rows: int | None) -> str:
    """How many demonstrations are held out, and what is measured on them, when."""
    wanted, asked = ours.data.hold_out, ours.evaluation
    share = f"{100 * wanted:g}% of the" if isinstance(wanted, float) else f"{wanted}"
    count = share if rows is None else f"{len(split(rows, wanted, ours.seed)[1])} of {rows}"
    ends = ("" if asked.draws else _watched(asked)) + ("; not in time below" if rows is None else "; in time below")
    return f"{count} demonstrations, never trained on; {', '.join(ours.held_out_measures)} every {asked.every} updates{ends}"


def _watched(asked: Evaluation) -> str:
    """What the values of the watched measure decide."""
    ends = f"; ends after {asked.patience} without a better {asked.watched}" if asked.patience else ""
    return ends + (f"; the checkpoint of the best {asked.watched} stays" if asked.keep_best else "")


def _memory(config: Config, cost: Cost) -> tuple[str, str]:
    """The memory a rank needs, and what it is made of."""
    peaks = ", ".join(f"{name} {gb(size)}" for name, size in cost.peaks.items())
    graph = f", and {gb(cost.kept_graphs)} stay with the sampler's CUDA graph" if cost.kept_graphs else ""
    bucket = f", buckets {gb(cost.bucket)}" if cost.bucket else ""
    sampler = f", sampler {gb(cost.sampler)}" if cost.sampler else ""
    if config.seppo.sampler.batch_size == "auto" and cost.sampler:
        sampler += " a sample, of which batch_size auto takes as many as pay and fit"
    if cost.improver:
        sampler += f", improvement model {gb(cost.improver)} and its sampler {gb(cost.improving)}"
        sampler += " while it samples" * cost.offloads_improver
    offloads = " while it samples" if cost.offloads else " of its blocks" if config.seppo.reference_offload == "blocks" else ""
    encoders = f", VAE {gb(cost.encoders.vae)}, text encoders {gb(cost.encoders.text)} while they encode"
    parts = (f"weights {gb(cost.weights)}, reference {gb(cost.reference)}{offloads}, optimizer {gb(cost.optimizer)}, gradients"
             f" {gb(cost.gradients)}{bucket}, activations {gb(cost.activations)}{sampler}{encoders}")
    return f"about {gb(cost.reserved)}; peaks: {peaks}{graph}", f"{parts}; not kernels' workspaces, nor the allocator's slack"


def _first_rows(config: Config, model: Model | None, source: Source | None) -> dict[str, str]:
    """How many of the first captions are longer than the text encoder can see, and how many pictures are very small."""
    if source is None:
        return {}
    captions, sizes, lines = [], {}, {}
    for row in islice((row for part in source.parts for row in part.rows() if isinstance(row, Row)), LOOKED_AT):
        captions.append(row.prompt)
        for name, image in ((row.key, row.image), (f"the loser of {row.key}", row.loser)) if source.kind != "video" else ():
            if image is not None and (size := size_of(image)) is not None:
                sizes[name] = size
    if model is not None and model.directory.weights and captions:
        count, limit = token_counter(model)
        if cut := cut_off(list(zip(captions, count(captions), strict=True)), limit):
            lines["captions"] = f"of the first {len(captions)} {cut}"
    if small := enlarged(sizes, config.seppo.data.resolution):
        lines["pictures"] = f"of the first {small}" if len(captions) == LOOKED_AT else small
    return lines


def _cache(config: Config, row_bytes: int | None, rows: int | None) -> str:
    root = cache_root(config.seppo.data)
    size = "" if row_bytes is None or rows is None else f"about {gb(row_bytes * rows)}, "
    return f"{size}in {root} ({gb(free(root))} free)"


def with_data(cost: Cost, data: Data, model: Model, source: Source | None) -> Cost:
    """The cost with what the demonstrations decide: whether prompts are embedded, and clips encoded, while it trains."""
    return replace(cost, streams=_streams(source, data, model.video),
                   embeds=_embeds(data, model, None if source is None else source.count))


def _streams(source: Source | None, data: Data, video: bool) -> bool:
    """Whether clips are encoded while it trains, as far as it is known without the demonstrations."""
    if source is not None:
        return streams(source, data, video)
    drawn_anew = data.cache_latents == "auto" and not is_fixed(data.video, all_time_lapse=True)
    return video and (data.cache_latents is False or drawn_anew)


def _embeds(data: Data, model: Model, rows: int | None) -> bool:
    """Whether prompts are embedded while it trains; not where that depends on how many there are, which is not known."""
    known = 0 if rows is None else rows + 1
    return not keeps_prompts(model, data, known)


def of_prompts(data: Data, model: Model | None, rows: int | None) -> str:
    """How large the prompts' embeddings are, as far as it is known, and where they are."""
    size = "" if model is None else f"{gb(prompt_bytes(model, data))} each different prompt, "
    cached, embeds = "beside the latents", "embedded when they are needed, by text encoders that rest in host memory"
    if data.cache_prompts != "auto":
        return size + (cached if data.cache_prompts else embeds)
    if model is not None and rows is not None and keeps_prompts(model, data, rows + 1):
        return f"{size}at most {gb((rows + 1) * prompt_bytes(model, data))}, {cached}"
    return f"{size}{cached} up to {gb(LARGEST_CACHE)} in all, otherwise {embeds}"


def _learning_rate(config: Config) -> str:
    optimizer, scheduler = config.deepspeed["optimizer"], config.deepspeed.get("scheduler", {})
    params = scheduler.get("params", {})
    rate = params.get("warmup_max_lr", optimizer["params"]["lr"])
    warm_up = params.get("warmup_num_steps", 0)
    schedule = f"schedule {scheduler.get('type', 'constant')}, warm-up {warm_up} updates"
    return f"{rate:g} as it is, not scaled by the batch ({optimizer['type']}, {schedule})"


def _size(cost: Cost | None) -> str:
    return "" if cost is None else f", {_number(cost.parameters)} parameters ({_number(cost.trained)} trained)"


def _number(weights: int) -> str:
    return f"{weights / 1e9:.4g} B" if weights >= 1e10 else f"{weights / 1e6:.4g} M"
