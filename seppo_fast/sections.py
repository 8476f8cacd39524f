"""The parts of the "seppo" section of the configuration: typed, frozen, with their defaults."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Share = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Quantized = Literal["int8", "nf4", "fp8"]
HELD_OUT = ("heldout_winner_gain", "heldout_implicit_acc")  # what is measured on demonstrations that are held out


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=(), allow_inf_nan=False,
                              use_attribute_docstrings=True)


class Lora(Section):
    """A PEFT LoRA on the denoiser, UNet or transformer. `targets` are module names or suffixes, as in PEFT's `target_modules`.

    `layers` is for AnimateDiff: adapters on the layers of the motion modules, on those of the image model, or on both.
    """

    rank: Positive = 16
    """Rank of the adapters."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """Their scale: what they add is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapters' inputs that is set to zero in training."""
    targets: list[str] = ["to_q", "to_k", "to_v", "to_out.0"]
    """Names or endings of the modules that get an adapter."""
    layers: Literal["temporal", "spatial", "all"] | None = None
    """AnimateDiff: adapters on the motion modules (`temporal`, the default there), on the image model (`spatial`), or both."""


class Model(Section):
    """A diffusers pipeline directory, or its id on the hub: Stable Diffusion, SDXL, AnimateDiff, Stable Diffusion 3,
    FLUX.1, FLUX.2 klein, Qwen-Image, Wan 2.1, Wan 2.2 TI2V-5B.

    `motion_adapter`, a MotionAdapter's directory or hub id, makes a Stable Diffusion 1.x an AnimateDiff.

    `start_from` begins with the weights of another run's policy instead of the model's: a checkpoint's folder, its
    policy.safetensors, or a file of a pool. They become the pool's policy 0 (DITTO's initial policy); the optimizer starts empty.

    `channels_last`, `attention` and `compile` hold for policy and reference alike: a rounding difference between the two
    would decide the signs where they are nearly equal. Compiled kernels with gradients differ from those without, so with
    `online` the reference runs with gradients, too. Errors computed at `rollout` differ by that rounding, except at an
    iteration's start, where all pairs are ties.

    `quantize` and `quantize_text` store linear layers' weights in fewer bits, by torchao (`int8`: a scale for each row, `fp8`
    likewise) or bitsandbytes (`nf4`: a scale for 64 weights). Policy and reference share the quantized base, and `final/` is a LoRA
    for the model as it was. `int8` and `fp8` weights are turned into the precision of training when they are used, and kept so for
    the backward: with `gradient_checkpointing` those of one block at a time.
    """

    path: Name
    """A diffusers pipeline's directory, or its id on the hub."""
    motion_adapter: Name | None = None
    """A motion adapter's directory or id; makes a Stable Diffusion 1.x an AnimateDiff."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    variant: str | None = None
    """Which weight files are read, such as `fp16`."""
    gradient_checkpointing: bool = False
    """Keep fewer activations and compute them again: less memory, slower training."""
    vae_tiling: bool = False
    """The VAE takes pictures in overlapping tiles: less memory, and slightly other latents where one is larger than a tile."""
    vae_slicing: bool = False
    """The VAE takes one image, or frame, at a time: less memory."""
    channels_last: bool = False
    """Memory layout of the convolutions' inputs, for policy and reference."""
    attention: Literal["auto", "sdpa", "xformers"] = "auto"
    """Attention kernel of policy and reference; `auto` measures and takes the faster one."""
    compile: Literal["none", "regional", "full"] = "none"
    """torch.compile of policy and reference: block by block (`regional`), or each as one graph, in training alone (`full`)."""
    start_from: Name | None = None
    """A checkpoint or past policy of another run, whose weights this run begins with."""
    quantize: Quantized | None = None
    """Bits of the frozen weights below a LoRA: `int8`, `nf4` (4 bits) or `fp8`; null keeps the precision of training."""
    quantize_text: Quantized | None = None
    """The same for the text encoders; null keeps them in fp32."""
    lora: Lora | None = None
    """Train a LoRA instead of all weights. Of an improvement model `final/` is the whole pipeline, with the LoRA merged into it."""

    @model_validator(mode="after")
    def only_what_is_frozen_is_quantized(self) -> "Model":
        """Refuse to quantize weights that are trained."""
        if self.quantize and self.compile == "full":
            raise ValueError(f"compile='full' does not go with quantize={self.quantize!r}, whose layers it has not been tried with;"
                             " use 'regional' or 'none'")
        if self.quantize and self.lora is None:
            raise ValueError(f"quantize={self.quantize!r} needs lora: quantized weights cannot be trained, only an adapter above"
                             ' them; add lora, e.g. {"rank": 16}, or leave out quantize')
        return self


