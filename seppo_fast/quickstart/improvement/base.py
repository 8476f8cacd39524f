"""The base model of this quickstart: it learns the losers, a fifth of them under a wrong caption."""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from seppo_fast.quickstart.base import Recipe, train_on
from seppo_fast.quickstart.digits import Digits, split_digits
from seppo_fast.quickstart.fitting import make_once
from seppo_fast.quickstart.improvement.pairs import make_pairs
from seppo_fast.seeds import generator

COPIES = 4


def recipe_of(seed: int) -> Recipe:
    """How this base is made: all of its pictures are degraded."""
    return Recipe(seed=seed, copies=COPIES, wrong_captions=0.2, degraded=1.0)


def make_base(folder: Path, recipe: Recipe) -> bool:
    """Build the pipeline directory unless `folder` holds what this recipe and code give; True when it was built."""
    code = ("base.py", "fitting.py", "digits.py", "tokenizer.py", "improvement/base.py", "improvement/pairs.py")
    return make_once(folder, recipe, code, train_base)


def train_base(recipe: Recipe) -> StableDiffusionPipeline:
    """A pipeline that draws losers; its VAE, like any published one, has also seen better pictures."""
    pairs = make_pairs(split_digits(recipe.seed)[0], recipe.seed, recipe.copies)
    random, labels = generator(recipe.seed, "crawl"), pairs.losers.labels.clone()
    wrong = torch.rand(len(labels), generator=random) < recipe.wrong_captions
    labels[wrong] = (labels[wrong] + torch.randint(1, 10, (int(wrong.sum()),), generator=random)) % 10
    pictures = torch.cat([split_digits(recipe.seed)[0].pixels, pairs.winners.pixels, pairs.losers.pixels])
    return train_on(Digits(pairs.losers.pixels, labels), pictures, recipe)
