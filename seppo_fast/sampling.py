"""The parts of the "seppo" section that say how rollouts, grids and evaluations are drawn."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from seppo_fast.sections import Name, NotNegative, Positive, Section, Seed, Share

EVERYWHERE = (0.0, 1.0)
LIMITS = ("guidance_interval", "unconditional_every")  # keys that say where guidance is left out
DRAWN = {"solver", "steps", "spacing", "guidance_scale", *LIMITS}  # keys that decide what the network draws, the adapter apart
FEW_STEPS = ("lcm", "tcd")  # solvers for networks that were distilled to jump from any noise level to a sample


class Sampler(Section):
    """How reference samples are drawn. `window`: they are drawn ahead for one optimizer update or for one iteration.

    `batch_size` "auto" is measured; `cuda_graph` has no effect on the CPU. `compile` and `fuse_projections` apply to the sampling
    loop only. With an `adapter`, `solver` and `steps` must be given, and `guidance_scale` is 1 by default.
    """

    solver: Literal["ddim", "dpmsolver++", "pndm", "unipc", "euler", "lcm", "tcd"] = "ddim"
    """Which solver draws the reference samples; `lcm` and `tcd` are for distilled networks."""
    steps: Positive = 50
    """Denoising steps of a sample."""
    spacing: Literal["leading", "trailing", "linspace"] | None = None
    """How the steps' timesteps are spaced, for DDPM-like models; null is the model's own. Lightning, Hyper-SD: `trailing`."""
    guidance_scale: Annotated[float, Field(ge=0)] = 7.5
    """Strength of classifier-free guidance; 1 is none."""
    guidance_interval: Annotated[list[Share], Field(min_length=2, max_length=2)] = list(EVERYWHERE)
    """Guidance only at noise levels from low to high, as shares of the schedule; elsewhere one network call in place of two."""
    unconditional_every: Positive = 1
    """The network's output without the prompt is computed in every n-th guided step, and kept in between."""
    adapter: Name | None = None
    """A distillation LoRA's file (LCM, TCD, Hyper-SD, Lightning, turbo), on the drawing network alone and only while it draws."""
    adapter_scale: Annotated[float, Field(gt=0)] = 1.0
    """Strength of the adapter, beside what its file says; Hyper-SD for FLUX.1-dev and SD3: 0.125."""
    batch_size: Positive | Literal["auto"] = 16
    """Samples that are drawn at once; `auto` is measured."""
    cuda_graph: bool = True
    """Capture a denoising step on a GPU and replay it."""
    compile: Literal["none", "regional", "full"] = "none"
    """torch.compile of the sampling network alone."""
    fuse_projections: bool = False
    """Query, key and value in one product, in the sampling network alone."""
    window: Literal["update", "iteration"] = "update"
    """How much is sampled ahead of training: one update or a whole iteration."""
    samples_per_iteration: Positive | None = None
    """Samples that are drawn at an iteration's start, of all ranks, and then used in epochs; null draws one for each pair."""

    @property
    def limits(self) -> list[str]:
        """Those keys that leave guidance out somewhere."""
        given = tuple(self.guidance_interval) != EVERYWHERE, self.unconditional_every > 1
        return [key for key, limits in zip(LIMITS, given, strict=True) if limits]

    @model_validator(mode="before")
    @classmethod
    def adapters_have_a_schedule_of_their_own(cls, values: Any) -> Any:
        """With an adapter, no guidance by default, and neither solver nor steps by default."""
        if not isinstance(values, dict) or values.get("adapter") is None:
            return values
        if lacking := [key for key in ("solver", "steps") if values.get(key) is None]:
            raise ValueError(f"sampler.{lacking[0]} is needed with sampler.adapter: as its author gives them, e.g. \"lcm\" and"
                             " 4 steps for an LCM LoRA, \"tcd\" for TCD, \"euler\" with spacing \"trailing\" for Lightning")
        return {"guidance_scale": 1.0} | values

    @model_validator(mode="after")
    def guidance_is_there_to_be_limited(self) -> "Sampler":
        """Refuse an empty interval, and limits of a guidance that there is not."""
        low, high = self.guidance_interval
        if low >= high:
            raise ValueError(f"sampler.guidance_interval [{low:g}, {high:g}] is empty: the first number must be below the second")
        if self.guidance_scale == 1 and self.limits:
            raise ValueError(f"sampler.{self.limits[0]} does not go with guidance_scale 1, which is no guidance; leave it out")
        return self

    @model_validator(mode="after")
    def adapter_fits(self) -> "Sampler":
        """Refuse what is for adapters without one, and an adapter on projections that are fused."""
        if self.adapter is None and self.solver in FEW_STEPS:
            raise ValueError(f"sampler.solver={self.solver!r} is for networks that were distilled to few steps: set an adapter,"
                             " or another solver")
        if self.adapter is None and self.adapter_scale != 1:
            raise ValueError(f"sampler.adapter_scale={self.adapter_scale:g} goes with sampler.adapter, which is not set")
        if self.adapter is not None and self.fuse_projections:
            raise ValueError("sampler.adapter does not go with sampler.fuse_projections, which replaces the projections that the"
                             " adapter sits beside; set it to false")
        return self


class Samples(Section):
    """Grids of the policy's samples, from fixed prompts and seeds, every `every` updates (0: never).

    `solver`, `steps` and `guidance_scale` hold for grids and for the samples of `evaluation`; null draws them as rollouts are
    drawn. An adapter of the sampler never shows: it is no part of the policy.
    """

    every: NotNegative = 0
    """Updates between two grids of samples; 0 draws none."""
    prompts: list[str] = []
    """Prompts of the grids; empty takes the first of the data."""
    per_prompt: Positive = 1
    """Samples of each prompt."""
    seed: Seed = 0
    """Seed of the grids' noise."""
    solver: Literal["ddim", "dpmsolver++", "pndm", "unipc", "euler"] | None = None
    """The solver of grids and evaluations; null is the sampler's."""
    steps: Positive | None = None
    """Their denoising steps; null: as many as the sampler's."""
    guidance_scale: Annotated[float, Field(ge=0)] | None = None
    """Their guidance; null is the sampler's, and only in its interval."""
