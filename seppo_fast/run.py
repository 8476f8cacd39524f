"""A run from its configuration to `final/`: makes what Algorithm 1 needs, trains, and exports the model."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed.monitor.csv_monitor import csvMonitor
from torch import Tensor

from seppo_fast.config import METHODS, Seppo
from seppo_fast.configfile import Batch, Config, batch_plan, parse_config
from seppo_fast.data import ClipStream, LatentCache
from seppo_fast.data.cache import build_cache
from seppo_fast.data.fingerprint import cache_root, latent_shape
from seppo_fast.data.memory import give_back_memory
from seppo_fast.data.order import split
from seppo_fast.data.sources import Source, open_source
from seppo_fast.disk import complete_or_not
from seppo_fast.errors import UserError
from seppo_fast.evaluation.request import Request
from seppo_fast.machine import cores, too_many_threads
from seppo_fast.models import Model, open_model
from seppo_fast.models.engines import same_with_gradients
from seppo_fast.models.improvement import improvement_model, reference_model
from seppo_fast.models.lora import share_frozen, trains_a_part
from seppo_fast.models.vae_memory import VaeMemory, with_vae_memory
from seppo_fast.nodes import SHARED, check_same, check_shared, in_turn, sizes
from seppo_fast.planning import disk
from seppo_fast.planning.cost import estimate
from seppo_fast.planning.plan import plan
from seppo_fast.ranks import Ranks
from seppo_fast.reference.blocks import offload_blocks
from seppo_fast.reference.guidance import guided
from seppo_fast.reference.network import Reference
from seppo_fast.reference.pool import Pool
from seppo_fast.reference.solver import rollout_table
from seppo_fast.sampling import DRAWN
from seppo_fast.signals import StopSignals
from seppo_fast.training import checkpoint, csv_files, resumption, start, status
from seppo_fast.training.adapter import KEY as ADAPTER
from seppo_fast.training.adapter import read as read_adapter
from seppo_fast.training.checkpoint import State
from seppo_fast.training.contents import files_of, sums_of
from seppo_fast.training.engine import check_engine_config, pool_dtype, precision, start_engine, unsupported
from seppo_fast.training.export import export
from seppo_fast.training.folder import RunFolder, alone_in, open_folder
from seppo_fast.training.held_out import open_held_out
from seppo_fast.training.improving import grids_of_pairs, open_improver
from seppo_fast.training.looks import Looks
from seppo_fast.training.metrics import keep_rows
from seppo_fast.training.networks import check_network, fill_pool, hold, load_policies, loss_backend, open_sampler, open_shown
from seppo_fast.training.noise import noise_process
from seppo_fast.training.objective import Objective
from seppo_fast.training.one_graph import with_whole_networks
from seppo_fast.training.pairs import PairSource
from seppo_fast.training.past import check_past
from seppo_fast.training.reporter import Reporter
from seppo_fast.training.rollouts import open_rollouts, owns
from seppo_fast.training.samples import PROMPTS, Grids
from seppo_fast.training.trainer import Trainer
from seppo_fast.training.validation import Validation, check_scores, open_validation, request_of


def run(config: Config, resume: str | None, ranks: Ranks, signals: StopSignals,
        make_trainer: Callable[..., Trainer] = Trainer, progress: status.Status | None = None) -> Path:
    """Train from `config`, alone in its run folder, and return the folder of the trained model; every rank calls."""
    progress = progress or status.Status()
    with alone_in(Path(config.seppo.output_dir), ranks), status.reported(progress):
        check_shared({"seppo.output_dir": Path(config.seppo.output_dir), "seppo.data.cache_dir": cache_root(config.seppo.data)},
                     ranks)
        return trained(config, resume, ranks, signals, make_trainer, progress)


def trained(config: Config, resume: str | None, ranks: Ranks, signals: StopSignals, make_trainer: Callable[..., Trainer],
            progress: status.Status) -> Path:
    """The folder of the trained model."""
    ours = config.seppo
    batch = batch_plan(config.deepspeed, ranks.world)
    check_engine_config(config, batch)
    if lacking := unsupported(config):
        raise UserError(lacking)
    if ranks.device.type == "cpu" and (hint := too_many_threads(ranks.local_world, torch.get_num_threads(), cores())):
        ranks.say(hint)
    model, improvement, fixed, source = open_inputs(config, ranks)
    check_network(model, config)
    request = open_request(config, model, ranks)
    latents = latent_shape(model, ours.data)
    table = rollout_table(model, ours.sampler, latents)
    adapter = read_adapter(ours, model)
    process = noise_process(model.scheduler_config, ours.timesteps, model.time_shift(latents))
    denoise, _ = guided(model, ours.sampler.guidance_scale, ())
    cost = estimate(model, config, batch, adapter)
    if ranks.rank == 0:
        print(plan(config, batch, cost, model, source), flush=True)
    folder = open_folder(config, resume, ranks)
    files = files_of(model, [improvement, fixed]) | ({} if adapter is None else {ADAPTER: [adapter.file]})
    state = starting_state(folder, config, batch, files, ranks)
    if folder.resume_from:
        check_past(config, folder.path, state, ranks)
    started: dict[str, Tensor] = {}
    if ours.model.start_from and folder.resume_from is None:
        started, state.started_from = start.read(ours.model.start_from, model, ours.model, ours.seed)
    if ranks.rank == 0:
        status.begin(progress, folder.path, ours.updates, ours.updates_per_iteration, folder.resume_from, state.update)
    parts = disk.parts_of(config, batch, cost, model)
    cache = build_cache(source, model, ours.data, seed=ours.seed, needs_loser=METHODS[ours.method].needs_losers,
                        rank=ranks.rank, world=ranks.world, device=ranks.device, barrier=ranks.barrier,
                        progress=ranks.rank == 0, output_dir=folder.path, agree=partial(check_source, ours, ranks),
                        room=partial(disk.check, folder.path, disk.left_of(parts, folder.path, ours.updates - state.update)))
    trained_on, held = split(len(cache), ours.data.hold_out, ours.seed)
    begin(folder, state, cache, ranks)
    usable = "preference pairs" if METHODS[ours.method].needs_losers else "demonstrations"
    ranks.say(f"{len(cache)} {usable} are usable" + (f", of which {len(held)} are held out" if held else ""))

    # Text encoders embed the prompts of grids and evaluations before the networks are there, beside which they might not fit.
    grids = prepare_grids(model, config, cache, folder, ranks)
    validation = prepare_validation(request, model, cache.shape, precision(config.deepspeed).dtype, ranks)
    policy, second = load_policies(model, config, cache.shape[1:], ranks)
    if started:
        start.put_into(policy, started)
        del started
    engine = start_engine(policy, config, batch)
    shares = trains_a_part(engine.module)
    if second is not None:
        share_frozen(second, engine.module)  # before it moves: its own base need not fit beside the policy's
        if ours.reference_offload == "blocks":
            offload_blocks(second, ranks.device)
        else:
            second.to(ranks.device)
    objective = Objective(denoise, process, ours.flipper, *precision(config.deepspeed), compiled=ours.model.compile != "none",
                          sft_weight=ours.sft_weight)
    if objective.flipper:
        ranks.say(f"loss: {loss_backend(ranks.device)}")
    pairs = PairSource(cache, ours, model.latent_scale, objective.process, ranks.device, objective.dtype, trained_on)
    pool = Pool(folder.path / "pool", pool_dtype(config), int(ours.pool.host_memory_gb * 1e9 / ranks.local_world), state.pool)
    reference = None
    # The sampler keeps to the attention that it is made under. What compiled blocks chose once is used again for what is scored.
    with same_with_gradients() if objective.compiled else nullcontext():
        if second is not None:
            sampler, size = open_sampler(model, config, batch, objective, second, table, pairs, adapter, ranks)
            shown = open_shown(model, config, objective, second, pairs, sampler, ranks)
            reference = Reference(sampler, shown, size, pool, offloaded=ours.moves_reference and not shares,
                                  fixed=None if fixed is None else hold(fixed, config, folder, ranks))
        improver = None
        if improvement is not None:
            improver = open_improver(improvement, ours, objective, table, pairs, size, ranks)
        if ours.model.compile == "full":
            objective = with_whole_networks(objective, engine.module, second, pairs.blank(batch.micro), ranks.say)
    rollouts = checkpoint.load(folder.resume_from, engine, partial(owns, batch, ranks.rank)) if folder.resume_from else {}
    if (monitor := engine.monitor.csv_monitor) is not None:  # on rank 0
        continue_csv(monitor, state, engine.global_samples, resumed=resume is not None)
    if ours.reference is not None:
        fill_pool(pool, engine, state.update // ours.updates_per_iteration if folder.resume_from else None, ranks)
    reporter = Reporter(folder.path, ours.updates, state.update, engine.monitor, ranks.rank, progress)
    looks = None
    if reference is not None and ours.looks:
        looks = Looks(ours, ranks, engine, reference, grids, validation,
                      open_held_out(pairs, held, ours, objective, batch.micro, ranks) if held else None, reporter, signals, state)
    trainer = make_trainer(settings=ours, batch=batch, ranks=ranks, engine=engine, objective=objective, pairs=pairs,
                           reference=reference, improver=improver, looks=looks, reporter=reporter, signals=signals,
                           folder=folder.path, state=state,
                           rollouts=open_rollouts(rollouts, config, batch, folder, state, pool, ranks),
                           room=disk.watched(folder.path, parts))
    status.train(progress, folder.path / "metrics.jsonl")
    try:
        with same_with_gradients():
            trainer.train()
        trainer.remove_old_checkpoints()
    finally:
        trainer.reporter.close()
        cache.close()
    progress.state = "exporting"
    status.write(progress)
    return export(model, config, batch, trainer, len(trained_on))


def check_source(ours: Seppo, ranks: Ranks, names: str) -> None:
    """Refuse demonstrations whose digest of names, sizes and times is not the same on all machines; every rank calls."""
    check_same(f"seppo.data.source {ours.data.source}", {"digest of the files' names, sizes and times of change": names}, ranks,
               f"{SHARED}; a copy on each machine must have the same times, too (rsync -a, cp -p)")


def open_inputs(config: Config, ranks: Ranks) -> tuple[Model, Model | None, Model | None, Source]:
    """The model, the improvement model, the reference model and the demonstrations, checked but not loaded.

    A hub id is fetched by rank 0 first.
    """
    ours = config.seppo

    def opened() -> tuple[Model, Model | None, Model | None, Source]:
        improvement = fixed = None
        model = open_model(ours.model.path, revision=ours.model.revision, variant=ours.model.variant,
                           motion_adapter=ours.model.motion_adapter, frames=ours.data.video.frames,
                           image_condition=ours.method == "improvement", quantize_text=ours.model.quantize_text)
        with_vae_memory(model, VaeMemory(ours.model.vae_tiling, ours.model.vae_slicing))
        if ours.improvement.path is not None:
            improvement = improvement_model(ours.improvement, model, ranks.device)
        if ours.reference_model.path is not None:
            fixed = reference_model(ours.reference_model, model, ranks.device)
        source = open_source(ours.data, needs_loser=METHODS[ours.method].needs_losers, seed=ours.seed,
                             video=model.video, method=ours.method)
        return model, improvement, fixed, source

    found = in_turn(ranks, opened)
    for each in found[:3]:
        if each is not None:
            check_same(f"{each.directory.labels.path} {each.path}", sizes(each.path), ranks)
    return found


def starting_state(folder: RunFolder, config: Config, batch: Batch, files: dict[str, list[Path]], ranks: Ranks) -> State:
    """The state of the checkpoint, checked to be of this run and configuration; without a checkpoint, the one of update 0.

    `files` are those of the models, by the key that names them.
    """
    fresh = State(folder.run_id, ranks.world, data=None, config=config.as_dict())
    state = fresh
    if folder.resume_from:
        state = resumption.state_of(folder.resume_from, folder.run_id, batch, fresh.config)
    given, then = config.seppo.model.start_from, state.config["seppo"]["model"].get("start_from")
    if given is not None and (given != then or not folder.resume_from):
        files = files | {start.KEY: [start.find(given)]}
    found = sums_of(files, state.models, state.stamps) if ranks.rank == 0 else ({}, {})
    fresh.models, fresh.stamps = ranks.from_first(found)
    if folder.resume_from is None:
        return fresh
    if given is not None and given == then:  # what it began with is in the checkpoint: the file may be gone
        fresh.models |= {key: value for key, value in state.models.items() if key == start.KEY}
        fresh.stamps |= {key: value for key, value in state.stamps.items() if key == start.KEY}
    resumption.check_models(folder.resume_from, state, fresh.models)
    if line := resumption.moved(state, batch, fresh.config):
        ranks.say(line)
    if measured(parse_config(state.config)) != measured(config) and state.evaluated is not None:
        ranks.say("seppo.evaluation measures otherwise than before: the best policy is searched anew from the next one on")
        state.compare_anew()
    state.config, state.models, state.stamps, state.world = fresh.config, fresh.models, fresh.stamps, fresh.world
    return state


def measured(config: Config) -> dict[str, Any]:
    """What must be equal for values of two evaluations to be comparable."""
    section = config.seppo.evaluation
    asked = section.model_dump(exclude={"every", "patience", "keep_best", "batch_size", "watch"}) | {"watch": section.watched}
    return asked | (config.seppo.shown.model_dump(include=DRAWN) if section.draws else {})


def begin(folder: RunFolder, state: State, cache: LatentCache | ClipStream, ranks: Ranks) -> None:
    """Check that the checkpoint is of these data, remove what the run folder has of later updates, write config.json."""
    if folder.resume_from:
        resumption.check_data(folder.resume_from, state, cache.fingerprint, cache.content)
    state.data, state.content = cache.fingerprint, cache.content
    ranks.barrier()  # every rank has agreed to the checkpoint before anything in the folder changes
    if ranks.rank == 0:
        if folder.resume_from:
            checkpoint.set_aside_later(folder.resume_from)
        rows = folder.path / "metrics.jsonl"
        if bad := keep_rows(rows, state.update, -1 if state.evaluated is None else state.evaluated):
            print(f"{rows}: removed what was no row of this run (line {', '.join(map(str, bad))})", flush=True)
        with complete_or_not(folder.path / "config.json") as temporary:
            temporary.write_text(json.dumps(state.config, indent=2) + "\n")


def continue_csv(monitor: csvMonitor, state: State, samples: int, resumed: bool) -> None:
    """Make DeepSpeed's CSV files begin or continue as metrics.jsonl does."""
    if resumed:
        csv_files.go_on(monitor, state.update, -1 if state.evaluated is None else state.evaluated, samples)
    elif aside := csv_files.set_aside(monitor):
        print(f"csv_monitor: {monitor.log_dir} held the files of another run, which are renamed ({aside[0].name} ...)", flush=True)