class Video(Section):
    """Which frames of a clip a video model sees, and what decodes them.

    `choice`: "uniform" is the whole clip evenly, endpoints included; "window" `frames` frames, `stride` apart, from a random
    start; "dynamic" is MagicTime's: uniform where the row is a time-lapse (`is_transmit` 0), else a window. Clips of fewer frames
    repeat some. `folder` holds the videos of a CSV: null looks beside it and in its `videos` folder.
    """

    frames: Positive = 16
    """Frames of a clip; of Wan 4k + 1."""
    choice: Literal["dynamic", "uniform", "window"] = "dynamic"
    """Which frames: evenly over the clip (`uniform`), a random `window`, or by the row (`dynamic`)."""
    stride: Positive = 4
    """Distance in frames within a window."""
    decoder: Literal["auto", "dali", "pyav"] = "auto"
    """What decodes; `auto` is DALI where it can, else PyAV."""
    folder: Name | None = None
    """Where a CSV's videos are, if not beside it or in its `videos` folder."""


class Data(Section):
    """Demonstrations and how they become latents. `max_skipped` is the share of unusable rows that stops the run.

    `video` is for video models. `cache_latents` false: clips are decoded and encoded while the policy is trained; "auto": where
    their frames are drawn anew in each epoch. Images are always cached. `cache_prompts` changes no embedding. `allow_outside`: rows
    may name files by absolute paths and ".." that lead out of the source's folder; otherwise such rows are skipped. `hold_out`: a
    number of demonstrations, or a share of them, that are never trained on; each evaluation measures the policy's errors on them.
    """

    source: Name | None = None
    """Where the demonstrations are: a folder, a file, webdataset tars or a hub id. Needed for training."""
    format: Literal["auto", "imagefolder", "captions", "pickapic", "datasets", "webdataset", "video"] = "auto"
    """What kind of source it is; `auto` looks."""
    split: str = "train"
    """Which split of the source; `all` takes every one."""
    image_column: str | None = None
    """The column with the images, or with the winners of pairs, if it has an unusual name."""
    loser_column: str | None = None
    """The column with the losers of preference pairs, if it has an unusual name."""
    caption_column: str | None = None
    """The column with the prompts, if it has an unusual name."""
    choose: Literal["winner", "random"] = "winner"
    """Of a preference pair the winner is the demonstration, or either of the two."""
    resolution: Annotated[int, Field(gt=0, multiple_of=8)] = 512
    """Pixels along a side."""
    crop: Literal["center", "random"] = "center"
    """Where an image is cropped to a square."""
    flip: bool = True
    """Mirror half of the images."""
    posterior: Literal["sample", "mean"] = "sample"
    """Latents are drawn from the VAE's distribution, or are its mean."""
    video: Video = Video()
    cache_latents: bool | Literal["auto"] = "auto"
    """Keep encoded latents on disk; `auto` does not where video frames are drawn anew in each epoch."""
    cache_prompts: bool | Literal["auto"] = "auto"
    """Keep prompt embeddings on disk; `auto` does up to 64 GB. Otherwise the text encoder stays in host memory."""
    cache_dir: Name | None = None
    """Where encoded latents are kept; null chooses a folder."""
    cache_dtype: Literal["float16", "float32"] = "float16"
    """Precision of the kept latents."""
    encode_batch_size: Positive = 8
    """Images that are encoded at once."""
    workers: Positive = 4
    """Threads that read and decode."""
    max_skipped: Share = 0.05
    """Share of unusable rows that stops the run."""
    allow_outside: bool = False
    """Rows may name files outside of the source's folder."""
    hold_out: Positive | Fraction | None = None
    """A number or a share of demonstrations that are never trained on; evaluations measure the policy's errors on them."""


class Timesteps(Section):
    """The law of a flow's times in training: sigma, 0 for a sample and 1 for noise. DDPM-like models have whole timesteps."""

    density: Literal["logit_normal", "uniform"] = "logit_normal"
    """Sigma before the shift is the logistic function of a normal number, or uniform."""
    mean: Annotated[float, Field(ge=-10, le=10)] = 0.0
    """Mean of that normal number."""
    std: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Its standard deviation."""
    shift: Literal["model"] | Annotated[float, Field(ge=1e-3, le=1e3)] = "model"
    """The k of k s / (1 + (k - 1) s), to which sigma s is shifted: as the model's scheduler does it, or a number."""

    @model_validator(mode="after")
    def uniform_has_no_mean(self) -> "Timesteps":
        """Refuse the normal number's mean and deviation where there is none."""
        if self.density == "uniform" and (self.mean, self.std) != (0.0, 1.0):
            raise ValueError("timesteps.mean and timesteps.std do not go with density='uniform'; leave them out")
        return self


class Tasks(Section):
    """Shares of the improvement model's three tasks, which sum to 1 (Eq. 6, 7, 8). The paper does not give them."""

    improve: Share = 0.6
    """The winner from the loser and the prompt."""
    reconstruct: Share = 0.2
    """Either image from itself, without a prompt: so that the image is heeded."""
    unconditional: Share = 0.2
    """Either image from nothing."""

    @model_validator(mode="after")
    def sum_to_one(self) -> "Tasks":
        """Shares of one whole."""
        total = self.improve + self.reconstruct + self.unconditional
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the shares sum to {total:g}, and must sum to 1: give all three")
        if self.improve == 0:
            raise ValueError("improve is 0, and the model would never see a winner beside its loser; give it a share")
        return self


