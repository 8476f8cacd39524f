"""Whether a checkpoint can be gone on with here: the same run, and the same things are learned from the same data and models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seppo_fast.configfile import BATCH_KEYS, Batch, batch_plan, parse_config
from seppo_fast.errors import UserError
from seppo_fast.training import engine_state
from seppo_fast.training.checkpoint import State, anew, read_state
from seppo_fast.training.engine import zero_stage
from seppo_fast.training.marker import listed

# Keys that may change between a run and its resumption: they decide where and how often, never what is learned. Of the batch it is
# the pairs of an update that count (`same_batch`), and of a source and a model what is in their files (`check_data`,
# `check_models`).
FREE_KEYS = {*BATCH_KEYS, *"""seppo.output_dir seppo.iterations seppo.samples seppo.evaluation seppo.checkpoint seppo.max_nonfinite
    seppo.pool.host_memory_gb seppo.data.source seppo.data.cache_dir seppo.data.cache_prompts seppo.data.workers
    seppo.data.encode_batch_size seppo.data.max_skipped seppo.data.allow_outside seppo.data.video.folder seppo.sampler.batch_size
    seppo.sampler.window seppo.sampler.cuda_graph seppo.sampler.compile seppo.sampler.fuse_projections seppo.improvement.offload
    seppo.model.path seppo.model.motion_adapter seppo.model.revision seppo.model.variant seppo.model.start_from
    seppo.improvement.path seppo.improvement.revision seppo.improvement.variant seppo.reference_model.path
    seppo.reference_model.revision seppo.reference_model.variant seppo.sampler.adapter
    seppo.reference_offload seppo.model.gradient_checkpointing seppo.model.vae_slicing tensorboard wandb csv_monitor comet
    comms_logger flops_profiler steps_per_print wall_clock_breakdown memory_breakdown dump_state timers log_level aio
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer""".split()}
# The same in `zero_optimization`; others, such as quantized gradients, change what is learned.
FREE_ZERO = {*"""stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce allgather_partitions
    allgather_bucket_size overlap_comm load_from_fp32_weights elastic_checkpoint offload_param offload_optimizer sub_group_size
    cpu_offload_param cpu_offload_use_pin_memory cpu_offload ignore_unused_parameters legacy_stage1 round_robin_gradients
    parameter_alignment zero_hpz_partition_size memory_efficient_linear pipeline_loading_checkpoint override_module_apply
    log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory leaf_module prefetch_bucket_size
    param_persistence_threshold model_persistence_threshold max_live_parameters max_reuse_distance module_granularity_threshold
    gather_16bit_weights_on_model_save gather_fp16_weights_on_model_save use_all_reduce_for_fetch_params
    allgather_sequential""".split()}


def state_of(path: Path, run_id: str, batch: Batch, config: dict[str, Any]) -> State:
    """A checkpoint's state, checked to be of this run and of a configuration that learns the same."""
    try:
        state, files = read_state(path), listed(path)
    except ValueError as error:
        raise UserError(f"{path}: {error}; {engine_state.INSTEAD}") from None
    if state.run_id != run_id:
        raise UserError(f"{path} was written by another run, whose past policies are not in this run's pool. Resume with the"
                        f" output_dir of the run that wrote it; {anew(path)}")
    if engine_state.ENGINE not in files:
        raise UserError(f"{path} was written by an earlier version of this program, with files that depend on the number of ranks"
                        f" (deepspeed/): this version cannot go on with it; {anew(path)}")
    try:
        then = parse_config(state.config)  # with the defaults of keys that came later
        size = batch_plan(then.deepspeed, state.world).size
    except UserError as error:
        raise UserError(f"{path} was written by another version of this program: in its state.json, {error}") from None
    differing = [] if size == batch.size else [f"pairs of an update: {size} there, {batch.size} now"]
    differing += [f"{key}: {old!r} there, {new!r} now" for key, old, new in _differences(fixed(then.as_dict()), fixed(config))]
    if not differing and str(config["optimizer"]["type"]).lower() == "lamb":
        cuts, cuts_now = ((zero_stage(raw) and (world, zero_stage(raw))) for world, raw in ((state.world, then.deepspeed),
                                                                                            (batch.world, config)))
        differing = [] if cuts == cuts_now else ["ranks or ZeRO stage: LAMB scales by its norm what ZeRO gives to a rank"]
    if differing:
        raise UserError(f"{path} was written with another configuration; use that one's values; {anew(path)}. What differs:\n  "
                        + "\n  ".join(differing))
    return state


def moved(state: State, batch: Batch, config: Mapping[str, Any]) -> str | None:
    """Says how the run is laid out otherwise than when the checkpoint was written; None where it is not."""
    then, now = ((world, zero_stage(raw), _offloads(raw), batch_plan(raw, world))
                 for world, raw in ((state.world, state.config), (batch.world, config)))
    if then == now:
        return None
    words = [f"{world} rank{'s' * (world > 1)} at ZeRO stage {stage}{offloads}, {plan.accumulation} x {plan.micro} pairs each"
             for world, stage, offloads, plan in (then, now)]
    return f"the checkpoint was written by {words[0]}; going on with {words[1]}"


def _offloads(config: Mapping[str, Any]) -> str:
    zero = config.get("zero_optimization", {})
    parts = [name for name in ("optimizer", "param") if (zero.get(f"offload_{name}") or {}).get("device", "none") != "none"]
    return f" with {' and '.join(parts)} offloaded" if parts else ""


def fixed(config: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """A configuration without the keys that may change between a run and its resumption, and without empty sections."""
    kept: dict[str, Any] = {}
    for key, value in config.items():
        if path + key in FREE_KEYS:
            continue
        if path + key == "zero_optimization":  # false is the default of all that is not free
            value = {name: item for name, item in value.items() if name.removeprefix("stage3_") not in FREE_ZERO and item}
        if isinstance(value, dict):
            value = fixed(value, f"{path}{key}.")
            if not value:
                continue
        kept[key] = value
    return kept


def check_models(path: Path, state: State, models: dict[str, str]) -> None:
    """Check that models and adapters have the weights with which the checkpoint was trained, wherever they are now."""
    for key in sorted(state.models.keys() | models.keys()):
        if key not in models:
            raise UserError(f"{path} was trained with {key}, which is not given now: give it; {anew(path)}")
        if key not in state.models:
            raise UserError(f"{path} was trained without {key}: leave it out; {anew(path)}")
        if models[key] != state.models[key]:
            raise UserError(f"{path} was trained with other weights than those that {key} has now: put that model back;"
                            f" {anew(path)}")


def check_data(path: Path, state: State, data: str, content: str | None) -> None:
    """Check that the checkpoint was trained on what the cache holds: by its `content`, else by its fingerprint `data`."""
    same = state.data == data if None in (content, state.content) else state.content == content
    if not same:
        raise UserError(f"{path} was trained on other data or another model's latents (cache {state.data}, now {data}):"
                        f" restore seppo.data.source and seppo.model.path; {anew(path)}")


def _differences(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))]
    return [] if old == new else [(path, old, new)]
