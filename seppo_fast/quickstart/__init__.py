"""The quickstart: it makes a tiny Stable Diffusion and shows what SePPO does to it."""

from seppo_fast import broken_xformers  # noqa: F401  before diffusers' models
