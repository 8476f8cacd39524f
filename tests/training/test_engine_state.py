"""What an engine trains with is written by name and read again, at the same or another stage; what is not whole, or not its own, is
refused. With one rank, on two small layers; `test_other_ranks.py` has runs."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from seppo_fast.checksums import checksum
from seppo_fast.configfile import batch_plan, parse_config
from seppo_fast.errors import UserError
from seppo_fast.training.deepspeed_check import problems
from seppo_fast.training.engine import start_engine
from seppo_fast.training.engine_state import as_before, as_json, load, save
from seppo_fast.training.marker import declare
from seppo_fast.training.tensor_files import write_flat

Engine = Callable[..., DeepSpeedEngine]
BF16: dict[str, Any] = {"bf16": {"enabled": True}}
SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


def zero(stage: int, **more: Any) -> dict[str, Any]:
    # ZeRO-3's default bucket of 2 GB stays with each engine: after a dozen of them this process could start no other any more.
    return {"zero_optimization": {"stage": stage, "reduce_bucket_size": 100_000, **more}, "zero_allow_untested_optimizer": True}


def adam(**params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True, **params}}}


def of_torch(name: str, **params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": name, "params": {"lr": 1e-2, **params}}}


def schedule(name: str, **params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": name, "params": params}}


@pytest.fixture
def engine(ranks: Any) -> Engine:
    """`engine(seed, **sections)`: DeepSpeed's engine for two small layers, of which a bias is frozen, as a run starts it."""

    def make(seed: int = 0, width: int = 8, frozen: tuple[str, ...] = ("1.bias",), **sections: Any) -> DeepSpeedEngine:
        torch.manual_seed(seed)
        config = parse_config({"train_batch_size": 2, "gradient_clipping": 1.0, **adam(), "seppo": {"model": {"path": "none"}},
                               **sections})
        dtype = torch.bfloat16 if "bf16" in sections else torch.float32
        policy = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 3)).to(dtype)
        for name in frozen:
            policy.get_parameter(name).requires_grad_(False)
        with torch.no_grad():
            policy[1].bias.fill_(0.5)
        return start_engine(policy, config, batch_plan(config.deepspeed, 1))

    return make


def train(engine: DeepSpeedEngine, steps: int, first: int = 0) -> list[float]:
    """Losses of some updates on fixed numbers."""
    losses = []
    for number in range(first, first + steps):
        rows = torch.randn(2, 4, generator=torch.Generator().manual_seed(number)).to(next(engine.module.parameters()).dtype)
        loss = (engine(rows).float() - 1).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


@pytest.fixture
def written(ranks: Any, tmp_path: Path) -> Callable[[DeepSpeedEngine], Path]:
    """`written(engine)`: a folder with the engine's files and a marker."""

    def write(engine: DeepSpeedEngine) -> Path:
        folder = tmp_path / f"update_{len(list(tmp_path.iterdir())):08d}"
        folder.mkdir()
        declare(folder, save(engine, folder, ranks))
        return folder

    return write


SAME = {
    "fp32": {}, "zero 1": zero(1), "zero 2": zero(2), "zero 3": zero(3), "bf16": BF16, "bf16 zero 2": BF16 | zero(2),
    "bf16 zero 3": BF16 | zero(3), "bf16, sums in fp32": BF16 | SUMS, "amsgrad": adam(amsgrad=True) | zero(2),
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}} | zero(1),
    "offload": BF16 | zero(2, **OFFLOAD), "offload of all": BF16 | zero(3, **OFFLOAD, offload_param={"device": "cpu"}),
    "round robin": zero(2, round_robin_gradients=True), "aligned": zero(1, parameter_alignment=True),
    "sub groups": zero(3, sub_group_size=10, stage3_param_persistence_threshold=0),
    "SGD": of_torch("SGD", momentum=0.9), "plain SGD": of_torch("SGD") | zero(1),
    "RMSprop": of_torch("RMSprop", centered=True) | zero(2),
    "Adagrad": of_torch("Adagrad") | zero(3), "NAdam": of_torch("NAdam"), "ASGD": of_torch("ASGD") | zero(1),
    "Adamax": of_torch("Adamax"), "Rprop": of_torch("Rprop") | zero(1), "RAdam": of_torch("RAdam"),
    "Adadelta": of_torch("Adadelta") | zero(1),
    "warm-up": schedule("WarmupLR", warmup_num_steps=9, warmup_max_lr=1e-2, warmup_type="linear"),
    "one cycle": schedule("OneCycle", cycle_min_lr=1e-4, cycle_max_lr=1e-2, cycle_first_step_size=4) | zero(1),
    "steps": schedule("MultiStepLR", milestones=[4, 6]), "cosine": schedule("CosineAnnealingLR", T_max=6),
    "one cycle of torch": schedule("OneCycleLR", max_lr=0.1, total_steps=20),
    "cyclic": schedule("CyclicLR", base_lr=0.01, max_lr=0.1),
}


