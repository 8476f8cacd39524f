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
