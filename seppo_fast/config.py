"""The "seppo" section of the configuration: typed, frozen, with its defaults. `configfile.py` reads the file around it."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Share = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
HELD_OUT = ("heldout_winner_gain", "heldout_implicit_acc")  # what is measured on demonstrations that are held out


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=(), allow_inf_nan=False)


class Lora(Section):
    """A PEFT LoRA on the UNet. `targets` are module names or suffixes, as in `peft.LoraConfig.target_modules`.

    `layers` is for video models: adapters on the motion modules' layers, on those of the image model below, or on both.
    """

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: list[str] = ["to_q", "to_k", "to_v", "to_out.0"]
    layers: Literal["temporal", "spatial", "all"] | None = None


class Model(Section):
    """A diffusers pipeline directory (Stable Diffusion, SDXL or AnimateDiff), or its id on the hub.

    `motion_adapter`, a MotionAdapter's directory or hub id, makes a Stable Diffusion 1.x an AnimateDiff.

    `start_from` begins with the weights of another run's policy instead of the model's: a checkpoint's folder, its
    policy.safetensors, or a file of a pool. They are the pool's policy 0 and DITTO's initial one; the optimizer begins anew.

    `channels_last`, `attention` and `compile` hold for policy and reference alike: a rounding difference between the two
    would decide the signs where they are nearly equal. `compile` makes other kernels with gradients than without, so `online`
    asks the reference with gradients, too; a score made ahead has that noise, but at an iteration's start, where all are ties.
    """

    path: Name
    motion_adapter: Name | None = None
    revision: str | None = None
    variant: str | None = None
    gradient_checkpointing: bool = False
    channels_last: bool = False
    attention: Literal["auto", "sdpa", "xformers"] = "auto"
    compile: Literal["none", "regional"] = "none"
    start_from: Name | None = None
    lora: Lora | None = None


class Video(Section):
    """Which frames of a clip a video model sees, and who decodes them.

    `choice`: "uniform" is the whole clip evenly, endpoints included; "window" `frames` frames, `stride` apart, from a random
    start; "dynamic" is MagicTime's: uniform where the row is a time-lapse (`is_transmit` 0), else a window. Clips of fewer frames
    repeat some. `folder` holds the videos of a CSV: null looks beside it and in its `videos` folder.
    """

    frames: Positive = 16
    choice: Literal["dynamic", "uniform", "window"] = "dynamic"
    stride: Positive = 4
    decoder: Literal["auto", "dali", "pyav"] = "auto"
    folder: Name | None = None


class Data(Section):
    """Demonstrations and how they become latents. `max_skipped` is the share of unusable rows that stops the run.

    `video` is for video models. `cache_latents` false: clips are decoded and encoded while the policy is trained; "auto": where
    their frames are drawn anew in each epoch. Images are always cached. `allow_outside`: rows may name files by absolute paths and
    ".." that lead out of the source's folder; otherwise such rows are skipped. `hold_out`: a number of demonstrations, or a share
    of them, that are never trained on; each evaluation measures the policy's errors on them.
    """

    source: Name | None = None
    format: Literal["auto", "imagefolder", "captions", "pickapic", "datasets", "webdataset", "video"] = "auto"
    split: str = "train"
    image_column: str | None = None
    caption_column: str | None = None
    choose: Literal["winner", "random"] = "winner"
    resolution: Annotated[int, Field(gt=0, multiple_of=8)] = 512
    crop: Literal["center", "random"] = "center"
    flip: bool = True
    posterior: Literal["sample", "mean"] = "sample"
    video: Video = Video()
    cache_latents: bool | Literal["auto"] = "auto"
    cache_dir: Name | None = None
    cache_dtype: Literal["float16", "float32"] = "float16"
    encode_batch_size: Positive = 8
    workers: Positive = 4
    max_skipped: Share = 0.05
    allow_outside: bool = False
    hold_out: Positive | Fraction | None = None


class Sampler(Section):
    """How reference samples are made. `window`: for how much training ahead, one optimizer update or one iteration.

    `batch_size` "auto" is measured; `cuda_graph` is without effect on the CPU. `compile` and `fuse_projections` are the
    sampling loop's alone.
    """

    solver: Literal["ddim", "dpmsolver++", "pndm", "unipc", "euler"] = "ddim"
    steps: Positive = 50
    guidance_scale: Annotated[float, Field(ge=0)] = 7.5
    batch_size: Positive | Literal["auto"] = 16
    cuda_graph: bool = True
    compile: Literal["none", "regional", "full"] = "none"
    fuse_projections: bool = False
    window: Literal["update", "iteration"] = "update"


class Pool(Section):
    """Past policies. `dtype` auto: the policy's own (fp32 when that is fp16)."""

    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    host_memory_gb: Annotated[float, Field(ge=0)] = 16.0


class Samples(Section):
    """Grids of the policy's samples, from fixed prompts and seeds, every `every` updates (0: never)."""

    every: NotNegative = 0
    prompts: list[str] = []
    per_prompt: Positive = 1
    seed: Seed = 0


