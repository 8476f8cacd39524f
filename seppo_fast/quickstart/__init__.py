"""The quickstart: a tiny Stable Diffusion made on the spot, and what SePPO does to it."""

from seppo_fast import broken_xformers  # noqa: F401  before diffusers' models
