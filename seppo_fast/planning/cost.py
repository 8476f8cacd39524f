"""What a run costs before it runs: FLOPs and bytes, counted on the model's own graph without executing it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seppo_fast.config import METHODS, Sampler, Seppo
from seppo_fast.configfile import Batch, Config
from seppo_fast.data.fingerprint import latent_shape
from seppo_fast.evaluation.adapters import Adapter
from seppo_fast.models import Model, add_image_condition
from seppo_fast.models.layout import convolve_in_channels_last
from seppo_fast.models.lora import choose_trained, trainable_weights, trains_a_part
from seppo_fast.models.trial import blank_conditions, explained
from seppo_fast.planning.encoders import EncoderBytes, encoder_bytes, weight_bytes
from seppo_fast.planning.engine_bytes import TakenGradients, engine_bytes
from seppo_fast.planning.network_memory import inference, micro_batch
from seppo_fast.planning.quantized import as_quantized
from seppo_fast.reference.adapter import beside
from seppo_fast.reference.blocks import bytes_on_device
from seppo_fast.reference.calls import calls_of, evaluations, size_with
from seppo_fast.reference.guidance import double, guided
from seppo_fast.reference.solver import SolverTable, rollout_table
from seppo_fast.reference.tuning import changed
from seppo_fast.training.adapter import adapted_network
from seppo_fast.training.engine import precision, zero_stage
from seppo_fast.training.samples import PROMPTS as GRID_PROMPTS
from seppo_fast.training.zero_linear import linear_of


@dataclass(frozen=True)
class Cost:
    """Counts of one rank. Bytes are as PyTorch allocates them, kernels' workspaces apart."""

    parameters: int
    trained: int
    forward: float  # FLOPs of one network evaluation on one sample
    sample: float  # FLOPs of one sample of a past policy
    improved: float  # FLOPs of one sample of the improvement model
    per_pair: float  # samples that are drawn for a pair: less than one where they are used again
    training: float  # FLOPs of the policy's forward and backward on a pair, and its forwards under further noises
    scoring: float  # FLOPs of the reference's forwards on a pair
    weights: int
    reference: int
    optimizer: int
    gradients: int  # summed over the accumulation window
    bucket: int  # the buffer through which DeepSpeed reduces gradients, in backward
    activations: int  # of a micro-batch at its peak, without the bucket
    update: int  # what the optimizer's update needs in place of gradients, bucket and activations
    score: int  # of scoring the sampler's batch when it is sampled
    sampler: int  # of the sampler's batch at its peak; of one sample where the batch size is "auto"
    kept_gradients: int  # of the gradients' bytes, those that stay while the reference samples
    adapter: int  # the weights of the sampler's adapter
    improver: int  # the improvement model's weights
    improving: int  # of the improvement model's sampler at its peak
    offloads_improver: bool  # which leave the device while the policy is trained
    grid: int  # the VAE and the decoding of one of a sample grid's samples; 0 where no grid is made
    evaluation: int  # the VAE and the drawing or decoding of an evaluation's samples; 0 where nothing is evaluated
    encoders: EncoderBytes
    graph: bool  # a CUDA graph keeps the sampler's bytes from everything else
    offloads: bool  # reference and graph leave the device while the policy is trained
    embeds: bool = False  # prompts are embedded while it trains, by text encoders that rest in host memory
    streams: bool = False  # clips are encoded while it trains

    @property
    def standing(self) -> int:
        """Bytes that stay allocated from the first update to the last."""
        improver = 0 if self.offloads_improver else self.improver
        vae = self.encoders.vae if self.streams else 0
        return self.weights + self.optimizer + self.adapter + (0 if self.offloads else self.reference) + improver + vae

    @property
    def peaks(self) -> dict[str, int]:
        """The most that each phase of a run needs."""
        clips = self.encoders.encoding if self.streams else 0
        phases = {"micro-batch": self.gradients + self.bucket + self.activations + clips, "optimizer": self.update}
        # a graph has its own memory, beside that of another graph and of scoring
        ahead = (sum if self.graph else max)((self.sampler, self.improving, self.score))
        if ahead:
            phases["sampling"] = (self.kept_gradients + ahead + (self.reference if self.offloads else 0)
                                  + (self.improver if self.offloads_improver else 0))
        back = self.reference + self.sampler * self.graph  # the reference, and its graph
        here = self.kept_gradients + (back if self.offloads else 0)
        looks = {"sample grid": self.grid, "evaluation": self.evaluation}
        phases |= {name: here + size for name, size in looks.items() if size}
        if self.embeds:
            phases["prompts"] = self.kept_gradients + self.encoders.text + self.encoders.embedding
        alone = {"encoding": self.encoders.before_training}  # before any of the others is there
        return {name: self.standing + size for name, size in phases.items()} | alone

    @property
    def memory(self) -> int:
        """The most bytes that are allocated at once."""
        return max(self.peaks.values())

    @property
    def kept_graphs(self) -> int:
        """Bytes of captured graphs that stay on the device while the policy is trained."""
        kept = (0 if self.offloads else self.sampler) + (0 if self.offloads_improver else self.improving)
        return kept if self.graph else 0

    @property
    def reserved(self) -> int:
        """The bytes that the device must have: nothing else can use a captured graph's memory pool."""
        return max(size + (self.kept_graphs if name not in ("sampling", "encoding") else 0) for name, size in self.peaks.items())

    @property
    def sampling(self) -> float:
        """FLOPs of the samples that are drawn for a pair, on average."""
        return (self.sample + self.improved) * self.per_pair

    @property
    def pair(self) -> float:
        """FLOPs of a pair in all."""
        return self.sampling + self.training + self.scoring

    @property
    def sampling_share(self) -> float:
        """Share of the FLOPs that the samples take."""
        return self.sampling / self.pair


