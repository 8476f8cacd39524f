"""Clips that are decoded and encoded while the policy is trained: where their frames are drawn anew in every epoch."""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seppo_fast import config
from seppo_fast.capturing import no_capture
from seppo_fast.data.latents import CachedRows, Images, PromptCache
from seppo_fast.data.prompt_encoder import PromptEncoder
from seppo_fast.data.video.clips import Clip, clip
from seppo_fast.data.video.decoder import Decoder
from seppo_fast.data.video.prefetcher import Prefetcher
from seppo_fast.data.video.probe import Facts
from seppo_fast.errors import UserError
from seppo_fast.models import Conditions

MOST_CLIPS, MOST_BYTES = 64, 1 << 30  # decoded and waiting


class ClipStream:
    """Rows of clips by (row, epoch) alone: what was announced, the batch and the order change nothing, so resuming is free.

    A file that was usable when it was probed and is not any more is a `UserError`, not skipped: another clip in its place would
    make it another run.
    """

    def __init__(self, images: Images, prompts: PromptCache | PromptEncoder, root: Path, model: Any, data: config.Data, *,
                 seed: int, fingerprint: str, content: str | None, shape: tuple[int, ...], device: str | torch.device,
                 say: Callable[[str], None]) -> None:
        self.images, self.prompts, self.texts, self.root = images.dataset, images.prompts, prompts, root
        self.model, self.data, self.seed = model, data, seed
        self.fingerprint, self.content, self.shape, self.device = fingerprint, content, shape, torch.device(device)
        self.vae: Any = None
        self.own = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.decoder = Decoder(data, device, say)
        clip_bytes = 4 * 3 * data.resolution**2 * data.video.frames
        self.ahead = Prefetcher(self._decode, max(1, min(MOST_CLIPS, MOST_BYTES // clip_bytes)), data.workers)

    def __len__(self) -> int:
        return len(self.images)

    def prefetch(self, indices: Sequence[int], epochs: Sequence[int]) -> None:
        """These rows of these epochs come next: a hint, which returns at once."""
        self.ahead.announce(places(indices, epochs))

    @torch.no_grad()
    def rows(self, indices: Sequence[int], epochs: Sequence[int]) -> CachedRows:
        """Rows in the order asked for, as they are in their epochs: mean and std (B, C, F, h, w), fp32 on the CPU."""
        asked = places(indices, epochs)
        rows = [row for row, _ in asked]
        clips = self.ahead.take(asked)
        table = self.images[rows]
        keys, captions = (table.column(name).to_pylist() for name in ("key", "caption"))
        # Clip by clip, so that a clip's latents do not depend on its company: kernels differ with the batch.
        latents = [self._encode(pixels, key) for pixels, key in zip(clips, keys, strict=True)]
        mean, std = (torch.stack(values) for values in zip(*latents, strict=True))
        return CachedRows(mean, std, None, None, self.prompts.of_row[rows].tolist(), captions, keys)

    def embeddings(self, prompts: Sequence[int]) -> Conditions:
        """The conditions of some prompts, fp32, (B, ...) each; prompt 0 is "", the unconditional one."""
        return self.texts(prompts)

    def close(self) -> None:
        """Ends the threads."""
        self.ahead.close()
        self.decoder.close()

    def _decode(self, items: list[tuple[int, int]]) -> list[Tensor | UserError]:
        clips = [self._clip(row, epoch) for row, epoch in items]
        with no_capture:
            return self.decoder(clips)

    def _clip(self, row: int, epoch: int) -> Clip:
        table = self.images[[row]]
        key, text = table.column("key")[0].as_py(), json.loads(table.column("clip")[0].as_py())
        return clip(key, self.root / text["file"], Facts.of(text["facts"]), text["time_lapse"], self.data, self.seed, epoch)

    def _encode(self, pixels: Tensor, key: str) -> tuple[Tensor, Tensor]:
        """(C, F, h, w) mean and std of a clip's frames, on the CPU."""
        with self._on_own_stream():
            if self.vae is None:  # it stays: the next micro-batch needs it, too
                self.vae = self.model.load_vae(self.device)
            mean, std = self.model.encode(self.vae, pixels[None].to(self.device), self.data.encode_batch_size)
            mean, std = mean[0].cpu(), std[0].cpu()
        if not bool(mean.isfinite().all() & std.isfinite().all()):
            raise UserError(f"{key}: its latents are not finite; take the row out of seppo.data.source, or check the VAE")
        return mean, std

    def _on_own_stream(self) -> AbstractContextManager:
        return torch.cuda.stream(self.own) if self.own is not None else nullcontext()


def places(indices: Sequence[int], epochs: Sequence[int]) -> list[tuple[int, int]]:
    """(row, epoch) of each."""
    return [(int(row), int(epoch)) for row, epoch in zip(indices, epochs, strict=True)]
