"""What a run costs before it runs: FLOPs and activation bytes, counted on the model's own graph without memory."""

from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from seppo_fast.config import METHODS
from seppo_fast.configfile import Batch, Config
from seppo_fast.models import StableDiffusion, StableDiffusionXL
from seppo_fast.models.lora import add_lora, trainable_weights
from seppo_fast.training.engine import engine_config, precision


@dataclass(frozen=True)
class Cost:
    """Counts of one rank. FLOPs are per pair; bytes are at the peak of a micro-batch."""

    parameters: int
    trained: int
    forward: float  # FLOPs of one network evaluation on one sample
    sampling: float  # FLOPs of one reference sample
    training: float  # FLOPs of the policy's forward and backward and the reference's forward, on a pair
    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int

    @property
    def memory(self) -> int:
        """Bytes in all, without the allocator's slack and the sampler's batches."""
        return self.weights + self.gradients + self.optimizer + self.reference + self.activations

    @property
    def sampling_share(self) -> float:
        """Share of the FLOPs that the reference samples take."""
        return self.sampling / (self.sampling + self.training)


def estimate(model: StableDiffusion | StableDiffusionXL, config: Config, batch: Batch, evaluations: int) -> Cost:
    """Cost of `config` with `model`; `evaluations` of the network make a reference sample (before guidance doubles them)."""
    ours = config.seppo
    dtype, autocast = precision(config.deepspeed)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(model.path, subfolder="unet")).to(dtype)
        if ours.model.lora:
            add_lora(unet, ours.model.lora, ours.seed)
    if ours.model.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    trained = sum(weight.numel() for weight in trainable_weights(unet).values())
    parameters = sum(weight.numel() for weight in unet.parameters())
    halves = 1 if METHODS[ours.method].losers is None else 2

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.denoise(unet, *_inputs(model, unet, ours.data.resolution, 1, dtype))
    forward = float(counter.get_total_flops())
    saved = _SavedBytes(unet)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        model.denoise(unet, *_inputs(model, unet, ours.data.resolution, halves * batch.micro, dtype))

    generated = METHODS[ours.method].losers == "reference"
    guided = 1 if ours.sampler.guidance_scale == 1 else 2
    passes = 4 if ours.model.gradient_checkpointing else 3  # a backward is two forwards, a checkpointed one is three
    zero = engine_config(config, batch).get("zero_optimization", {})
    stage, shards = int(zero.get("stage", 0)), batch.world
    offloaded = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    # Half-precision gradients summed in fp32 exist twice: as autograd makes them, and as they are summed.
    summed = 4 if dtype.itemsize < 4 and config.deepspeed.get("data_types", {}).get("grad_accum_dtype") == "fp32" else 0
    per_weight = 8 + (4 if dtype.itemsize < 4 else 0)  # Adam's moments in fp32, and a master copy
    return Cost(
        parameters=parameters, trained=trained, forward=forward,
        sampling=forward * guided * evaluations if generated else 0.0,
        training=forward * halves * (passes + (1 if ours.flipper else 0)),
        weights=parameters * dtype.itemsize // (shards if stage == 3 else 1),
        gradients=trained * (dtype.itemsize + summed) // (shards if stage >= 2 else 1),
        optimizer=0 if offloaded else trained * per_weight // (shards if stage >= 1 else 1),
        reference=0 if not ours.flipper else (trained if ours.model.lora and stage < 3 else parameters) * dtype.itemsize,
        activations=saved.total // (2 if autocast else 1),
    )


class _SavedBytes:
    """Adds up what autograd keeps for the backward: each storage once, weights not at all."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.total = 0
        self._seen = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
        self._alive: list[Tensor] = []  # a freed storage's address could be given to the next one

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._alive.append(tensor)
            self.total += storage.nbytes()
        return tensor


def _inputs(model: StableDiffusion | StableDiffusionXL, unet: UNet2DConditionModel, resolution: int, batch: int,
            dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    size = resolution // model.vae_scale_factor
    make = {"device": "meta", "dtype": dtype}
    conditions = {"prompt_embeds": torch.empty(batch, 77, unet.config.cross_attention_dim, **make)}
    if unet.config.addition_embed_type == "text_time":
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        conditions["pooled"] = torch.empty(batch, pooled, **make)
    timesteps = torch.empty(batch, device="meta", dtype=torch.long)
    return torch.empty(batch, model.latent_channels, size, size, **make), timesteps, conditions
