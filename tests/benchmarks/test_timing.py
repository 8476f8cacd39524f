"""How the benchmarks time calls and count memory."""

import torch

from benchmarks.timing import in_turn, peak_bytes


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
