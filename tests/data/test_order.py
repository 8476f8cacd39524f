"""Slots to rows."""

import pytest

from seppo_fast.data import Order


def test_every_epoch_has_every_row_once_and_is_shuffled():
    order = Order(50, seed=3)
    epochs = [[order.row(epoch * 50 + place) for place in range(50)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs} | {tuple(range(50))}) == 4


def test_a_slot_means_the_same_row_whatever_was_asked_before():
    order, other = Order(7, seed=1), Order(7, seed=1)
    slots = [30, 2, 13, 6, 7, 2, 30]
    assert [order.row(slot) for slot in slots] == [Order(7, seed=1).row(slot) for slot in slots]
    assert [other.row(slot) for slot in reversed(range(31))] == [order.row(slot) for slot in reversed(range(31))]
    assert [Order(7, seed=2).row(slot) for slot in range(14)] != [order.row(slot) for slot in range(14)]


def test_one_row_and_none():
    assert [Order(1, 0).row(slot) for slot in range(3)] == [0, 0, 0]
    with pytest.raises(ValueError, match="n_rows must be at least 1, got 0"):
        Order(0, 0)
