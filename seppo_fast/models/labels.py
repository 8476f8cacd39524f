"""The names of a model's settings, as the user knows them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Labels:
    """Names for messages: by default the keys of the training configuration, elsewhere the flags of a command."""

    path: str = "seppo.model.path"
    revision: str = "seppo.model.revision"
    variant: str = "seppo.model.variant"
    motion_adapter: str = "seppo.model.motion_adapter"
    frames: str = "seppo.data.video.frames"
    needs_image: str = 'Give a text-to-image model; only method "improvement" trains such a model further'  # what to do about one


KEYS = Labels()
OF_IMPROVEMENT = Labels("seppo.improvement.path", "seppo.improvement.revision", "seppo.improvement.variant")
OF_REFERENCE = Labels("seppo.reference_model.path", "seppo.reference_model.revision", "seppo.reference_model.variant")
