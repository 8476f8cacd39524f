"""The "seppo" section of the configuration and the methods' table. `sections.py` has its parts, `configfile.py` reads the file."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from seppo_fast.sampling import DRAWN, LIMITS, Sampler, Samples
from seppo_fast.sections import (
    HELD_OUT,
    Checkpoint,
    Data,
    Evaluation,
    Improvement,
    Lora,
    Model,
    Name,
    OtherModel,
    Pool,
    Positive,
    ReferenceModel,
    Section,
    Seed,
    Share,
    Tasks,
    Timesteps,
    Video,
)

__all__ = ["HELD_OUT", "METHODS", "Checkpoint", "Data", "Evaluation", "Improvement", "Lora", "Method", "Model", "OtherModel",
           "Pool", "ReferenceModel", "Sampler", "Samples", "Seppo", "Tasks", "Timesteps", "Video"]


class Method(Section):
    """A row of the methods' table: where winners and losers come from, what reference and flipper it may have (default first).

    Losers are drawn by the `reference`, whichever it is, or by the `latest` policy, whichever the reference is, or are those of the
    `data`; None: the method has none. Winners are the `data`'s, or what an `improvement` model makes of the losers. A method
    without reference learns by mean squared errors.
    """

    winners: Literal["data", "improvement"]
    losers: Literal["reference", "latest", "data"] | None
    references: list[str]
    flippers: list[str]

    @property
    def draws(self) -> bool:
        """Whether past policies draw the losers."""
        return self.losers not in (None, "data")

    @property
    def needs_losers(self) -> bool:
        """Whether the data must have losers."""
        return self.losers == "data"


METHODS = {
    "seppo": Method(winners="data", losers="reference", references=["uniform", "initial", "latest"],
                    flippers=["aaf", "indicator", "none"]),
    "spin": Method(winners="data", losers="reference", references=["latest"], flippers=["none"]),
    "ditto": Method(winners="data", losers="reference", references=["initial"], flippers=["none"]),
    "dpo": Method(winners="data", losers="data", references=["initial"], flippers=["none"]),
    "iterative_dpo": Method(winners="improvement", losers="latest", references=["initial"], flippers=["none"]),
    "sft": Method(winners="data", losers=None, references=[], flippers=[]),
    "improvement": Method(winners="data", losers="data", references=[], flippers=[]),
}


class Seppo(Section):
    """`reference_score` rollout: the reference's errors on a pair are computed once, when its sample is drawn."""

    model: Model
    data: Data = Data()
    output_dir: Name = "runs/seppo"
    """The run folder."""
    method: Literal["seppo", "spin", "ditto", "dpo", "iterative_dpo", "sft", "improvement"] = "seppo"
    """The training method."""
    reference: Literal["uniform", "latest", "initial"] | None = None
    """Which past policy is the reference; null is the method's own choice."""
    flipper: Literal["aaf", "indicator", "none"] | None = None
    """How the sign of a pair's second half is decided; null is the method's own choice."""
    aaf_draws: Positive = 1
    """Noises of the winner, all at the pair's timestep, whose mean decides the sign; the first is the pair's own."""
    reference_score: Literal["online", "rollout"] = "online"
    """Compute the reference's errors in training (`online`), or where its sample is drawn (`rollout`)."""
    reference_offload: Literal["none", "blocks"] = "none"
    """`blocks`: the reference's weights stay in host memory, and each block is on the device for its own call alone."""
    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["auto"] = 2000.0
    """Strength of the preference; larger keeps the policy nearer to the reference. `auto` makes a typical logit about 1.39."""
    sft_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """How much of the winner's own mean squared error is added to the loss of each pair."""
    noise: Literal["independent", "shared"] = "independent"
    """Winner and loser get noise of their own, or the same."""
    timesteps: Timesteps | None = None
    """The law of times in training, for flows; null is their default."""
    caption_dropout: Share = 0.0
    """Share of the prompts that is replaced by the empty one."""
    iterations: Positive = 7
    """Iterations of Algorithm 1; after each the policy joins the pool."""
    updates_per_iteration: Positive = 30
    """Optimizer updates of an iteration."""
    seed: Seed = 0
    """Seed of data order, noise and timesteps."""
    sampler: Sampler = Sampler()
    improvement: Improvement = Improvement()
    reference_model: ReferenceModel = ReferenceModel()
    pool: Pool = Pool()
    samples: Samples = Samples()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    max_nonfinite: Positive = 5
    """Updates in a row that are not finite, after which the run stops."""

    @property
    def scored_ahead(self) -> bool:
        """Whether training steps never use the reference: its errors are computed ahead for a whole iteration."""
        return self.reference_score == "rollout" and self.sampler.window == "iteration"

    @property
    def moves_reference(self) -> bool:
        """Whether a reference with weights of its own leaves the device as a whole while the policy is trained."""
        return self.scored_ahead and self.reference_offload == "none"

    @property
    def networks(self) -> Model:
        """`model` as networks are to be prepared: projections can only be fused with PyTorch's own attention."""
        return self.model.model_copy(update={"attention": "sdpa"}) if self.sampler.fuse_projections else self.model

    @property
    def may_score_rollouts(self) -> bool:
        """Whether `reference_score` may be rollout: each sample is used once, and there is a reference that draws all samples."""
        row = METHODS[self.method]
        return bool(row.references) and row.losers != "latest" and self.sampler.samples_per_iteration is None

    @property
    def shows(self) -> bool:
        """Whether the policy draws samples for grids or evaluations."""
        return self.samples.every > 0 or self.evaluation.draws

    @property
    def shown(self) -> Sampler:
        """How grids and evaluations draw: the policy alone, and as `samples` says; the sampler itself where that is the same."""
        own = {key: value for key in ("solver", "steps", "guidance_scale") if (value := getattr(self.samples, key)) is not None}
        if not self.shows or not own and self.sampler.adapter is None:
            return self.sampler
        given = self.sampler.model_dump(include=DRAWN)
        if "solver" in own:
            given.pop("spacing")
        if "guidance_scale" in own:
            given = {key: value for key, value in given.items() if key not in LIMITS}
        return Sampler(**(given | own), batch_size=self.sampler.batch_size, cuda_graph=False)

    @property
    def flips(self) -> bool:
        """Whether a flipper may change the sign of a pair's second half."""
        return self.flipper not in (None, "none")

    @property
    def updates(self) -> int:
        """Optimizer updates of the whole run."""
        return self.iterations * self.updates_per_iteration

    @property
    def looks(self) -> bool:
        """Whether there are grids or evaluations during training, for which even SFT needs a second network."""
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
    def margins_decide_beta(self) -> "Seppo":
        """Refuse `auto` where nothing is compared."""
        if self.beta == "auto" and self.flipper is None:
            raise ValueError(f"beta='auto' does not go with method={self.method!r}, which compares no pairs and has no beta")
        return self

    @model_validator(mode="after")
    def draws_decide_a_sign(self) -> "Seppo":
        """Refuse `aaf_draws` where the winner's errors decide no sign, or where the reference's are known under one noise only."""
        if self.aaf_draws > 1 and not self.flips:
            raise ValueError(f"aaf_draws={self.aaf_draws} does not go with flipper={self.flipper!r}, whose sign does not depend on"
                             " the winner; set it to 1, or the flipper to 'aaf' or 'indicator'")
        if self.aaf_draws > 1 and self.reference_score == "rollout":
            raise ValueError(f"aaf_draws={self.aaf_draws} does not go with reference_score='rollout', which computes the"
                             " reference's errors under one noise; set it to 1, or reference_score to 'online'")
        return self

    @model_validator(mode="after")
    def sft_weight_is_an_addition(self) -> "Seppo":
        """Refuse `sft_weight` where the loss is a mean squared error already."""
        if self.sft_weight and not METHODS[self.method].flippers:
            raise ValueError(f"sft_weight={self.sft_weight:g} does not go with method={self.method!r}, whose loss is a mean squared"
                             " error already")
        return self

    @model_validator(mode="after")
    def evaluations_have_what_they_measure(self) -> "Seppo":
        """Refuse evaluations with nothing to measure, held-out demonstrations without evaluations, and an unknown `watch`."""
        asked, held = self.evaluation, self.data.hold_out is not None
        if asked.every and not asked.prompts and not held:
            raise ValueError("seppo.evaluation.prompts is needed with every: a file of prompts, or a list of them; or set"
                             " seppo.data.hold_out, whose measures need no prompts")
        if held and not asked.every:
            raise ValueError("data.hold_out needs evaluation.every, the updates between two measures of what is held out")
        known = [*(asked.scores if asked.prompts or not held else []), *(self.held_out_measures if held else [])]
        if asked.watch is not None and asked.watch not in known:
            raise ValueError(f"seppo.evaluation.watch={asked.watch!r} is none of the scores ({', '.join(known)})")
        return self

    @model_validator(mode="after")
    def sets_of_samples_are_drawn_and_scored_in_training(self) -> "Seppo":
        """Refuse a set of samples where none is drawn, or where each is to be scored once."""
        if self.sampler.samples_per_iteration is None:
            return self
        if not METHODS[self.method].draws:
            raise ValueError(f"sampler.samples_per_iteration does not go with method={self.method!r}, which draws no samples")
        if self.reference_score == "rollout":
            raise ValueError("reference_score='rollout' does not go with sampler.samples_per_iteration: a sample is used more"
                             " than once, each time with another timestep and noise")
        return self

    @model_validator(mode="after")
    def limits_are_of_one_guidance(self) -> "Seppo":
        """Refuse limits of the guidance in the method that has another one."""
        if self.method != "improvement":
            return self
        others = [f"sampler.{key}" for key in self.sampler.limits]
        if self.samples.guidance_scale is not None:
            others.append("samples.guidance_scale")
        if others:
            raise ValueError(f"{others[0]} does not go with method='improvement', whose guidance is by image and prompt"
                             " (improvement.guidance_scale, improvement.image_guidance_scale); leave it out")
        return self

    @model_validator(mode="after")
    def adapters_draw_rollouts(self) -> "Seppo":
        """Refuse an adapter where something else than rollouts would be drawn as it needs it."""
        row = METHODS[self.method]
        if self.sampler.adapter is None:
            return self
        if not row.draws:
            raise ValueError(f"sampler.adapter does not go with method={self.method!r}, which draws no rollouts; leave it out")
        if row.winners == "improvement":
            raise ValueError(f"sampler.adapter does not go with method={self.method!r}: the improvement model, which was not"
                             " distilled, draws with the same solver and steps")
        lacking = [name for name in ("solver", "steps", "guidance_scale") if getattr(self.samples, name) is None]
        if self.shows and lacking:
            raise ValueError(f"samples.{lacking[0]} is needed with sampler.adapter where grids or evaluations draw samples: they"
                             " show the policy without the adapter, which needs another solver, more steps, and guidance")
        return self

    @model_validator(mode="after")
    def improvement_fits(self) -> "Seppo":
        """The improvement model is there where it makes the winners, and is not named where nothing uses it."""
        row = METHODS[self.method]
        if row.winners == "improvement" and self.improvement.path is None:
            raise ValueError(f"improvement.path is needed with method={self.method!r}: the final folder of a run with"
                             " method='improvement', or another InstructPix2Pix pipeline")
        if row.winners != "improvement" and self.improvement.path is not None:
            raise ValueError(f"improvement.path does not go with method={self.method!r}, whose winners come from the data")
        if row.losers == "latest" and self.reference_score == "rollout":
            raise ValueError(f"reference_score='rollout' does not go with method={self.method!r}, whose losers are not drawn by the"
                             " reference")
        if self.reference_model.path is not None and self.reference != "initial":
            raise ValueError("reference_model.path stands for the initial policy as the reference; it goes with methods whose"
                             f" reference is 'initial', not with {self.method!r} and reference={self.reference!r}")
        if self.reference_model.path is not None and self.model.lora is not None:
            raise ValueError("reference_model.path does not go with model.lora: policy and reference share the weights below the"
                             " adapter; start with model.path of the reference, or train all weights")
        if self.method == "improvement" and self.evaluation.draws:
            raise ValueError("evaluation.prompts does not go with method='improvement', whose model draws from an image and a"
                             " prompt; set data.hold_out, or measure it afterwards with the evaluate command")
        if self.method == "improvement" and self.samples.prompts:
            raise ValueError("samples.prompts does not go with method='improvement', whose grids show pairs of the data")
        return self

    @model_validator(mode="after")
    def offloaded_blocks_are_plain(self) -> "Seppo":
        """Refuse `reference_offload` without a reference of its own, and with what keeps its weights in one place."""
        if self.reference_offload == "none":
            return self
        if self.model.lora is not None:
            raise ValueError("reference_offload='blocks' does not go with model.lora: the reference shares the policy's weights,"
                             " which are on the device anyway; leave it out")
        if not self.flipper and not self.looks:
            raise ValueError(f"reference_offload='blocks' does not go with method={self.method!r} without grids or evaluations:"
                             " there is no reference; leave it out")
        for key in ("model.compile", "sampler.compile"):
            if getattr(self, key.split(".")[0]).compile != "none":
                raise ValueError(f"reference_offload='blocks' does not go with {key}, whose kernels are made for weights that stay"
                                 " on the device; set it to 'none'")
        if self.sampler.fuse_projections:
            raise ValueError("reference_offload='blocks' does not go with sampler.fuse_projections, whose copies of the weights"
                             " are in no block; set it to false")
        return self

    @property
    def held_out_measures(self) -> tuple[str, ...]:
        """The held-out measures that this method has: without pairs, only that of the winners' errors."""
        return HELD_OUT if self.flipper else HELD_OUT[:1]

    @model_validator(mode="after")
    def fused_projections_are_plain(self) -> "Seppo":
        """Refuse, before any model loads, settings that `fuse_projections` does not go with."""
        if self.sampler.fuse_projections and self.model.lora is not None:
            raise ValueError("sampler.fuse_projections does not go with model.lora, whose adapters sit on the projections that"
                             " would be fused; set it to false")
        if self.sampler.fuse_projections and self.model.attention == "xformers":
            raise ValueError("sampler.fuse_projections does not go with model.attention='xformers'; set it to false, or the"
                             " attention to 'sdpa' or 'auto'")
        return self
