"""The pool of past policies: how one is picked, where it is kept, and what a broken file does."""

import gc
import hashlib
import inspect
import os
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from seppo_fast.errors import UserError
from seppo_fast.reference import Pool, pick

GIGABYTE = 10**9


def network(seed, width=6):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(4, width, 3), nn.GroupNorm(2, width), nn.Conv2d(width, 4, 3))


def weights(module):
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def state(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(module, expected):
    return all(torch.equal(p, expected[name]) for name, p in module.named_parameters())


# pick


def test_latest_and_initial():
    assert [pick("latest", k, 3) for k in (1, 2, 9)] == [0, 1, 8]
    assert [pick("initial", k, 3) for k in (1, 2, 9)] == [0, 0, 0]


@pytest.mark.parametrize("k", [1, 2, 7, 20])
def test_uniform_over_all_past_policies(k):
    draws = 4000
    counts = Counter(pick("uniform", k, seed) for seed in range(draws))
    assert set(counts) == set(range(k))
    expected = draws / k
    chi2 = sum((counts[i] - expected) ** 2 / expected for i in range(k))
    # Mean k-1, variance 2(k-1): five standard deviations. The seeds are fixed, so this never fails by chance.
    assert chi2 < k - 1 + 5 * (2 * (k - 1)) ** 0.5 + 1e-9


def test_iterations_of_one_run_are_drawn_independently():
    """Within one run, k = 1, 2, ...: the relative position is uniform too, and not the same each time."""
    places = [pick("uniform", k, seed) / k for seed in range(60) for k in range(50, 100)]
    histogram = torch.histc(torch.tensor(places), bins=10, min=0, max=1)
    assert (histogram - 300).abs().max() < 90
    assert len({pick("uniform", 10**6, seed) for seed in range(50)}) == 50


@pytest.mark.slow
def test_uniform_is_the_same_on_every_rank_and_blind_to_global_state():
    # The package's own imports, diffusers among them, are ten seconds, and pick needs none of them.
    script = "import sys, types, torch; torch.manual_seed(9); package = types.ModuleType('seppo_fast.reference');" \
             "package.__path__ = [sys.argv[1]]; sys.modules[package.__name__] = package;" \
             "from seppo_fast.reference.pool import pick; print([pick('uniform', k, 11) for k in range(1, 30)])"
    torch.manual_seed(5)
    here = str([pick("uniform", k, 11) for k in range(1, 30)])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONHASHSEED": "77"}
    there = subprocess.run([sys.executable, "-c", script, str(Path(inspect.getfile(pick)).parent)], env=environment, check=True,
                           capture_output=True, text=True).stdout.strip()
    assert here == there
    before = torch.get_rng_state()
    pick("uniform", 5, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_pick_refuses():
    with pytest.raises(ValueError, match="k counts iterations from 1, got 0"):
        pick("uniform", 0, 0)
    with pytest.raises(ValueError, match="strategy must be uniform, latest or initial, got 'newest'"):
        pick("newest", 3, 0)


# Pool


@pytest.mark.parametrize("host", [0, GIGABYTE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_goes_in_comes_out(tmp_path, dtype, host):
    pool, reference = Pool(tmp_path / "pool", dtype, host), network(99)
    policies = [network(seed) for seed in range(4)]
    for i, policy in enumerate(policies):
        pool.add(i, weights(policy), write=True)
    assert pool.indices() == [0, 1, 2, 3]
    for i in (2, 0, 3, 3, 1):
        pool.load_into(i, reference)
        assert same(reference, {n: p.to(dtype).float() for n, p in state(policies[i]).items()})
    stored = load_file(tmp_path / "pool" / "policy_00002.safetensors")
    assert {t.dtype for t in stored.values()} == {dtype} and stored.keys() == weights(policies[2]).keys()


def test_a_policy_is_a_copy(tmp_path):
    pool, policy, reference = Pool(tmp_path, torch.float32, GIGABYTE), network(0), network(1)
    pool.add(0, weights(policy), write=True)
    before = state(policy)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(1)
    pool.load_into(0, reference)
    assert same(reference, before)
    with torch.no_grad():
        for p in reference.parameters():
            p.zero_()
    pool.load_into(0, reference)
    assert same(reference, before), "training on a loaded reference must not change the pool"


def test_twenty_policies_cost_the_model_no_more_than_one(tmp_path):
    """The reference's storage is allocated once: no address changes, and no tensor outlives a load."""
    pool, reference = Pool(tmp_path, torch.float32, 0), network(99)
    addresses = [p.data_ptr() for p in reference.parameters()]

    def alive():
        gc.collect()
        tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
        # The compiler keeps some that have no bytes, with sides that are symbols, for the tests that ran before in this process.
        return sum(t.nbytes for t in tensors if all(type(side) is int for side in t.shape))

    pool.add(0, weights(network(0)), write=True)
    pool.load_into(0, reference)
    one = alive()
    for i in range(1, 20):
        pool.add(i, weights(network(i)), write=True)
        pool.load_into(i, reference)
    for i in range(20):
        pool.load_into(i, reference)
        assert same(reference, state(network(i)))
    assert [p.data_ptr() for p in reference.parameters()] == addresses
    assert alive() <= one


def test_host_memory_is_limited_and_the_least_used_goes_first(tmp_path):
    size = sum(p.nbytes for p in network(0).parameters())
    pool, reference = Pool(tmp_path, torch.float32, 2 * size), network(99)
    for i in range(2):
        pool.add(i, weights(network(i)), write=True)
    pool.load_into(0, reference)  # 1 is now the one used longest ago
    pool.add(2, weights(network(2)), write=True)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    assert pool.indices() == [0, 2]
    pool.load_into(0, reference)
    assert same(reference, state(network(0)))
    with pytest.raises(UserError, match=r"policy_00001.safetensors: past policy 1 is not there \(.* has \[0, 2\]\)"):
        pool.load_into(1, reference)


def test_ranks_that_do_not_write_read_what_rank_0_wrote(tmp_path):
    writer, reader = (Pool(tmp_path, torch.bfloat16, host) for host in (0, 0))
    for i in range(3):
        writer.add(i, weights(network(i)), write=True)
        reader.add(i, weights(network(i)), write=False)
    first, second = network(98), network(99)
    writer.load_into(1, first)
    reader.load_into(1, second)
    assert same(first, state(second)) and reader.indices() == [0, 1, 2]
    keeping = Pool(tmp_path / "elsewhere", torch.bfloat16, GIGABYTE)
    keeping.add(0, weights(network(0)), write=False)
    assert not (tmp_path / "elsewhere").exists() and keeping.indices() == [0]


def test_bytes_repeat(tmp_path):
    digests = set()
    for run in ("a", "b"):
        items = list(weights(network(0)).items())
        Pool(tmp_path / run, torch.bfloat16, 0).add(7, dict(items if run == "a" else items[::-1]), write=True)
        digests.add(hashlib.sha256((tmp_path / run / "policy_00007.safetensors").read_bytes()).hexdigest())
    assert len(digests) == 1
    assert os.listdir(tmp_path / "a") == ["policy_00007.safetensors"]


def test_layout_of_the_model_does_not_matter(tmp_path):
    policy = network(0).to(memory_format=torch.channels_last)
    reference = network(1).to(memory_format=torch.channels_last)
    for host in (0, GIGABYTE):
        pool = Pool(tmp_path, torch.float32, host)
        pool.add(0, weights(policy), write=True)
        pool.load_into(0, reference)
        assert same(reference, state(policy))
        assert reference[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_adapter_only(tmp_path):
    """With LoRA only the trained weights are stored and loaded; what is frozen is not touched."""
    policy, reference = network(0), network(1)
    for module in (policy, reference):
        module[0].requires_grad_(False)
        module[1].requires_grad_(False)
    frozen = reference[0].weight.clone()
    pool = Pool(tmp_path, torch.float32, 0)
    pool.add(0, weights(policy), write=True)
    assert load_file(tmp_path / "policy_00000.safetensors").keys() == {"2.weight", "2.bias"}
    pool.load_into(0, reference)
    assert torch.equal(reference[2].weight, policy[2].weight) and torch.equal(reference[0].weight, frozen)


def test_low_precision_reference(tmp_path):
    pool, reference = Pool(tmp_path, torch.float32, 0), network(1).bfloat16()
    pool.add(0, weights(network(0)), write=True)
    pool.load_into(0, reference)
    assert same(reference, {n: p.bfloat16() for n, p in state(network(0)).items()})


def test_truncate_forgets_later_policies_and_torn_files(tmp_path):
    pool = Pool(tmp_path, torch.float32, GIGABYTE)
    for i in range(5):
        pool.add(i, weights(network(i)), write=True)
    (tmp_path / "policy_00005.safetensors.tmp").write_bytes(b"half")
    (tmp_path / ".tmpAbC").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    other = Pool(tmp_path, torch.float32, 0)
    assert other.indices() == [0, 1, 2, 3, 4], "a torn file is not a policy"
    pool.truncate(2, write=False)
    assert len(list(tmp_path.glob("policy_*.safetensors"))) == 5
    pool.truncate(2)
    assert pool.indices() == [0, 1, 2] == other.indices()
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", *(f"policy_0000{i}.safetensors" for i in range(3))]
    with pytest.raises(UserError, match="past policy 3 is not there"):
        pool.load_into(3, network(9))
    pool.add(3, weights(network(33)), write=True)
    reference = network(9)
    pool.load_into(3, reference)
    assert same(reference, state(network(33)))


def test_adding_again_replaces(tmp_path):
    for host in (0, GIGABYTE):
        pool, reference = Pool(tmp_path / str(host), torch.float32, host), network(9)
        pool.add(0, weights(network(0)), write=True)
        pool.add(0, weights(network(1)), write=True)
        pool.load_into(0, reference)
        assert same(reference, state(network(1)))
    size = sum(p.nbytes for p in network(0).parameters())
    small = Pool(tmp_path / "small", torch.float32, 2 * size)
    for i in (0, 1, 0, 2):
        small.add(i, weights(network(i)), write=False)
    assert small.indices() == [0, 2], "what was added again counts as used"


def test_reading_ahead(tmp_path):
    """What was prefetched is loaded without its file, counts as used last, and a fault in it shows when it is loaded."""
    size = sum(p.nbytes for p in network(0).parameters())
    writer, reference = Pool(tmp_path, torch.float32, 0), network(99)
    for i in range(4):
        writer.add(i, weights(network(i)), write=True)
    pool = Pool(tmp_path, torch.float32, 2 * size)
    pool.prefetch(3)
    pool.prefetch(2)  # instead
    pool.load_into(1, reference)  # another in between
    assert same(reference, state(network(1)))
    pool.load_into(2, reference)
    assert same(reference, state(network(2)))
    (tmp_path / "policy_00002.safetensors").unlink()
    pool.prefetch(7)  # not there yet
    pool.prefetch(1)
    pool.load_into(0, reference)
    assert same(reference, state(network(0))), "another may be taken than was thought"
    pool.load_into(2, reference)
    assert same(reference, state(network(2)))
    (tmp_path / "policy_00003.safetensors").write_bytes(b"torn")
    pool.prefetch(3)
    with pytest.raises(UserError, match="policy_00003.safetensors: cannot be read"):
        pool.load_into(3, reference)
    writer.prefetch(0)  # does not fit
    (tmp_path / "policy_00000.safetensors").unlink()
    with pytest.raises(UserError, match="past policy 0 is not there"):
        writer.load_into(0, reference)


def test_what_is_added_or_forgotten_meanwhile_is_not_taken_from_the_file(tmp_path):
    pool, reference = Pool(tmp_path, torch.float32, GIGABYTE), network(99)
    Pool(tmp_path, torch.float32, 0).add(0, weights(network(0)), write=True)
    pool.prefetch(0)
    pool.add(0, weights(network(1)), write=False)
    pool.load_into(0, reference)
    assert same(reference, state(network(1)))
    Pool(tmp_path, torch.float32, 0).add(1, weights(network(0)), write=True)
    pool.prefetch(1)
    pool.truncate(0)
    with pytest.raises(UserError, match="past policy 1 is not there"):
        pool.load_into(1, reference)


@pytest.mark.parametrize("host", [0, GIGABYTE])
def test_a_swap_says_what_it_cost(tmp_path, host):
    pool = Pool(tmp_path, torch.bfloat16, host)
    pool.add(0, weights(network(0)), write=True)
    assert pool.last_swap is None
    pool.load_into(0, network(1))
    assert pool.last_swap.bytes == 2 * sum(p.numel() for p in network(0).parameters()) and pool.last_swap.seconds > 0


def test_an_empty_pool(tmp_path):
    pool = Pool(tmp_path / "none", torch.float32, 0)
    assert pool.indices() == []
    pool.truncate(3)
    with pytest.raises(UserError, match=r"the pool has \[\]"):
        pool.load_into(0, network(0))


@pytest.mark.parametrize("damage", ["truncated", "header", "empty", "garbage"])
def test_broken_file(tmp_path, damage):
    pool, reference = Pool(tmp_path, torch.float32, 0), network(1)
    pool.add(0, weights(network(0)), write=True)
    path = tmp_path / "policy_00000.safetensors"
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[:-100], "header": whole[:20], "empty": b"", "garbage": b"\xff" * 500}[damage])
    before = state(reference)
    with pytest.raises(UserError, match="policy_00000.safetensors: cannot be read"):
        pool.load_into(0, reference)
    assert same(reference, before), "a broken file must not leave half a policy"


@pytest.mark.parametrize("host", [0, GIGABYTE])
def test_policy_of_another_model(tmp_path, host):
    def stored(contents):
        pool = Pool(tmp_path, torch.float32, host)
        pool.add(0, contents, write=True)
        return pool

    reference = network(1)
    before = state(reference)
    cases = [(weights(network(0, width=8)), r"0\.bias has shape \(8,\), the model's has \(6,\)"),
             ({**weights(network(0)), "lora_A": torch.zeros(2)}, r"weights that the model does not have: lora_A \(1\)"),
             ({"0.weight": network(0)[0].weight}, r"lacks trained weights: 0\.bias, 1\.bias, 1\.weight \.\.\. \(5\)")]
    for contents, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            stored(contents).load_into(0, reference)
        assert "policy_00000.safetensors" in str(caught.value)
        assert same(reference, before)


def test_a_full_disk_stops_with_a_message_and_leaves_the_others(tmp_path):
    """A file size limit stands in for a full disk: the write fails in the middle, in the operating system."""
    pool = Pool(tmp_path, torch.float32, 0)
    pool.add(0, {"w": torch.ones(1000)}, write=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(UserError, match="policy_00001.safetensors: past policy 1.* cannot be written") as caught:
            pool.add(1, {"w": torch.ones(100_000)}, write=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"make room under {tmp_path}" in str(caught.value) and pool.indices() == [0]
    assert os.listdir(tmp_path) == ["policy_00000.safetensors"]
    assert torch.equal(load_file(tmp_path / "policy_00000.safetensors")["w"], torch.ones(1000))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "pool").write_text("a file is in the way")
    with pytest.raises(UserError, match="cannot be written"):
        Pool(tmp_path / "pool", torch.float32, 0).add(0, {"w": torch.ones(1)}, write=True)


def test_a_moved_parameter_is_noticed(tmp_path):
    class Moving(nn.Parameter):
        """Stands for any wrapper that answers `copy_` with new storage."""

        def copy_(self, other, non_blocking=False):
            self.data = other.clone()
            return self

    save_file({"w": torch.ones(3)}, tmp_path / "policy_00000.safetensors")
    module = nn.Module()
    module.w = Moving(torch.zeros(3))
    with pytest.raises(AssertionError, match="w was moved"):
        Pool(tmp_path, torch.float32, 0).load_into(0, module)