def estimate(model: Model, config: Config, batch: Batch, adapter: Adapter | None = None) -> Cost:
    """Cost of `config` with `model`, and with this adapter of the sampler."""
    ours = config.seppo
    dtype, autocast = precision(config.deepspeed)
    with torch.device("meta"):
        denoiser = nn.Module.to(model.empty_denoiser(), dtype)
        saved = as_quantized(denoiser, ours.model.quantize) if ours.model.quantize else 0
        choose_trained(denoiser, ours.model.lora, ours.seed)
    if ours.model.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    if ours.model.channels_last:
        convolve_in_channels_last(denoiser)
    denoiser.train()
    trainable = list(trainable_weights(denoiser).values())
    trained = sum(weight.numel() for weight in trainable)
    weights = network_bytes(denoiser) - saved
    method = METHODS[ours.method]
    halves = 2 if method.references else 1
    generated, improves = method.draws, method.winners == "improvement"
    denoise, guidance = guided(model, ours.sampler.guidance_scale, ())
    tripled = len(double(ours.improvement.guidance_scale, ours.improvement.image_guidance_scale, ()))
    branches = tripled if model.image_condition else len(guidance)
    table = rollout_table(model, ours.sampler, latent_shape(model, ours.data))
    steps = len(table.timesteps)
    evaluated = evaluations(calls_of(table.levels, len(guidance), ours.sampler), guidance)

    def inputs(samples: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return _inputs(model, latent_shape(model, ours.data), samples, dtype)

    one = inputs(1)
    with explained(model.directory, model.denoiser):
        forward = drawn = float(inference(lambda: denoise(denoiser, *one)).flops)
        adapted = [] if adapter is None else beside(denoiser, adapted_network(adapter, model), "meta", dtype)
        with changed(adapted):
            drawn = float(inference(lambda: denoise(denoiser, *one)).flops) if adapted else forward
    scoring = forward * halves if ours.flipper else 0.0

    engine = engine_bytes(config, batch, trained, max(weight.numel() for weight in trainable))
    taken = TakenGradients(engine)
    micro = inputs(halves * batch.micro)
    online = bool(ours.flipper) and ours.reference_score == "online"
    zero = config.deepspeed.get("zero_optimization", {})
    with linear_of(zero):
        meter = micro_batch(denoiser, lambda: denoise(denoiser, *micro), reference=online, gradient=taken, finish=taken.finish)
    training = meter.flops / batch.micro - (scoring if online else 0.0)
    more = forward * (ours.aaf_draws - 1)  # the winner under further noises, by policy and reference

    samples = 1 if ours.sampler.batch_size == "auto" else ours.sampler.batch_size
    if not generated and not ours.evaluation.draws:
        samples = min(samples, ours.samples.per_prompt * (len(ours.samples.prompts) or GRID_PROMPTS))
    otherwise = ours.shown is not ours.sampler
    draws = generated or ours.shows and not otherwise
    graph = draws and ours.sampler.cuda_graph and (ours.reference_offload == "none" or improves)  # the improvement model's stays

    def cast(size: int) -> int:
        """As autocast has it, which computes in half the bytes, and keeps a cast copy of the weights meanwhile."""
        return (size + weights) // 2 if autocast and size else size

    def drawing(settings: Sampler, table: SolverTable, branches: int, size: int) -> int:
        """The most bytes while a batch is drawn: the network's, its prompts', and in fp32 the loop's noises and outputs."""
        batch = inputs(branches * size)
        kept = branches - 1 if settings.unconditional_every > 1 else 0
        peak = inference(lambda: denoise(denoiser, *batch)).peak
        prompts = sum(value.nbytes for value in batch[2].values())
        return cast(peak) + prompts + 4 * (table.inputs.shape[1] + kept) * size * one[0].numel()

    with changed(adapted):
        sampler = drawing(ours.sampler, table, branches, samples) if draws else 0
    showing = 0
    if otherwise:
        other = rollout_table(model, ours.shown, latent_shape(model, ours.data), "seppo.samples.")
        _, shown_by = guided(model, ours.shown.guidance_scale, (), "seppo.samples.guidance_scale")
        calls_of(other.levels, len(shown_by), ours.shown)  # says so where no step lies in the interval
        shown_branches = tripled if model.image_condition else len(shown_by)
        showing = drawing(ours.shown, other, shown_branches, size_with(shown_branches, samples, branches))
    scored = inputs(halves * samples)
    ahead = bool(ours.flipper) and not online
    score = inference(lambda: denoise(denoiser, *scored)).peak if ahead else 0
    activations = meter.peak - engine.bucket

    improver = improving = 0
    if improves:  # of the policy's architecture, but for its first convolution
        improvement = add_image_condition(model)
        with torch.device("meta"):
            improver = network_bytes(nn.Module.to(improvement.empty_denoiser(), dtype))
        improving = drawing(ours.sampler, table, tripled, samples)
    encoders = encoder_bytes(model, ours)
    vae, decoding = encoders.vae, encoders.decoding

    stage = zero_stage(config.deepspeed)
    shares = trains_a_part(denoiser)
    return Cost(
        parameters=sum(weight.numel() for weight in denoiser.parameters()), trained=trained, forward=forward,
        sample=drawn * evaluated if generated else 0.0, improved=forward * tripled * steps if improves else 0.0,
        per_pair=samples_of_a_pair(ours, batch), training=training + more, scoring=scoring + more,
        improver=improver, improving=improving, offloads_improver=ours.improvement.offload,
        adapter=0 if adapter is None else sum(value.numel() for value in adapter.tensors.values()) * dtype.itemsize,
        weights=weights + (weights // batch.world if stage == 3 else 0),  # gathered, and this rank's shard
        reference=reference_bytes(ours, denoiser, shares and stage < 3),
        optimizer=engine.optimizer, gradients=engine.gradients, bucket=engine.bucket, activations=cast(activations),
        update=engine.update, score=cast(score), sampler=sampler, kept_gradients=engine.sampling, graph=graph,
        encoders=encoders, grid=max(vae + decoding, showing) if ours.samples.every else 0,
        evaluation=vae + max(decoding, showing if otherwise else 0 if graph else sampler) if ours.evaluation.draws else 0,
        offloads=ours.moves_reference and not shares,
    )


def samples_of_a_pair(ours: Seppo, batch: Batch) -> float:
    """Samples that are drawn for each pair on average: less than one where they are used more than once."""
    pairs = batch.size * ours.updates_per_iteration
    return (ours.sampler.samples_per_iteration or pairs) / pairs


def network_bytes(network: nn.Module, shared: bool = False) -> int:
    """Bytes of a network's weights and tables; `shared`: of those that a second one does not share with it (`share_frozen`)."""
    return sum(weight.nbytes for weight in trainable_weights(network).values()) if shared else weight_bytes(network)


def reference_bytes(ours: Seppo, denoiser: nn.Module, shared: bool) -> int:
    """Bytes of the reference on the device, a network as `denoiser`; 0 where there is none."""
    if not (ours.flipper or ours.looks):
        return 0
    return bytes_on_device(denoiser) if ours.reference_offload == "blocks" else network_bytes(denoiser, shared)


def _inputs(model: Model, shape: list[int], samples: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The arguments of `model.denoise` after the network, for so many samples with latents of `shape`, on the meta device."""
    latents = torch.empty(samples, *shape, device="meta", dtype=dtype)
    timesteps = torch.empty(samples, device="meta", dtype=torch.long)
    return latents, timesteps, blank_conditions(model, latents)
