"""Ratios, targets and README block of the loss benchmark, from invented rows."""

import copy
import json

import pytest

from benchmarks.loss.cases import DTYPES, floor_bytes, needed_bytes, rotating_cases, sets
from benchmarks.loss.readme import loss
from benchmarks.loss.summary import TARGETS, ratios, row_of, targets


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


def loss_result() -> dict:
    """What `python -m benchmarks.loss` writes, of 2 pairs in bf16: native 10 us, eager 61, compile 25, copy 8."""
    label = {"what": "forward_backward", "shape": "sd15", "pairs": 2, "dtype": "bf16", "floor_bytes": 524_288}
    rows = [label | {"implementation": name, "median_us": us, "p10_us": us, "calls": 9, "peak_gradients": 1.0}
            for name, us in (("eager", 61.0), ("compile", 25.0), ("liger_style", 20.0), ("native", 10.0), ("copy", 8.0))]
    rows[0]["peak_gradients"] = 10.0
    del rows[-1]["peak_gradients"]
    found = ratios(rows)
    return {"machine": {"cpu": "Some CPU", "cores": 4, "threads": 2, "load_average_at_start": 0.1, "load_average_at_end": 1.9},
            "versions": {"torch": "2.99"}, "commit": "abc123", "settings": {"rotate_mb": 960}, "rows": rows, "ratios": found,
            "targets": targets(found, "cpu")}


def test_the_loss_block_of_a_machine_that_measured_nothing_says_so(tmp_path) -> None:
    assert loss(tmp_path).startswith("On the CPU: not measured yet")


def test_the_loss_block_has_the_measured_figures(tmp_path) -> None:
    result = loss_result()
    (tmp_path / "loss_cpu.json").write_text(json.dumps(result))
    text = loss(tmp_path)
    assert "| SD-1.5, 512x512: 2 | 10 | 6.1x | 2.5x | 1.25 |" in text.splitlines()
    assert "in gradient tensors: fused loss 1.00, eager 10.00, compile 1.00." in text
    assert "- at least 5x faster than eager, 2 to 64 pairs: not measured to the end, worst 6.10 at 2 pairs bf16" in text
    assert "Some CPU, 2 of 4 cores, torch 2.99, commit `abc123`, load average 0.1 to 1.9" in text
    slower = copy.deepcopy(result)
    slower["ratios"][0]["eager_over_fused"] = 4.9
    slower["targets"] = targets(slower["ratios"], "cpu")
    (tmp_path / "loss_cpu.json").write_text(json.dumps(slower))
    assert "2 to 64 pairs: **missed**, worst 4.90 at 2 pairs bf16" in loss(tmp_path)


def test_the_loss_block_has_a_table_for_each_gpu(tmp_path) -> None:
    suite = {"machine": {"gpu": "Some GPU", "torch": "2.99", "driver": "1.2"}, "commit": "abc123",
             "baselines": {"rows": [{"shape": "sd15", "pairs": 8, "dtype": "bf16", "us":
                                     {"eager": 700.0, "compile": 150.0, "liger_style": 140.0, "native": 70.0, "copy": 9.0}}]},
             "bandwidth": {"rows": [{"shape": "sd15", "pairs": 1024, "dtype": "bf16", "native_us": 95.0, "triton_us": 90.0,
                                     "copy_us": 93.0}]},
             "memory": {"rows": [{"shape": "sd15", "pairs": 256, "dtype": "bf16", "implementation": name, "gradients": value}
                                 for name, value in (("eager", 10.0), ("native", 1.0), ("triton", 1.5))]}}
    (tmp_path / "gpu_suite_some.json").write_text(json.dumps(suite))
    lines = loss(tmp_path).splitlines()
    assert any("Some GPU" in line for line in lines)
    assert "Peak memory beyond the inputs, in gradient tensors: fused loss 1.00, eager 10.00." in lines
    for row in ("8 | 70 | 10.0x | 2.1x | - |", "1024 | - | - | - | 1.02 |"):
        assert f"| SD-1.5, 512x512: {row}" in lines
    assert "- at least 8x faster than eager, 1 to 8 pairs: not measured to the end, worst 10.00 at 8 pairs bf16" in lines


@pytest.mark.parametrize("partial", ["baselines", "bandwidth", "memory"])
def test_a_gpu_suite_cut_short_still_makes_a_block(tmp_path, partial) -> None:
    (tmp_path / "gpu_suite.json").write_text(json.dumps({"machine": {"gpu": "Some GPU", "torch": "2.99", "driver": ""},
                                                         "commit": "abc", partial: {"outcome": "stopped after 9 s"}}))
    assert loss(tmp_path).count("not measured to the end") == 4