def prepare_grids(model: Model, config: Config, cache: LatentCache | ClipStream, folder: RunFolder, ranks: Ranks) -> Grids | None:
    """What sample grids need, on rank 0, or None without grids. The prompts default to the data's first ones."""
    ours = config.seppo
    if not ours.samples.every or ranks.rank != 0:
        return None
    if ours.method == "improvement":
        return grids_of_pairs(model, ours, cache, folder.path / "samples", precision(config.deepspeed).dtype, ranks.device)
    prompts = ours.samples.prompts or cache.prompts.captions(range(min(PROMPTS, len(cache))))
    samples = ours.samples.model_copy(update={"prompts": prompts})
    embed = model.load_text(ranks.device)
    dtype = precision(config.deepspeed).dtype
    repeated = [prompt for prompt in prompts for _ in range(samples.per_prompt)]
    conditions = {name: value.to(dtype) for name, value in embed(repeated).items()}
    del embed
    give_back_memory()
    return Grids(folder.path / "samples", model, samples, conditions, cache.shape, ranks.device)


def open_request(config: Config, model: Model, ranks: Ranks) -> Request | None:
    """The request of the evaluations during training, checked, with the scores' weights found; None if no samples are scored."""
    if not config.seppo.evaluation.draws:
        return None
    request = request_of(config, model, ranks.say)
    check_scores(request, ranks)
    return request


def prepare_validation(request: Request | None, model: Model, shape: tuple[int, ...], dtype: torch.dtype, ranks: Ranks
                       ) -> Validation | None:
    """What scores the policy's samples during training, on every rank."""
    return None if request is None else open_validation(request, model, dtype, shape, ranks)
