"""The request: what an evaluation draws and scores."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from seppo_fast.evaluation.candidates import Candidate
from seppo_fast.evaluation.generate import Drawing
from seppo_fast.evaluation.prompts import Prompt
from seppo_fast.evaluation.report.table import groups_of

# The scales of improvement models: as flags and settings name them -> as config.Improvement does.
SCALES = {"improvement_guidance_scale": "guidance_scale", "image_guidance_scale": "image_guidance_scale"}


@dataclass(frozen=True)
class Request:
    """An evaluation to do. `weights`: score or score.part -> file or folder; `real`: the folder of the real clips."""

    candidates: list[Candidate]
    prompts: list[Prompt]
    scores: list[str]
    weights: dict[str, str]
    drawing: Drawing
    out: Path
    real: Path | None
    batch: int

    @property
    def video(self) -> bool:
        return self.drawing.frames is not None

    @property
    def improves(self) -> bool:
        """Whether a model improves another's samples."""
        return any(candidate.source for candidate in self.candidates)

    @cached_property
    def models(self) -> list[str]:
        return [candidate.name for candidate in self.candidates]

    @cached_property
    def groups(self) -> list[str]:
        """All prompts, and the sets that they come from."""
        return groups_of([prompt.sets for prompt in self.prompts])
