"""What seppo_loss and per_sample_mse say to arguments that they cannot take."""

import numpy as np
import pytest
import torch

from seppo_fast.ops import available_backends, loss, native, per_sample_mse, seppo_loss


def tensors(shape=(4, 3), device="cpu", **changes):
    names = ("model_pred", "ref_pred", "target")
    return {name: torch.zeros(shape, device=device) for name in names} | changes


def on_meta(**changes):
    return tensors(device="meta", **changes)


def given(ref_mse, **changes):
    return tensors() | {"ref_pred": None, "ref_mse": ref_mse} | changes


@pytest.mark.parametrize("arguments,error,message", [
    (tensors(model_pred=np.zeros((4, 3))), TypeError, "model_pred must be a torch.Tensor, got ndarray"),
    (tensors(target=None), TypeError, "target must be a torch.Tensor, got NoneType"),
    (tensors(model_pred=torch.zeros(4, 3, dtype=torch.int64)), TypeError, "model_pred must be .*, got torch.int64"),
    (tensors(ref_pred=torch.zeros(4, 3, dtype=torch.complex64)), TypeError, "ref_pred must be .*, got torch.complex64"),
    (tensors(target=torch.zeros(4, 3, dtype=torch.bool)), TypeError, "target must be .*, got torch.bool"),
    (tensors((4,)), ValueError, r"model_pred .* at least 2 dimensions, got \(4,\)"),
    (tensors(()), ValueError, r"model_pred .* at least 2 dimensions, got \(\)"),
    (tensors((5, 3)), ValueError, r"model_pred .* even first dimension, got \(5, 3\)"),
    (tensors((0, 3)), ValueError, r"model_pred must not be empty, got \(0, 3\)"),
    (tensors((4, 0)), ValueError, r"model_pred must not be empty, got \(4, 0\)"),
    (tensors(ref_pred=torch.zeros(2, 3)), ValueError, r"ref_pred must have model_pred's shape \(4, 3\), got \(2, 3\)"),
    (tensors(target=torch.zeros(4, 1)), ValueError, r"target must have .* \(4, 3\), or \(2, 3\) .*, got \(4, 1\)"),
    (tensors(target=torch.zeros(1, 3)), ValueError, r"target must have .* got \(1, 3\)"),
    (tensors(target=torch.zeros(4, 3, device="meta")), ValueError, "target must be on .* device cpu, got meta"),
    (tensors(ref_pred=torch.zeros(4, 3, device="meta")), ValueError, "ref_pred must be on .* cpu, got meta"),
    (tensors(ref_mse=torch.zeros(4)), TypeError, "as ref_pred or their mean squared errors as ref_mse, got both"),
    (given(None), TypeError, "as ref_pred or their mean squared errors as ref_mse, got neither"),
    (given(torch.zeros(4), target=None), TypeError, "target must be a torch.Tensor, got NoneType"),
    (given(0.5), TypeError, "ref_mse must be a torch.Tensor, got float"),
    (given(torch.zeros(4, dtype=torch.bfloat16)), TypeError, "ref_mse must be float32 or float64, .*, got torch.bfloat16"),
    (given(torch.zeros(2)), ValueError, r"ref_mse must have shape \(4,\), one error for each .*, got \(2,\)"),
    (given(torch.zeros(4, 3)), ValueError, r"ref_mse must have shape \(4,\), .* got \(4, 3\)"),
    (given(torch.zeros(4, device="meta")), ValueError, "ref_mse must be on .* cpu, got meta"),
    (tensors(beta=0.0), ValueError, "beta must be positive and finite, got 0.0"),
    (tensors(beta=-1), ValueError, "beta must be positive and finite, got -1"),
    (tensors(beta=float("nan")), ValueError, "beta must be positive and finite, got nan"),
    (tensors(beta=float("inf")), ValueError, "beta must be positive and finite, got inf"),
    (tensors(beta="2000"), TypeError, "beta must be a Python number, got str"),
    (tensors(beta=torch.tensor(2.0)), TypeError, "beta must be a Python number, got Tensor"),
    (tensors(beta=True), TypeError, "beta must be a Python number, got bool"),
    (tensors(sft_weight=-0.1), ValueError, "sft_weight must be finite and not negative, got -0.1"),
    (tensors(sft_weight=float("nan")), ValueError, "sft_weight must be finite and not negative, got nan"),
    (tensors(sft_weight=float("inf")), ValueError, "sft_weight must be finite and not negative, got inf"),
    (tensors(sft_weight=None), TypeError, "sft_weight must be a Python number, got NoneType"),
    (tensors(sign=[1.0, 1.0]), TypeError, "sign must be a torch.Tensor, got list"),
    (tensors(sign=torch.ones(2).double()), TypeError, "sign must be float32, got torch.float64"),
    (tensors(sign=torch.ones(4)), ValueError, r"sign must have shape \(2,\), one for each pair of model_pred, got \(4,\)"),
    (tensors(sign=torch.ones(2, device="meta")), ValueError, "sign must be on model_pred's device cpu, got meta"),
    (tensors(flipper="AAF"), ValueError, "flipper must be one of aaf, indicator, none, got 'AAF'"),
    (tensors(reduction=None), ValueError, "reduction must be one of mean, sum, none, got None"),
    (tensors(grad_scale="1"), TypeError, "grad_scale must be a Python number, got str"),
    (tensors(grad_scale=float("nan")), ValueError, "grad_scale must be finite, got nan"),
    (on_meta(backend="native"), ValueError, "backend 'native' cannot run on meta tensors here: .*; use .*reference"),
    (on_meta(backend="triton"), ValueError, "backend 'triton' cannot run on meta tensors here: .*; use .*reference"),
    (tensors(backend="cuda"), ValueError, "backend must be 'auto' or one of .*, got 'cuda'; available: .*reference"),
])
def test_messages(arguments, error, message):
    with pytest.raises(error, match=message):
        seppo_loss(**arguments)


@pytest.mark.parametrize("pred,target,error,message", [
    (None, torch.zeros(4, 3), TypeError, "^pred must be a torch.Tensor, got NoneType"),
    (torch.zeros(4, 3), torch.zeros(3, 3), ValueError, r"^target must have pred's shape \(4, 3\), .* got \(3, 3\)"),
    (torch.zeros(3, 3), torch.zeros(3, 3, device="meta"), ValueError, "^target must be on pred's device cpu, got meta"),
    (torch.zeros(4, 3, dtype=torch.int32), torch.zeros(4, 3), TypeError, "^pred must be float32, .*, got torch.int32"),
])
def test_messages_of_per_sample_mse(pred, target, error, message):
    with pytest.raises(error, match=message):
        per_sample_mse(pred, target)


def test_every_gpu_is_looked_at_by_itself(monkeypatch):
    """A machine may have an old one beside a new one; the first that was asked for does not speak for the others."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: ((7, 5), (8, 0))[1 if index is None else index])
    monkeypatch.delitem(native.LIBRARIES, "cuda")
    loss._find_out.cache_clear()
    try:
        old, new = available_backends("cuda:0"), available_backends("cuda:1")
        assert old["triton"] == "it wants compute capability 8.0 or newer, this GPU has 7.5" and new["triton"] == "available"
        assert available_backends("cuda") == new
    finally:
        loss._find_out.cache_clear()
