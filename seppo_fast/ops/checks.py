"""Checks of the arguments of `seppo_loss`; a message names the argument that is wrong."""

import math
from typing import Any

import torch
from torch import Tensor

FUSED_DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FLIPPERS = ("aaf", "indicator", "none")
REDUCTIONS = ("mean", "sum", "none")

Names = tuple[str, str, str]
PREDICTIONS = ("model_pred", "ref_pred", "target")  # the reference as predictions,
ERRORS = ("model_pred", "ref_mse", "target")  # or as their mean squared errors


def check_tensors(model_pred: Any, reference: Any, target: Any, names: Names = PREDICTIONS) -> bool:
    """Whether an input is fp64; all are on one device. `names` are what a message calls the three."""
    try:  # the usual case in a few comparisons; anything else is checked one by one below
        dtypes = (model_pred.dtype, reference.dtype, target.dtype)
        shape, target_shape, device = model_pred.shape, target.shape, model_pred.device
        scored = names[1] == "ref_mse"
        fits = reference.shape == shape[:1] and dtypes[1] is torch.float32 if scored else reference.shape == shape
        if (FUSED_DTYPES.issuperset(dtypes) and fits and len(shape) > 1 and not shape[0] % 2
                and (target_shape == shape or target_shape[0] * 2 == shape[0] and target_shape[1:] == shape[1:])
                and 0 not in shape and device == reference.device and device == target.device):
            return False
    except (AttributeError, IndexError, TypeError):
        pass
    _explain(model_pred, reference, target, names)
    return True


def _explain(model_pred: Tensor, reference: Tensor, target: Tensor, names: Names) -> None:
    policy_name, reference_name, target_name = names
    scored = reference_name == "ref_mse"
    named = tuple(zip(names, (model_pred, reference, target), strict=True))
    for name, tensor in named:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if scored and tensor is reference:
            if tensor.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"{name} must be float32 or float64, whatever the predictions' dtype, got {tensor.dtype}")
        elif tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {tensor.dtype}")
    shape = tuple(model_pred.shape)
    if len(shape) < 2:
        raise ValueError(f"{policy_name} must have shape (2B, ...) with at least 2 dimensions, got {shape}")
    if shape[0] % 2:
        raise ValueError(f"{policy_name} must hold winners, then as many losers: an even first dimension, got {shape}")
    if 0 in shape:
        raise ValueError(f"{policy_name} must not be empty, got {shape}")
    if scored and tuple(reference.shape) != shape[:1]:
        raise ValueError(f"{reference_name} must have shape {shape[:1]}, one error for each sample of {policy_name},"
                         f" got {tuple(reference.shape)}")
    if not scored and tuple(reference.shape) != shape:
        raise ValueError(f"{reference_name} must have {policy_name}'s shape {shape}, got {tuple(reference.shape)}")
    shared = (shape[0] // 2, *shape[1:])
    if tuple(target.shape) not in (shape, shared):
        raise ValueError(f"{target_name} must have {policy_name}'s shape {shape}, or {shared} when both halves share it,"
                         f" got {tuple(target.shape)}")
    for name, tensor in named[1:]:
        if tensor.device != model_pred.device:
            raise ValueError(f"{name} must be on {policy_name}'s device {model_pred.device}, got {tensor.device}")


def check_sign(sign: Any, model_pred: Tensor) -> None:
    """Refuse what is no sign for each pair; its values stay unread, because reading them would wait for the device."""
    if not isinstance(sign, Tensor):
        raise TypeError(f"sign must be a torch.Tensor, got {type(sign).__name__}")
    if sign.dtype is not torch.float32:
        raise TypeError(f"sign must be float32, got {sign.dtype}")
    pairs = model_pred.shape[0] // 2
    if tuple(sign.shape) != (pairs,):
        raise ValueError(f"sign must have shape {(pairs,)}, one for each pair of model_pred, got {tuple(sign.shape)}")
    if sign.device != model_pred.device:
        raise ValueError(f"sign must be on model_pred's device {model_pred.device}, got {sign.device}")


def check_options(beta: float, flipper: str, sft_weight: float, reduction: str, grad_scale: float | None) -> None:
    for name, number in (("beta", beta), ("sft_weight", sft_weight), ("grad_scale", grad_scale)):
        if isinstance(number, bool) or not isinstance(number, (int, float)) and (name != "grad_scale" or number is not None):
            raise TypeError(f"{name} must be a Python number, got {type(number).__name__}")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive and finite, got {beta}")
    if not 0 <= sft_weight < math.inf:
        raise ValueError(f"sft_weight must be finite and not negative, got {sft_weight}")
    if grad_scale is not None and not math.isfinite(grad_scale):
        raise ValueError(f"grad_scale must be finite, got {grad_scale}")
    if flipper not in FLIPPERS:
        raise ValueError(f"flipper must be one of {', '.join(FLIPPERS)}, got {flipper!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