class OtherModel(Section):
    """A model beside the policy's own."""

    path: Name | None = None
    """A diffusers pipeline's directory, or its id on the hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    variant: str | None = None
    """Which weight files are read, such as `fp16`."""

    @model_validator(mode="after")
    def of_a_path(self) -> "OtherModel":
        """Refuse what says which files of no model are read."""
        for key in ("revision", "variant"):
            if self.path is None and getattr(self, key) is not None:
                raise ValueError(f"{key} is given without path, the model that it belongs to")
        return self


class Improvement(OtherModel):
    """The improvement model, which makes winners of losers.

    `tasks` is for method "improvement", which trains it; the rest for "iterative_dpo", which uses the model in `path`. Sample
    grids of its training are drawn with the guidance scales, too.
    """

    path: Name | None = None
    """The trained improvement model: an InstructPix2Pix pipeline's directory, such as a run's `final/`, or its id on the hub."""
    guidance_scale: Annotated[float, Field(ge=0)] = 3.5
    """Strength of the prompt (s_T of Eq. 9); 1 is none."""
    image_guidance_scale: Annotated[float, Field(ge=0)] = 3.0
    """How near the winner stays to its loser (s_I of Eq. 9); 1 is none."""
    offload: bool = False
    """Keep the improvement model in host memory while the policy is trained."""
    tasks: Tasks = Tasks()


class ReferenceModel(OtherModel):
    """Another model of the policy's architecture as the reference, in place of the one that training begins with."""

    path: Name | None = None
    """A diffusers pipeline's directory, or its id on the hub; null takes the initial policy."""


class Pool(Section):
    """Past policies. `dtype` auto: the policy's own (fp32 when that is fp16)."""

    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision in which past policies are kept; `auto` is the policy's own, or fp32 where that is fp16."""
    host_memory_gb: Annotated[float, Field(ge=0)] = 16.0
    """Memory of each machine for past policies; the others are read from disk."""


class Evaluation(Section):
    """Measures of the policy, every `every` updates (0: never) and before the first.

    The policy draws samples for fixed `prompts` (a list, or a file as the evaluate command reads), which are scored; `scores`,
    `weights` and `real` are as that command's flags. With `data.hold_out` the policy's errors on held-out demonstrations are
    measured, too, and `prompts` may be empty. `watch` is the measure that decides which policy is best: a score,
    "heldout_winner_gain" or "heldout_implicit_acc" (null: the first of `scores`, or without prompts "heldout_winner_gain").
    `patience`: the run ends after so many evaluations in a row without a better one (null: never). `keep_best`: the best policy's
    checkpoint stays and is exported.
    """

    every: NotNegative = 0
    """Updates between two evaluations; 0 never evaluates."""
    prompts: Name | list[Name] = []
    """A file of prompts, or a list of them; may be empty with `data.hold_out`."""
    limit: Positive | None = None
    """Use the first prompts only; null uses all."""
    per_prompt: Positive = 1
    """Samples of each prompt."""
    seed: Seed = 0
    """Seed of the samples' noise."""
    scores: Annotated[list[Name], Field(min_length=1)] = ["pickscore"]
    """Which scores are computed."""
    weights: dict[str, Name] = {}
    """A score's weights in place of the hub's, by the score's name."""
    real: Name | None = None
    """A folder of real clips, with which videos are compared."""
    batch_size: Positive = 16
    """Samples that are scored at once."""
    watch: Name | None = None
    """The measure that says which policy is best; null is the first score, or without prompts the held-out gain."""
    patience: Positive | None = None
    """The run ends after so many evaluations in a row without a better one; null: never."""
    keep_best: bool = False
    """Keep the best policy's checkpoint, and export it to `best/`."""

    @property
    def draws(self) -> bool:
        """Whether the policy is sampled for scores."""
        return self.every > 0 and bool(self.prompts)

    @property
    def watched(self) -> str:
        """The measure by which policies are compared."""
        return self.watch or (self.scores[0] if self.prompts else HELD_OUT[0])

    @model_validator(mode="after")
    def makes_sense(self) -> "Evaluation":
        """Refuse `patience` and `keep_best` without evaluations."""
        if not self.every and (self.patience or self.keep_best):
            raise ValueError(f"{'patience' if self.patience else 'keep_best'} needs every, the updates between evaluations")
        return self


class Checkpoint(Section):
    """`every` counts updates; null means once an iteration."""

    every: Positive | None = None
    """Updates between two checkpoints; null is one an iteration."""
    keep_last: Positive = 2
    """How many checkpoints stay."""
