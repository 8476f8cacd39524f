"""The SePPO loss as one function. Imports nothing from the rest of the package, so any trainer can use it alone."""

from seppo_fast.ops.loss import SeppoStats, available_backends, per_sample_mse, seppo_loss

__all__ = ["SeppoStats", "available_backends", "per_sample_mse", "seppo_loss"]
