"""Ratios and targets of the loss benchmark, from rows that were not measured."""

import pytest
import torch

from benchmarks.loss_cases import DTYPES, floor_bytes, needed_bytes, rotating_cases, sets
from benchmarks.loss_summary import TARGETS, ratios, row_of, targets
from benchmarks.timing import in_turn, peak_bytes


def rows(pairs: int, dtype: str, what: str = "forward_backward", shape: str = "sd15", **us: float) -> list[dict]:
    labels = {"what": what, "shape": shape, "pairs": pairs, "dtype": dtype, "floor_bytes": 1000}
    return [row_of(labels, name, [value - 1, value, value + 1]) for name, value in us.items()]


def whole_run(**us: float) -> list[dict]:
    """Every case of the CPU's targets, all alike."""
    us = {"eager": 100.0, "compile": 40.0, "liger_style": 30.0, "native": 16.0, "copy": 12.0} | us
    found = [row for pairs in (2, 4, 8, 16, 32, 64) for dtype in ("fp32", "bf16") for row in rows(pairs, dtype, **us)]
    del us["copy"]
    return found + [row for pairs in (1, 2) for row in rows(pairs, "fp32", "host", "tiny", **us)]


def test_ratios_are_in_units_of_the_fused_loss_and_of_the_copy() -> None:
    ratio, = ratios(rows(2, "fp32", eager=50.0, compile=20.0, liger_style=15.0, triton=5.0, native=10.0, copy=8.0))
    assert ratio["fused"] == "native" and ratio["fused_us"] == 10.0
    assert (ratio["eager_over_fused"], ratio["compile_over_fused"], ratio["liger_style_over_fused"]) == (5.0, 2.0, 1.5)
    assert ratio["fused_over_copy"] == 1.25
    assert ratio["eager_over_fused_p10"] == pytest.approx(49.2 / 9.2, abs=0.01) and "fused_gradients" not in ratio
    assert ratios(rows(2, "fp32", eager=50.0)) == []  # nothing fused was measured


def test_bytes_a_microsecond_are_gigabytes_a_second() -> None:
    assert rows(2, "fp32", native=10.0)[0]["gb_s"] == 0.1  # 1000 bytes in 10 us


def test_targets_that_hold_everywhere_are_met() -> None:
    judged = targets(ratios(whole_run()), "cpu")
    assert [target["met"] for target in judged] == [True] * len(TARGETS["cpu"])
    assert all(target["missed_at"] == target["not_measured"] == [] for target in judged)


def test_one_bad_case_misses_a_target_and_is_named() -> None:
    found = ratios(whole_run())
    slow = next(row for row in found if (row["what"], row["pairs"], row["dtype"]) == ("forward_backward", 64, "bf16"))
    slow |= {"compile_over_fused": 1.99, "fused_over_copy": 1.61}
    eager, compiled, copied, host = targets(found, "cpu")
    assert eager["met"] and host["met"]
    for target, worst in ((compiled, 1.99), (copied, 1.61)):
        assert target["met"] is False and target["worst"] == worst
        assert target["where"] == "64 pairs bf16" and target["missed_at"] == ["64 pairs bf16"]


def test_a_case_outside_a_target_does_not_count() -> None:
    found = ratios(whole_run() + rows(256, "bf16", eager=10.0, compile=10.0, liger_style=10.0, native=16.0, copy=1.0)
                   + rows(8, "bf16", "forward", eager=10.0, compile=10.0, liger_style=10.0, native=16.0)
                   + rows(8, "bf16", shape="sdxl", eager=10.0, compile=10.0, liger_style=10.0, native=16.0, copy=1.0))
    assert all(target["met"] for target in targets(found, "cpu"))


def test_a_case_that_is_missing_leaves_a_target_undecided_but_not_one_that_is_missed() -> None:
    found = [row for row in ratios(whole_run()) if row["dtype"] == "fp32"]
    eager, *_, host = targets(found, "cpu")
    assert eager["met"] is None and "64 pairs bf16" in eager["not_measured"] and host["met"] is True
    found = [row for row in ratios(whole_run(eager=40.0)) if row["dtype"] == "fp32"]
    assert targets(found, "cpu")[0]["met"] is False
    assert [target["met"] for target in targets([], "cpu")] == [None] * len(TARGETS["cpu"])


def test_buffers_rotate_through_what_was_asked_and_do_not_share_memory() -> None:
    dtype = DTYPES["bf16"]
    floor = floor_bytes("sd15", 1, dtype)
    assert floor == 4 * 2 * 16384 * 2
    count = sets(1 << 20, 3 * floor // 4)
    cases = rotating_cases("sd15", 1, dtype, "cpu", count)
    assert sum(x.nbytes for case in cases for x in case) >= 1 << 20
    assert len({x.untyped_storage().data_ptr() for case in cases for x in case}) == 3 * count
    assert all([x.requires_grad for x in case] == [True, False, False] and case[0].is_leaf for case in cases)
    assert needed_bytes("sd15", 1, dtype, 1 << 20) > 2 << 20


def test_every_call_is_counted_but_the_first_of_a_block_and_gets_an_index_of_its_own() -> None:
    seen: list[tuple[str, int]] = []
    calls = {name: lambda i, name=name: seen.append((name, i)) for name in ("a", "b", "c")}
    times = in_turn(calls, 0.0, block=2, together=5, least=3)
    assert {name: len(values) for name, values in times.items()} == {"a": 6, "b": 6, "c": 6}
    assert [index for _, index in seen] == list(range(4 * 3 * 11))
    orders = {tuple(name for name, _ in seen[turn * 33:(turn + 1) * 33:11]) for turn in range(4)}
    assert len(orders) > 1 and all(sorted(order) == ["a", "b", "c"] for order in orders)


def test_peak_memory_is_what_lives_at_one_time() -> None:
    source = torch.ones(1 << 20)

    def call() -> None:
        first = source + 1  # 4 MB
        second = first + 1  # 8 MB
        del first
        (second + 1).sum()  # 8 MB again

    assert 8 << 20 <= peak_bytes(call) < 9 << 20
