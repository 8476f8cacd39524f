"""The networks of a run: the policy, the one beside it that draws and is compared with, and the past policies that it holds."""

from functools import partial

import torch
from deepspeed import DeepSpeedEngine
from torch import nn

from seppo_fast.config import METHODS
from seppo_fast.configfile import Batch, Config
from seppo_fast.errors import UserError
from seppo_fast.evaluation.adapters import Adapter
from seppo_fast.models import AnimateDiff, Model
from seppo_fast.models.lora import choose_trained, copy_beside
from seppo_fast.models.prepare import prepare_denoisers
from seppo_fast.models.quantize import quantize
from seppo_fast.models.trial import block_inputs, call_once
from seppo_fast.ops import available_backends
from seppo_fast.ranks import Ranks
from seppo_fast.reference.adapter import beside
from seppo_fast.reference.batching import free_memory
from seppo_fast.reference.calls import size_with
from seppo_fast.reference.guidance import guided
from seppo_fast.reference.pool import Pool
from seppo_fast.reference.sampler import Sampler
from seppo_fast.reference.solver import SolverTable, rollout_table
from seppo_fast.training.adapter import adapted_network
from seppo_fast.training.engine import policy_weights, pool_dtype, precision, zero_stage
from seppo_fast.training.folder import RunFolder
from seppo_fast.training.improving import half_of_memory, with_image
from seppo_fast.training.objective import Objective
from seppo_fast.training.pairs import PairSource


def check_network(model: Model, config: Config) -> None:
    """`UserError` for settings that the model's network does not go with, before anything is loaded or written."""
    ours, (dtype, _) = config.seppo, precision(config.deepspeed)
    if dtype != torch.float32 and dtype not in model.half:
        raise UserError(f"fp16.enabled: {model.path} is a {model.directory.index.get('_class_name', model.name)}, whose networks"
                        " overflow in fp16: they are trained in bf16. Enable bf16 in place of it")
    if ours.reference_offload == "blocks" and isinstance(model, AnimateDiff):
        raise UserError(f"seppo.reference_offload: of {model.path} only the motion modules are trained, and the reference shares"
                        " the policy's other weights, which are on the device anyway; leave it out")
    if dtype == torch.float16 and ours.model.quantize == "int8":
        raise UserError('seppo.model.quantize: "int8" overflows in fp16, because products are summed before they are scaled; enable'
                        ' bf16 in place of it, or take "nf4"')
    _, guidance = guided(model, ours.sampler.guidance_scale, ())
    if ours.sampler.limits and len(guidance) == 1:
        raise UserError(f"seppo.sampler.{ours.sampler.limits[0]}: {model.path} is guided by an input of its network, not by a"
                        " second call without the prompt that could be left out; leave the key out")
    if ours.sampler.adapter is not None and model.embeds_guidance and ours.sampler.guidance_scale == 1:
        raise UserError(f"seppo.sampler.guidance_scale: {model.path} is given the scale as an input, in training too, and an"
                        " adapter makes it 1 where none is given; give the adapter's own (of FLUX.1-Turbo-Alpha it is 3.5)")
    if model.denoiser == "transformer":
        if ours.model.attention == "xformers":
            raise UserError(f"seppo.model.attention: the transformer of {model.path} has no \"xformers\" attention here, but"
                            " PyTorch's alone; use \"auto\" or \"sdpa\"")
        if ours.sampler.fuse_projections:
            raise UserError(f"seppo.sampler.fuse_projections: the projections of the transformer of {model.path} cannot be fused"
                            " here, but a UNet's; set it to false")


def load_policies(model: Model, config: Config, latents: tuple[int, ...], ranks: Ranks) -> tuple[nn.Module, nn.Module | None]:
    """The policy, for the engine, and outside it a reference like it (for grids and scores, too), which shares what is frozen.

    Quantized weights are on the ranks' device already, all others in host memory.
    """
    ours = config.seppo
    dtype = precision(config.deepspeed).dtype
    torch.manual_seed(ours.seed + ranks.rank)
    policy = model.load_denoiser(dtype)
    if ours.model.quantize:
        quantize(policy, ours.model.quantize, ranks.device, dtype)
    choose_trained(policy.train(), ours.model.lora, ours.seed)
    if ours.model.gradient_checkpointing:  # of the reference too, which runs with gradients where it is compiled
        policy.enable_gradient_checkpointing()
    reference = None
    if ours.flipper or ours.looks:
        # ZeRO-3 leaves the policy's parameters empty where it has partitioned them
        reference = copy_beside(policy, shares=zero_stage(config.deepspeed) < 3).eval()
    prepare_denoisers([*filter(None, (policy, reference))], ours.networks, latents, precision(config.deepspeed).autocast or dtype,
                      ranks.device, ranks.say, ranks.largest,
                      inputs=partial(block_inputs, model.empty_denoiser, partial(call_once, model)))
    return policy, reference


