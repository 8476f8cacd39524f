"""Demonstrations -> cached latents and prompt embeddings -> rows in a seeded order."""

from seppo_fast.data.cache import build_cache
from seppo_fast.data.latents import CachedRows, LatentCache
from seppo_fast.data.order import Order, split
from seppo_fast.data.sources import open_source
from seppo_fast.data.video.stream import ClipStream

__all__ = ["CachedRows", "ClipStream", "LatentCache", "Order", "build_cache", "open_source", "split"]