@pytest.mark.parametrize("name", SAME)
def test_what_is_saved_is_loaded_and_trains_on_in_the_same_way(name: str, engine: Engine, written: Any) -> None:
    first = engine(**SAME[name])
    train(first, 3)
    other = engine(1, **SAME[name])
    load(other, written(first))
    assert [(other.global_steps, other.global_samples, other.skipped_steps)] == [(3, 6, 0)]
    assert train(other, 4, 3) == train(first, 4, 3) and other.get_lr() == first.get_lr()


@pytest.mark.parametrize(("optimizer", "words"), [
    (of_torch("Adafactor"), "Adafactor keeps 'row_var', a tensor of the shape (2, 1), for a weight of the shape (2, 3)"),
    (of_torch("LBFGS"), "optimizer.type: LBFGS cannot make a step here"),
    (adam() | zero(3, offload_optimizer={"device": "nvme", "nvme_path": "/tmp"}), "optimizer.device: checkpoints cannot hold"),
    (adam() | zero(3, offload_optimizer={"device": "cpu", "ratio": 0.5}), "offload_optimizer.ratio: 0.5 makes a second optimizer"),
    (adam() | zero(1) | schedule("CosineAnnealingLR", T_max=6), "CosineAnnealingLR is PyTorch's, which DeepSpeed can use in"),
], ids=range(5))
def test_what_a_checkpoint_could_not_hold_is_refused_at_the_start(optimizer: dict[str, Any], words: str) -> None:
    assert [words in line for line in problems(optimizer)] == [True], problems(optimizer)


@pytest.mark.parametrize("optimizer", [
    *(sections for sections in SAME.values() if "optimizer" in sections), of_torch("Adam", fused=True), adam(capturable=True),
    {"optimizer": {"type": "Lion", "params": {"lr": 1e-4}}}], ids=str)
def test_what_it_can_hold_is_not(optimizer: dict[str, Any]) -> None:
    assert problems(optimizer) == []


@pytest.mark.parametrize("name", ["fp32", "zero 3", "bf16"])
def test_what_was_never_stepped(name: str, engine: Engine, written: Any) -> None:
    first, other = engine(**SAME[name]), engine(1, **SAME[name])
    load(other, written(first))
    assert train(other, 3) == train(first, 3)


CHAINS = {
    "fp32": [{}, zero(1), zero(3), zero(2), zero(3, sub_group_size=10), {}],
    "bf16": [BF16, BF16 | zero(3), BF16 | zero(2, **OFFLOAD), BF16 | zero(1, round_robin_gradients=True),
             BF16 | zero(3, **OFFLOAD, offload_param={"device": "cpu"}), BF16 | zero(2)],
    "SGD": [of_torch("SGD", momentum=0.9) | each for each in ({}, zero(1), zero(2), zero(3), {})],
    "NAdam": [of_torch("NAdam") | each for each in (zero(2), {}, zero(3))],
}


@pytest.mark.parametrize("name", CHAINS)
def test_from_stage_to_stage(name: str, engine: Engine, written: Any) -> None:
    """An update at each stage, the weights and the state taken along, against all updates at the first one."""
    losses, before = [], engine(**CHAINS[name][0])
    for number, sections in enumerate(CHAINS[name]):
        now = engine(1 + number, **sections)
        load(now, written(before))
        losses += train(now, 2, 2 * number)
        before = now
    assert losses == pytest.approx(train(engine(**CHAINS[name][0]), len(losses)), rel=1e-5 if name != "bf16" else 1e-2)


