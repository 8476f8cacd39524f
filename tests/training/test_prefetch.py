"""The thread that is one micro-batch ahead: order, errors, and that it ends."""

import threading

import pytest
import torch

from seppo_fast.training.prefetch import prefetched

CPU = torch.device("cpu")


def test_in_order_and_one_ahead() -> None:
    made = []
    second = threading.Event()

    def make(item: int) -> int:
        made.append(item)
        if item == 1:
            second.set()
        return item * item

    results = prefetched(make, range(5), CPU)
    assert next(results) == 0
    assert second.wait(10), "nothing is made while the caller has the first"
    assert 2 not in made, "more than one ahead"
    assert list(results) == [1, 4, 9, 16] and made == [0, 1, 2, 3, 4]
    assert list(prefetched(make, [], CPU)) == []


def test_made_in_another_thread() -> None:
    assert set(prefetched(lambda item: threading.get_ident(), range(3), CPU)) - {threading.get_ident()}


def test_an_error_arrives_where_its_item_would() -> None:
    results = prefetched(lambda item: 1 // item, [2, 1, 0, 3], CPU)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_no_thread_is_left_when_the_caller_gives_up() -> None:
    before = threading.active_count()
    results = prefetched(lambda item: item, range(100), CPU)
    next(results)
    assert threading.active_count() == before + 1
    results.close()
    assert threading.active_count() == before
