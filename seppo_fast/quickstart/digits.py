"""scikit-learn's 1,797 scanned digits (8x8, 17 grey levels) as captioned pictures, and the faulty crawl that the base learns."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from seppo_fast.seeds import generator

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = tuple(f"a handwritten {word}" for word in WORDS)
RESOLUTION = 16


@dataclass(frozen=True)
class Digits:
    """Pictures `(N, 3, 16, 16)` in [0, 1] and the digit that each shows, `(N,)` of dtype long."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def split_digits(seed: int, held_out: int = 697) -> tuple[Digits, Digits]:
    """The digits that models may learn from, and the ones held out for the judge."""
    scans = load_digits()
    small = torch.tensor(scans.images, dtype=torch.float32)[:, None] / 16
    pixels = F.interpolate(small, size=(RESOLUTION, RESOLUTION), mode="bilinear", align_corners=False)
    pixels = pixels.expand(-1, 3, -1, -1)
    labels = torch.tensor(scans.target, dtype=torch.long)
    order = torch.randperm(len(labels), generator=generator(seed, "split"))
    kept, judged = order[held_out:], order[:held_out]
    return Digits(pixels[kept].contiguous(), labels[kept]), Digits(pixels[judged].contiguous(), labels[judged])


def degrade(pixels: Tensor, random: torch.Generator) -> Tensor:
    """Pictures `(B, 3, H, W)` in [0, 1] as bad scans: blurred, low in contrast, on a grey page and grainy."""
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    page = 0.1 + 0.2 * torch.rand(len(pixels), 1, 1, 1, generator=random)
    # The grain is two pixels wide: the VAE's 2x2 down-sampling would lose finer grain.
    height, width = pixels.shape[-2:]
    grain = torch.randn(len(pixels), 1, height // 2, width // 2, generator=random)
    grain = grain.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return (page + 0.6 * blurred + 0.08 * grain).clamp(0, 1)


def sloppy_crawl(digits: Digits, seed: int, copies: int, wrong_captions: float, degraded: float) -> Digits:
    """`copies` of every digit, a share of them degraded and a share captioned as another digit."""
    random = generator(seed, "crawl")
    pixels, labels = digits.pixels.repeat(copies, 1, 1, 1), digits.labels.repeat(copies)
    bad = torch.rand(len(labels), generator=random) < degraded
    pixels[bad] = degrade(pixels[bad], random)
    wrong = torch.rand(len(labels), generator=random) < wrong_captions
    labels[wrong] = (labels[wrong] + torch.randint(1, 10, (int(wrong.sum()),), generator=random)) % 10
    return Digits(pixels, labels)
