"""What is remembered of an operator is what it gives: shapes, strides, dtypes, storages of their own, and views as views."""

from typing import Any

import pytest
import torch
from torch import Tensor

from seppo_fast import meta
from seppo_fast.meter import Meter

ATEN = torch.ops.aten


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(("operator", "args", "others"), [
    (ATEN.add.Tensor, (empty(4, 8), empty(8)), (empty(4, 8), empty(4, 1))),
    (ATEN.add.Tensor, (empty(4, 8), empty(4, 8)), (empty(4, 8), empty(8, 4).t())),  # the same shapes, other strides
    (ATEN.mul.Tensor, (empty(4), empty(4)), (empty(4, dtype=torch.bfloat16), empty(4, dtype=torch.bfloat16))),
    (ATEN.mul.Tensor, (empty(4, dtype=torch.long), 1), (empty(4, dtype=torch.long), 1.0)),  # 1 == 1.0, and the dtypes differ
    (ATEN.native_group_norm.default, (empty(2, 8, 4, 4), empty(8), empty(8), 2, 8, 16, 4, 1e-5),
     (empty(2, 8, 4, 4), empty(8), empty(8), 2, 8, 16, 2, 1e-5)),
    (ATEN.convolution.default, (empty(1, 4, 8, 8), empty(6, 4, 3, 3), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
     (empty(1, 4, 8, 8), empty(6, 4, 3, 3), None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1)),
    (ATEN._unsafe_view.default, (empty(4, 8), [32]), (empty(4, 8), [2, 16])),  # a view that its schema does not declare
    (ATEN.view.default, (empty(4, 8), [32]), (empty(4, 8), [2, 16])),
    (ATEN.add_.Tensor, (empty(4, 8), empty(8)), (empty(4, 8), empty(4, 1))),
], ids=lambda value: str(value) if not isinstance(value, tuple) else "")
def test_the_second_call_is_as_the_first(operator: Any, args: tuple, others: tuple) -> None:
    for given in (args, others):
        expected = looks(operator(*given), given)
        for _ in range(2):
            result = meta.call(operator, given, {})
            assert looks(result, given) == expected
            assert result is not meta.call(operator, given, {}) or operator is ATEN.add_.Tensor


def looks(result: Any, given: tuple) -> list[Any]:
    """Of each tensor of a result: layout, dtype, bytes of its storage, and whether that is an argument's."""
    storages = {id(tensor.untyped_storage()) for tensor in given if isinstance(tensor, Tensor)}
    found = result if isinstance(result, tuple) else (result,)
    return [(tensor.shape, tensor.stride(), tensor.dtype, tensor.untyped_storage().nbytes(),
             id(tensor.untyped_storage()) in storages)
            for tensor in found]


def test_what_computes_is_not_remembered() -> None:
    """On the CPU a second call gives the second call's numbers."""
    with Meter():
        assert [(torch.ones(2) * factor).sum().item() for factor in (1.0, 1.0, 3.0)] == [2, 2, 6]
        noise = torch.rand(8)
        assert not torch.equal(noise, torch.rand(8))


def test_twice_the_same_network_takes_the_same() -> None:
    def taken() -> tuple[int, int]:
        network = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.GroupNorm(4, 8), torch.nn.SiLU(), torch.nn.Conv2d(8, 4, 3))
        network = network.to("meta")
        with Meter() as meter:
            network(empty(2, 4, 16, 16)).backward(empty(2, 4, 12, 12))
        return meter.peak, meter.flops

    assert taken() == taken() and min(taken()) > 0
