"""What the settings of a model are called where the person gave them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Labels:
    """For messages; by default the keys of a training's configuration, elsewhere flags."""

    path: str = "seppo.model.path"
    revision: str = "seppo.model.revision"
    variant: str = "seppo.model.variant"
    motion_adapter: str = "seppo.model.motion_adapter"
    frames: str = "seppo.data.video.frames"


KEYS = Labels()
OF_IMPROVEMENT = Labels("seppo.improvement.path", "seppo.improvement.revision", "seppo.improvement.variant")
OF_REFERENCE = Labels("seppo.reference_model.path", "seppo.reference_model.revision", "seppo.reference_model.variant")