def test_the_files(engine: Engine, ranks: Any, tmp_path: Path) -> None:
    """Of what is trained alone, with true sums, as any program reads them; what is frozen stays out."""
    sums = save(engine(**BF16), tmp_path, ranks)
    assert list(sums) == ["rank_0.safetensors"] and sums["rank_0.safetensors"].xxh3_128 == checksum(tmp_path / "rank_0.safetensors")
    assert sums["rank_0.safetensors"].size == (tmp_path / "rank_0.safetensors").stat().st_size
    tensors = load_file(tmp_path / "rank_0.safetensors")
    assert {name: (tensor.dtype, len(tensor)) for name, tensor in tensors.items()} == {
        f"master:{name}": (torch.float32, size) for name, size in (("0.weight", 32), ("0.bias", 8), ("1.weight", 24))}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["engine.json", "rank_0.safetensors"]


def test_a_file_of_many_types_is_read_as_it_was_written(tmp_path: Path) -> None:
    tensors = {"half": torch.randn(3).bfloat16(), "whole": torch.randn(2, 3).mT, "number": torch.tensor(3), "none": torch.empty(0)}
    write_flat(tmp_path / "file.safetensors", tensors, {"a": 1})
    assert {name: tensor.tolist() for name, tensor in load_file(tmp_path / "file.safetensors").items()} == {
        name: tensor.flatten().tolist() for name, tensor in tensors.items()}
    write_flat(tmp_path / "none.safetensors", {}, {"a": 1})  # of a rank that has no part in the weights
    for name, size in (("file", len(tensors)), ("none", 0)):
        with safe_open(tmp_path / f"{name}.safetensors", "pt") as file:
            assert json.loads(file.metadata()["about"]) == {"a": 1} and len(file.keys()) == size


def test_the_last_bit_and_the_sign_of_a_zero_are_kept(engine: Engine, written: Any) -> None:
    first, other = engine(**zero(2)), engine(1, **zero(3))
    train(first, 1)
    masters = first.optimizer.single_partition_of_fp32_groups[0]
    masters.data[:3] = torch.tensor([-0.0, 1e-42, 1 + 2**-23])
    load(other, written(first))
    assert torch.equal(other.optimizer.fp32_partitioned_groups_flat[0].view(torch.int32)[: 64], masters.view(torch.int32)[: 64])


def test_the_state_of_a_loss_scale(engine: Engine, written: Any) -> None:
    """fp16's, which no CPU trains in."""
    first, other = engine(**zero(1)), engine(1, **zero(2))
    for each in (first, other):
        each.optimizer.loss_scaler = DynamicLossScaler(2.0**16, 1000, 1.0, 2, False)
    for overflow in (True, False, True, True):
        first.optimizer.loss_scaler.update_scale(overflow)
    load(other, written(first))
    assert vars(other.optimizer.loss_scaler) == vars(first.optimizer.loss_scaler) and first.optimizer.loss_scaler.cur_iter == 4


def test_weights_without_a_gradient_have_no_state(engine: Engine, written: Any) -> None:
    first, other = engine(), engine(1)
    first.module[0].bias.requires_grad_(False)
    train(first, 2)
    first.module[0].bias.requires_grad_(True)
    load(other, written(first))
    assert train(other, 3, 2) == train(first, 3, 2)


def test_steps_that_zero_would_count_together(engine: Engine, written: Any) -> None:
    first = engine()
    train(first, 2)
    first.optimizer.state[first.module[0].bias]["step"] += 1
    with pytest.raises(UserError, match="made other numbers of steps for .* resume at the stage of then"):
        load(engine(**zero(1)), written(first))


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[20] ^= 255
    file.write_bytes(content)


def changed(folder: Path, change: Callable[[dict[str, Any], list[dict[str, Any]]], Any]) -> None:
    """Write the rank's file anew, with other tensors or another description of them."""
    path = folder / "rank_0.safetensors"
    with safe_open(path, "pt") as file:
        tensors, about = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["about"])
    change(tensors, about)
    save_file(tensors, path, {"about": json.dumps(about)})


