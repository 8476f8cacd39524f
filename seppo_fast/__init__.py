"""SePPO: preference alignment of diffusion models without pairs and without a reward model."""

__version__ = "0.1.0"