class Evaluation(Section):
    """Measures of the policy, every `every` updates (0: never) and before the first.

    Scores of its samples of fixed `prompts`, a file as the evaluate command reads, or the prompts; `scores`, `weights`, `real`: as
    its flags. With `data.hold_out` its errors on what is held out, too, and then `prompts` may be left empty. `watch` is the
    measure that decides which policy is best (null: the first of `scores`, or without prompts "heldout_winner_gain"; there also is
    "heldout_implicit_acc"), `patience` after how many evaluations in a row without a better one the run ends (null: never),
    `keep_best` whether the best one's checkpoint stays, and is exported.
    """

    every: NotNegative = 0
    prompts: Name | list[Name] = []
    limit: Positive | None = None
    per_prompt: Positive = 1
    seed: Seed = 0
    scores: Annotated[list[Name], Field(min_length=1)] = ["pickscore"]
    weights: dict[str, Name] = {}
    real: Name | None = None
    batch_size: Positive = 16
    watch: Name | None = None
    patience: Positive | None = None
    keep_best: bool = False

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
        """Nothing that is asked for waits in vain for an evaluation."""
        if not self.every and (self.patience or self.keep_best):
            raise ValueError(f"{'patience' if self.patience else 'keep_best'} needs every, after how many updates to evaluate")
        return self


class Checkpoint(Section):
    """`every` counts updates; null means once an iteration."""

    every: Positive | None = None
    keep_last: Positive = 2


class Method(Section):
    """A row of the methods' table: where losers come from, and what reference and flipper it may have (default first)."""

    losers: Literal["reference", "data"] | None
    references: list[str]
    flippers: list[str]


METHODS = {
    "seppo": Method(losers="reference", references=["uniform", "initial", "latest"], flippers=["aaf", "indicator", "none"]),
    "spin": Method(losers="reference", references=["latest"], flippers=["none"]),
    "ditto": Method(losers="reference", references=["initial"], flippers=["none"]),
    "dpo": Method(losers="data", references=["initial"], flippers=["none"]),
    "sft": Method(losers=None, references=[], flippers=[]),
}


class Seppo(Section):
    """`reference_score` rollout: the reference's errors on a pair are computed once, where its sample is made."""

    model: Model
    data: Data = Data()
    output_dir: Name = "runs/seppo"
    method: Literal["seppo", "spin", "ditto", "dpo", "sft"] = "seppo"
    reference: Literal["uniform", "latest", "initial"] | None = None
    flipper: Literal["aaf", "indicator", "none"] | None = None
    reference_score: Literal["online", "rollout"] = "online"
    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2000.0
    noise: Literal["independent", "shared"] = "independent"
    caption_dropout: Share = 0.0
    iterations: Positive = 7
    updates_per_iteration: Positive = 30
    seed: Seed = 0
    sampler: Sampler = Sampler()
    pool: Pool = Pool()
    samples: Samples = Samples()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    max_nonfinite: Positive = 5

    @property
    def scored_ahead(self) -> bool:
        """Whether no training step asks the reference: a whole iteration's scores are made ahead."""
        return self.reference_score == "rollout" and self.sampler.window == "iteration"

    @property
    def flips(self) -> bool:
        """Whether a flipper may count a loser as something else."""
        return self.flipper not in (None, "none")

    @property
    def updates(self) -> int:
        """Optimizer updates of the whole run."""
        return self.iterations * self.updates_per_iteration

    @property
    def looks(self) -> bool:
        """Whether the policy is looked at on the way, for which even SFT needs a second network."""
        return self.samples.every > 0 or self.evaluation.every > 0

    @model_validator(mode="before")
    @classmethod
    def method_decides(cls, values: Any) -> Any:
        """Fill `reference` and `flipper` from the method's row of the table, and refuse what contradicts it."""
        if not isinstance(values, dict) or values.get("method", "seppo") not in METHODS:
            return values
        method = values.get("method", "seppo")
        row = METHODS[method]
        filled = dict(values)
        for key, allowed in (("reference", row.references), ("flipper", row.flippers)):
            if filled.get(key) is None:
                filled[key] = allowed[0] if allowed else None
            elif allowed and filled[key] not in allowed:
                raise ValueError(f"{key}={filled[key]!r} does not go with method={method!r}, which has {allowed[0]!r};"
                                 " method='seppo' takes every reference and flipper")
            elif not allowed:
                raise ValueError(f"{key}={filled[key]!r} does not go with method={method!r}, which has no {key}")
        if not row.references and filled.get("reference_score") == "rollout":
            raise ValueError(f"reference_score='rollout' does not go with method={method!r}, which has no reference")
        return filled

    @model_validator(mode="after")
    def evaluations_have_what_they_measure(self) -> "Seppo":
        """Scores need prompts, and errors on held-out demonstrations need these; what is held out needs evaluations."""
        asked, held = self.evaluation, self.data.hold_out is not None
        if asked.every and not asked.prompts and not held:
            raise ValueError("seppo.evaluation.prompts is needed with every: a file of prompts, or a list of them; or set"
                             " seppo.data.hold_out, whose measures need no prompts")
        if held and not asked.every:
            raise ValueError("data.hold_out needs evaluation.every, after how many updates what is held out is measured")
        known = [*(asked.scores if asked.prompts or not held else []), *(self.held_out_measures if held else [])]
        if asked.watch is not None and asked.watch not in known:
            raise ValueError(f"seppo.evaluation.watch={asked.watch!r} is none of the scores ({', '.join(known)})")
        return self

    @property
    def held_out_measures(self) -> tuple[str, ...]:
        """What held-out demonstrations tell of this method: without pairs, that is the winners' errors."""
        return HELD_OUT if self.flipper else HELD_OUT[:1]

    @model_validator(mode="after")
    def fused_projections_are_plain(self) -> "Seppo":
        """What is known to stop the sampler is known before any model loads."""
        if self.sampler.fuse_projections and self.model.lora is not None:
            raise ValueError("sampler.fuse_projections does not go with model.lora, whose adapters sit on the projections that"
                             " would be fused; set it to false")
        if self.sampler.fuse_projections and self.model.attention == "xformers":
            raise ValueError("sampler.fuse_projections does not go with model.attention='xformers'; set it to false, or the"
                             " attention to 'sdpa' or 'auto'")
        return self