@pytest.mark.parametrize(("harm", "words"), [
    (lambda folder: damage(folder / "rank_0.safetensors"), "cannot be read"),
    (lambda folder: (folder / "rank_0.safetensors").write_bytes(b""), "cannot be read"),
    (lambda folder: (folder / "rank_0.safetensors").unlink(), "cannot be read"),
    (lambda folder: (folder / "engine.json").unlink(), "engine.json"),
    (lambda folder: (folder / "engine.json").write_text('{"optimizer": 5}'), "its engine.json cannot be read .optimizer: "),
    (lambda folder: changed(folder, lambda tensors, about: tensors.pop("master:0.bias")), "its files lack 0.bias"),
    (lambda folder: changed(folder, lambda tensors, about: tensors.update({"exp_avg:0.weight": torch.zeros(5)})),
     "its files lack a part of exp_avg of 0.weight"),
    (lambda folder: changed(folder, lambda tensors, about: about[0]["starts"].update({"0.weight": 1})), "lack a part of"),
    (lambda folder: changed(folder, lambda tensors, about: tensors.update({"master:else": torch.zeros(5)})), "else"),
], ids=range(9))
def test_what_is_not_whole(harm: Callable[[Path], Any], words: str, engine: Engine, written: Any) -> None:
    first = engine()
    train(first, 1)
    folder = written(first)
    harm(folder)
    with pytest.raises(UserError, match=words) as caught:
        load(engine(1), folder)
    assert str(folder) in str(caught.value) and "--resume PATH" in str(caught.value)


def test_only_what_the_marker_lists_is_read(engine: Engine, written: Any) -> None:
    first = engine()
    folder = written(first)
    (folder / "rank_1.safetensors").write_bytes((folder / "rank_0.safetensors").read_bytes())
    other = engine(1)
    load(other, folder)
    assert torch.equal(other.module[0].weight, first.module[0].weight)


def test_the_state_of_something_else(engine: Engine, written: Any) -> None:
    folder = written(engine())
    with pytest.raises(UserError, match="another seppo.model.lora: .* has in another shape 0.bias, 0.weight, 1.weight"):
        load(engine(width=9), folder)
    with pytest.raises(UserError, match="has the state of the optimizer AdamW, and this run's is SGD"):
        load(engine(**of_torch("SGD")), folder)
    fewer = engine(frozen=("0.bias", "1.bias"))
    with pytest.raises(UserError, match="it has beside them 0.bias"):
        load(fewer, folder)
    with pytest.raises(UserError, match="it lacks 0.bias"):
        load(engine(), written(fewer))


def test_what_could_not_be_read_again_is_refused_when_it_is_written(engine: Engine, ranks: Any, tmp_path: Path) -> None:
    odd = engine()
    odd.optimizer.param_groups[0]["note"] = Path("x")
    with pytest.raises(UserError, match=r"the optimizer's settings or the schedule hold pathlib.*, which could not be read again"):
        save(odd, tmp_path, ranks)
    odd = engine()
    odd.optimizer.state[odd.module[0].weight]["rows"] = torch.zeros(8, 1)
    with pytest.raises(UserError, match=r"AdamW keeps 'rows', a tensor of the shape \(8, 1\), for a weight of .*\(8, 4\)"):
        save(odd, tmp_path, ranks)


def test_adam_of_deepspeed_and_of_torch_are_one(engine: Engine, written: Any) -> None:
    """On a GPU, offload of the optimizer changes which one trains: they count steps in Python, or in a tensor."""
    first = engine(**zero(1))
    train(first, 2)
    folder = written(first)
    about = json.loads((folder / "engine.json").read_text())
    (folder / "engine.json").write_text(json.dumps(about | {"optimizer": "DeepSpeedCPUAdam"}))
    changed(folder, lambda tensors, about: about[0]["counts"].update(step=2))
    other = engine(1, **zero(2))
    load(other, folder)
    assert train(other, 3, 2) == train(first, 3, 2)
    other.optimizer.optimizer.__class__ = type("FusedAdam", (torch.optim.AdamW,), {"__module__": "deepspeed.ops.adam"})
    load(other, written(first))
    (state,) = other.optimizer.optimizer.state.values()
    assert state["step"] == 5 and type(state["step"]) is int


def test_values_of_json() -> None:
    value = {"betas": (0.9, 0.5), "milestones": {4: 1}, "name": "x", "nothing": None, "rates": [1e-3]}
    assert as_json(value) == {"betas": [0.9, 0.5], "milestones": {"items": [[4, 1]]}, "name": "x", "nothing": None, "rates": [1e-3]}
    back = json.loads(json.dumps(as_json(value)))
    assert {key: as_before(item, value[key]) for key, item in back.items()} == value
    with pytest.raises(TypeError, match="types.SimpleNamespace"):
        as_json([SimpleNamespace()])
