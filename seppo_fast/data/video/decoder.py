"""Who decodes which clip: DALI where it can here, PyAV for the rest, and one line on why."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from seppo_fast import config
from seppo_fast.data.content import sha256_of
from seppo_fast.data.metadata import stamp_of, written_at
from seppo_fast.data.video import dali, pyav
from seppo_fast.data.video.clips import Clip
from seppo_fast.data.video.probe import need_av
from seppo_fast.errors import UserError


class Decoder:
    """Clips to pixels. For one thread at a time; PyAV's share runs in `data.workers` threads of its own."""

    def __init__(self, data: config.Data, device: str | torch.device, say: Callable[[str], None]) -> None:
        need_av()
        self.choice, self.say = data.video.decoder, say
        self.explained: set[tuple[str, str]] = set()
        installed = self.choice != "pyav" and dali.is_installed()
        if self.choice == "dali" and not installed:
            raise UserError("seppo.data.video.decoder='dali': DALI is not installed here; pip install 'seppo-fast[video]' on Linux,"
                            " or set it to 'auto' or 'pyav'")
        device = torch.device(device)
        self.dali = dali.Dali(data.resolution, data.workers, data.workers, device) if installed else None
        # Files that are damaged for DALI alone. By file, not by kind: what a clip becomes must not depend on those before it.
        self.refused: set[Path] = set()
        self.same: dict[Path, int | None] = {}  # files whose content is as it was, by when they were written
        self.threads = ThreadPoolExecutor(data.workers, thread_name_prefix="pyav")

    def __call__(self, clips: Sequence[Clip]) -> list[Tensor | UserError]:
        """The frames of each clip, (F, 3, R, R) fp32 in [-1, 1] on the CPU, or what is wrong with it."""
        results: dict[int, Tensor | UserError | Future] = {}
        for place, clip in enumerate(clips):
            changed = self.changed(clip)
            if changed is not None:
                results[place] = changed
            elif (why := self.not_by_dali(clip)) is not None:
                if clip.file not in self.refused:
                    self.explain(clip.facts.codec, why, why)
                results[place] = self.threads.submit(by_pyav, clip)
        left = [place for place in range(len(clips)) if place not in results]
        for place, pixels in zip(left, self.by_dali([clips[place] for place in left]), strict=True):
            results[place] = pixels if pixels is not None else self.threads.submit(by_pyav, clips[place])
        return [found.result() if isinstance(found := results[place], Future) else found for place in range(len(clips))]

    def changed(self, clip: Clip) -> UserError | None:
        """What is wrong when the file is not the one that was probed; where its times have changed, its content is compared."""
        facts, written = clip.facts, written_at(clip.file)
        if written is not None and written == self.same.get(clip.file):
            return None
        if tuple(stamp_of(clip.file)) == facts.stamp and facts.written in (None, written):
            return None
        if facts.content is not None and sha256_of(clip.file) == facts.content:
            self.same[clip.file] = written
            return None
        return UserError(f"{clip.key}: {clip.file} was deleted or changed since it was looked at; another video in its place would"
                         " make another run of this one. Restore it, or start anew in another seppo.output_dir")

    def by_dali(self, clips: Sequence[Clip]) -> list[Tensor | None]:
        """The clips that DALI decodes; a file that DALI could not decode is not tried again."""
        found = self.dali.decode(clips) if clips else []
        for pixels, clip in zip(found, clips, strict=True):
            if pixels is None:
                self.refused.add(clip.file)
                self.explain(clip.facts.codec, f"DALI could not decode {clip.file.name} ({clip.facts.format})", "a file")
        return found

    def not_by_dali(self, clip: Clip) -> str | None:
        """Why a clip goes through PyAV; None when DALI takes it."""
        if self.dali is None:
            return "seppo.data.video.decoder is 'pyav'" if self.choice == "pyav" else "DALI is not installed"
        if clip.file in self.refused:
            return f"DALI could not decode {clip.file.name}"
        return self.dali.refuses(clip.facts)

    def explain(self, codec: str, why: str, about: str) -> None:
        """Print why PyAV decodes a codec, once for each reason."""
        if (codec, about) not in self.explained:
            self.explained.add((codec, about))
            self.say(f"videos: {codec} is decoded by PyAV on the CPU: {why}")

    def close(self) -> None:
        """Ends the threads."""
        self.threads.shutdown(cancel_futures=True)


def by_pyav(clip: Clip) -> Tensor | UserError:
    """The frames, or the error for a file that could be decoded when it was probed."""
    try:
        return pyav.decode(clip)
    except MemoryError:
        raise
    except Exception as error:  # FFmpeg's many, a short file, a vanished one
        return UserError(f"{clip.key}: {clip.file} was in order when it was looked at, and cannot be decoded now ({error}). Is the"
                         " disk or network in order? Go on with --resume auto when it is")
