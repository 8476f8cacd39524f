"""The set of samples of an iteration: complete, of the right origin, finite; walked through in epochs."""

import json
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file

from seppo_fast.errors import UserError
from seppo_fast.training.rollouts import SampleSet

FIRST = torch.tensor([0])


def drawn(numbers, seed=0):
    tensors = [torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(1000 * seed + number)) for number in numbers]
    return dict(zip(("loser", "winner"), torch.stack(tensors, 1), strict=True))


@pytest.fixture
def store(tmp_path, ranks):
    """`store(origin)`: 10 samples an iteration of 16 slots, and what it said."""
    said = []

    def make(origin="this run", size=10, least=4):
        made = SampleSet(tmp_path / "rollouts", size, 16, least, 7, ranks, lambda k: {"policy": f"{origin} {k}"}, said.append)
        made.said = said
        return made

    return make


def fill(store, k=1, most=4, change=lambda numbers, batch: batch):
    """Draw what is missing; the batches that were."""
    batches = [list(numbers) for numbers in store.missing(k, range(16), most)]
    for numbers in batches:
        store.add(numbers, change(numbers, drawn(numbers)))
    assert store.missing(k, range(16), most) == []
    return batches


def test_every_sample_comes_once_an_epoch_as_it_was_drawn(store):
    samples = store()
    assert fill(samples, k=2) == [[10, 11, 12, 13], [14, 15, 16, 17], [18, 19]]
    numbers = [int(samples.get(slot)["number"]) for slot in range(16, 32)]
    assert sorted(numbers[:10]) == list(range(10, 20)) and len(set(numbers[10:])) == 6
    assert numbers == [samples.number(slot) for slot in range(16, 32)] and numbers[:10] != sorted(numbers[:10])
    for slot, number in zip(range(16, 32), numbers, strict=True):
        rollout, wanted = samples.get(slot), drawn([number])
        assert all(torch.equal(rollout[name], wanted[name][0]) for name in ("loser", "winner"))


def test_what_is_there_is_found_by_another_process_whatever_its_batch_size(store):
    fill(store())
    again = store()
    assert fill(again, most=7) == []
    assert [again.number(slot) for slot in range(16)] == [int(again.get(slot)["number"]) for slot in range(16)]


def damage(path, how):
    if how == "torn":
        path.write_bytes(path.read_bytes()[:-5])
    elif how == "a bit":
        data = bytearray(path.read_bytes())
        data[-3] ^= 4
        path.write_bytes(data)
    elif how == "gone":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "another's":
        save_file(load_file(path), path, {"rollouts": json.dumps({"samples": "all"})})


@pytest.mark.parametrize("how", ["torn", "a bit", "gone", "empty", "another's"])
def test_a_file_that_is_not_as_it_was_written_is_drawn_anew(how, store, tmp_path):
    fill(store())
    damage(tmp_path / "rollouts" / "iteration_00001" / "0000000004.safetensors", how)
    again = store()
    assert fill(again) == [[4, 5, 6, 7]]
    assert all(torch.equal(again.get(slot)["loser"], drawn([again.number(slot)])["loser"][0]) for slot in range(16))


def test_samples_of_another_policy_are_never_used(store):
    fill(store())
    assert len(fill(store("another run"))) == 3


def test_a_sample_that_is_not_finite_is_dropped_and_said(store):
    def broken(numbers, batch):
        for i, number in enumerate(numbers):
            if number in (2, 9):
                batch["winner"][i, 0, 0, 0] = torch.nan
        return batch

    samples = store()
    fill(samples, change=broken)
    assert samples.said == ["iteration 1: 2 of 10 samples are not finite, and are dropped"]
    for each in (samples, store()):  # a resumed run drops the same
        fill(each)
        assert set(Counter(each.number(slot) for slot in range(16))) == {0, 1, 3, 4, 5, 6, 7, 8}
        assert all(bool(each.get(slot)["winner"].isfinite().all()) for slot in range(16))


def test_too_few_finite_samples_end_the_run(store):
    samples = store(least=9)
    with pytest.raises(UserError, match="only 8 of 10 samples are finite, fewer than the 9 pairs of an update"):
        fill(samples, change=lambda numbers, batch: {name: tensor if 4 in numbers else tensor.index_fill(0, FIRST, torch.inf)
                                                     for name, tensor in batch.items()})


def test_old_sets_are_removed(store, tmp_path):
    samples = store()
    for k in (1, 2, 3):
        fill(samples, k)
    samples.remove_old([2, 3])
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == ["iteration_00002", "iteration_00003"]


def test_a_full_disk_leaves_no_half_file_and_says_what_to_do(store, tmp_path, monkeypatch):
    samples = store()
    (numbers, *_) = samples.missing(1, range(16), 4)

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("seppo_fast.disk.flush", full)
    with pytest.raises(UserError, match="samples of iteration 1 cannot be written .*No space left.*make room under"):
        samples.add(numbers, drawn(numbers))
    assert list((tmp_path / "rollouts").rglob("*.safetensors")) == []


def test_a_file_that_vanishes_in_training_is_named(store, tmp_path):
    samples = store()
    fill(samples)
    for path in (tmp_path / "rollouts" / "iteration_00001").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"iteration_00001.*cannot be read.*--resume auto, which draws it again"):
        samples.get(0)