def open_sampler(model: Model, config: Config, batch: Batch, objective: Objective, reference: nn.Module, table: SolverTable,
                 pairs: PairSource, adapter: Adapter | None, ranks: Ranks) -> tuple[Sampler, int]:
    """What draws rollouts from `reference`, and its batch size: the smallest of all ranks', as each step asks all for signals."""
    ours, empty = config.seppo, pairs.unconditional
    _, guidance = guided(model, ours.sampler.guidance_scale, empty)
    if ours.method == "improvement":
        empty, guidance = with_image(pairs, ours.improvement)
    adapted = [] if adapter is None else beside(reference, adapted_network(adapter, model), ranks.device, objective.dtype,
                                                ours.sampler.adapter_scale)
    sampler = Sampler(reference, objective.denoise, table.to(ranks.device), empty, guidance, ours.sampler, objective.dtype,
                      objective.autocast, ranks.say, adapted)
    updates = 1 if ours.sampler.window == "update" else ours.updates_per_iteration
    wanted = (ours.sampler.samples_per_iteration or updates * batch.size) // batch.world
    free = half_of_memory if METHODS[ours.method].winners == "improvement" else free_memory
    return sampler, sampler.fit(pairs.cache.shape, wanted, agree=lambda size: -ranks.largest(-size), free=free)


def open_shown(model: Model, config: Config, objective: Objective, reference: nn.Module, pairs: PairSource, sampler: Sampler,
               ranks: Ranks) -> Sampler:
    """What draws grids and evaluations from `reference`: the sampler of rollouts, unless these are to be drawn otherwise."""
    ours, empty = config.seppo, pairs.unconditional
    if ours.shown is ours.sampler:
        return sampler
    table = rollout_table(model, ours.shown, pairs.cache.shape, "seppo.samples.").to(ranks.device)
    # A network that is given its guidance as an input is trained with the sampler's, and shown with this one.
    denoise, guidance = guided(model, ours.shown.guidance_scale, empty, "seppo.samples.guidance_scale")
    if ours.method == "improvement":
        empty, guidance = with_image(pairs, ours.improvement)
    assert sampler.batch_size is not None, "the sampler of rollouts has not found its batch size"
    size = size_with(len(guidance), sampler.batch_size, len(sampler.guidance))
    settings = ours.shown.model_copy(update={"batch_size": size})
    return Sampler(reference, denoise, table, empty, guidance, settings, objective.dtype, objective.autocast, ranks.say)


def hold(fixed: Model, config: Config, folder: RunFolder, ranks: Ranks) -> Pool:
    """A pool of one policy, the reference model's, which stands for the initial one."""
    host_memory = int(config.seppo.pool.host_memory_gb * 1e9 / ranks.local_world)
    pool = Pool(folder.path / "reference_model", pool_dtype(config), host_memory)
    pool.add(0, dict(fixed.load_denoiser(precision(config.deepspeed).dtype).named_parameters()), write=ranks.rank == 0)
    ranks.barrier()
    return pool


def fill_pool(pool: Pool, engine: DeepSpeedEngine, last: int | None, ranks: Ranks) -> None:
    """The past policies up to the `last` one of a resumed run, the initial one of a new run."""
    if ranks.rank == 0:
        pool.truncate(-1 if last is None else last)
    if last is None:
        pool.add(0, policy_weights(engine), write=ranks.rank == 0)
    pool.checksums.update(ranks.from_first(pool.checksums))  # it wrote


def loss_backend(device: torch.device) -> str:
    """The loss backend for a device, and why the faster ones are not available."""
    lacking: list[str] = []
    for name, state in available_backends(device).items():
        if state == "available":
            return f"{name} backend" + (f" ({'; '.join(lacking)})" if lacking else "")
        lacking.append(f"no {name}: {state}")
    raise AssertionError("the reference runs everywhere")
