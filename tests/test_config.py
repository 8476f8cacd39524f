"""Every configuration error is one readable line with the key's full path, what is expected, and a near key."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from seppo_fast.config import METHODS
from seppo_fast.configfile import CONFIGS, DEEPSPEED_KEYS, batch_plan, load_config, parse_config
from seppo_fast.errors import UserError
from seppo_fast.training.engine import check_engine_config, precision

RAW: dict[str, Any] = {
    "train_batch_size": 8, "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "seppo": {"model": {"path": "somewhere"}},
}


def changed(**overrides: Any) -> dict[str, Any]:
    """RAW with `**{"seppo.beta": 0}` written over it."""
    raw = copy.deepcopy(RAW)
    for path, value in overrides.items():
        *parents, last = path.split(".")
        node = raw
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return raw


def message(raw: dict[str, Any]) -> str:
    """What the person reads; the trainer's check of DeepSpeed's part included, as before any model loads."""
    with pytest.raises(UserError) as caught:
        config = parse_config(raw)
        check_engine_config(config, batch_plan(config.deepspeed, 1))
    return str(caught.value)


def test_the_configuration_that_the_others_change_is_right() -> None:
    config = parse_config(RAW)
    check_engine_config(config, batch_plan(config.deepspeed, 1))
    assert config.seppo.beta == 2000.0 and config.seppo.reference == "uniform" and config.seppo.flipper == "aaf"


@pytest.mark.parametrize(("path", "right"), [
    ("tran_batch_size", "train_batch_size"),
    ("gradient_cliping", "gradient_clipping"),
    ("zero_optimisation", "zero_optimization"),
    ("Optimizer", "optimizer"),
    ("seppo.betta", "seppo.beta"),
    ("seppo.smapler", "seppo.sampler"),
    ("seppo.sampler.step", "seppo.sampler.steps"),
    ("seppo.model.lora.alhpa", "seppo.model.lora.alpha"),
    ("seppo.data.max_skiped", "seppo.data.max_skipped"),
    ("beta", "seppo.beta"),  # right, in the wrong place
    ("seppo.guidance_scale", "seppo.sampler.guidance_scale"),
    ("seppo.gradient_clipping", "gradient_clipping"),
    ("zero_optimization.stge", "zero_optimization.stage"),
    ("zero_optimization.offload_optimizer.devise", "zero_optimization.offload_optimizer.device"),
    ("zero_optimization.stage3_prefetch_bucket", "zero_optimization.stage3_prefetch_bucket_size"),
    ("bf16.enable", "bf16.enabled"),
    ("fp16.los_scale", "fp16.loss_scale"),
    ("tensorboard.output_pth", "tensorboard.output_path"),
    ("data_types.grad_acum_dtype", "data_types.grad_accum_dtype"),
    ("optimizer.params.weight_dcay", "optimizer.params.weight_decay"),
])
def test_an_unknown_key_is_named_with_the_nearest_right_one(path: str, right: str) -> None:
    assert f"{path}: unknown key; did you mean {right}?" in message(changed(**{path: 1}))


def test_a_key_like_no_other_gets_no_advice() -> None:
    assert message(changed(**{"seppo.xyzzy": 1})).endswith("seppo.xyzzy: unknown key")


@pytest.mark.parametrize(("path", "value", "wanted"), [
    ("seppo.beta", 0, "greater than 0 (got 0)"),
    ("seppo.beta", -1.0, "greater than 0 (got -1.0)"),
    ("seppo.sft_weight", -0.5, "greater than or equal to 0 (got -0.5)"),
    ("seppo.sft_weight", float("nan"), "finite number (got nan)"),
    ("seppo.sft_weight", True, "valid number (got True)"),
    ("seppo.beta", float("inf"), "finite"),
    ("seppo.beta", "2000", "valid number (got '2000')"),
    ("seppo.beta", "Auto", "expected a valid number (got 'Auto'), or \"auto\""),
    ("seppo.beta", None, "expected a valid number (got None), or \"auto\""),
    ("seppo.sampler.steps", 0, "greater than 0"),
    ("seppo.sampler.steps", 2.5, "valid integer (got 2.5)"),
    ("seppo.sampler.guidance_scale", -0.5, "greater than or equal to 0"),
    ("seppo.sampler.guidance_scale", float("nan"), "finite"),
    ("seppo.sampler.solver", "dim", "'ddim', 'dpmsolver++', 'pndm', 'unipc', 'euler', 'lcm' or 'tcd' (got 'dim')"),
    ("seppo.sampler.batch_size", 0, "batch_size: expected a whole number above 0, or \"auto\" (got 0)"),
    ("seppo.sampler.batch_size", "atuo", "batch_size: expected a whole number above 0, or \"auto\" (got 'atuo')"),
    ("seppo.sampler.batch_size", 2.5, "batch_size: expected a whole number above 0, or \"auto\" (got 2.5)"),
    ("seppo.sampler", 3, "expected a section"),
    ("seppo.model.lora", {"rank": 0}, "greater than 0"),
    ("seppo.model.lora", 4, "expected a section"),
    ("seppo.model.lora", {"dropout": 1.0}, "less than 1"),
    ("seppo.model.path", "", "not an empty text"),
    ("seppo.output_dir", "", "not an empty text"),
    ("seppo.method", "sepo", "'seppo', 'spin', 'ditto', 'dpo', 'iterative_dpo', 'sft' or 'improvement' (got 'sepo')"),
    ("seppo.iterations", 0, "greater than 0"),
    ("seppo.updates_per_iteration", True, "valid integer (got True)"),
    ("seppo.caption_dropout", 1.5, "less than or equal to 1"),
    ("seppo.data.resolution", 500, "multiple of 8 (got 500)"),
    ("seppo.data.flip", "yes", "valid boolean (got 'yes')"),
    ("seppo.data.max_skipped", 5, "less than or equal to 1"),
    ("seppo.timesteps", {"density": "lognormal"}, "'logit_normal' or 'uniform' (got 'lognormal')"),
    ("seppo.timesteps", {"mean": 99}, "less than or equal to 10 (got 99)"),
    ("seppo.timesteps", {"std": 0.0}, "greater than 0"),
    ("seppo.timesteps", {"shift": "modl"}, "timesteps.shift: expected a valid number (got 'modl'), or \"model\""),
    ("seppo.timesteps", {"shift": 1e30}, "timesteps.shift: expected"),
    ("seppo.timesteps", {"density": "uniform", "mean": 1.0}, "do not go with density='uniform'"),
    ("seppo.pool.dtype", "fp16", "'auto', 'bf16' or 'fp32'"),
    ("seppo.checkpoint.keep_last", 0, "greater than 0"),
    ("seppo.max_nonfinite", 0, "greater than 0"),
    ("seppo.seed", -1, "greater than or equal to 0"),
    ("train_batch_size", 0, "a whole number above 0 (got 0)"),
    ("train_micro_batch_size_per_gpu", "4", "a whole number above 0 (got '4')"),
    ("gradient_accumulation_steps", 1.5, "a whole number above 0 (got 1.5)"),
    ("gradient_clipping", -1, "0 (none) or above (got -1)"),
    ("optimizer", "AdamW", 'expected {"type": "AdamW"'),
    ("optimizer.params.lr", "1e-4", "a number above 0 (got '1e-4')"),
    ("optimizer.params.lr", 0, "a number above 0"),
    ("optimizer.type", "AdamWW", "neither DeepSpeed nor torch has 'AdamWW'; did you mean AdamW?"),
    ("optimizer.params", {"lr": 1e-4, "betas": [0.9, 1.5]}, "Invalid beta parameter at index 1: 1.5"),
    ("scheduler", "WarmupLR", "expected a section"),
    ("scheduler.type", "WarmUpLR", "neither DeepSpeed nor torch has 'WarmUpLR'; did you mean WarmupLR?"),
    ("zero_optimization", 2, "expected a section"),
    ("zero_optimization.stage", 4, "(got 4)"),
    ("bf16", True, "expected a section"),
    ("data_types.grad_accum_dtype", "fp99", "one of fp32, bf16, fp16 (got 'fp99')"),
    ("torch_autocast", {"enabled": True, "dtype": "bf17"}, "one of bfloat16"),
])
def test_an_impossible_value_is_named_with_what_is_expected(path: str, value: Any, wanted: str) -> None:
    text = message(changed(**{path: value}))
    assert path in text and wanted in text
    assert "errors.pydantic.dev" not in text and "Traceback" not in text


@pytest.mark.parametrize("method", METHODS)
def test_beta_auto_needs_pairs_that_are_compared(method: str) -> None:
    changes = {"seppo.beta": "auto", "seppo.method": method}
    if method == "iterative_dpo":
        changes["seppo.improvement.path"] = "an improvement model"
    if method in ("sft", "improvement"):
        assert f"beta='auto' does not go with method='{method}', which compares no pairs" in message(changed(**changes))
    else:
        assert parse_config(changed(**changes)).seppo.beta == "auto"


def test_the_options_of_a_key_are_one_problem() -> None:
    text = message(changed(**{"seppo.sampler.batch_size": "atuo", "seppo.beta": 0}))
    assert text.startswith("the configuration has 2 problems:") and len(text.splitlines()) == 3


def test_warm_up_parameters_are_checked() -> None:
    text = message(changed(scheduler={"type": "WarmupLR", "params": {"warmup_steps": 10}}))
    assert "scheduler.params.warmup_steps: unknown key; did you mean scheduler.params.warmup_num_steps?" in text
    check_engine_config(parse_config(changed(scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 10}})),
                        batch_plan(RAW, 1))


def test_all_problems_are_told_at_once() -> None:
    text = message(changed(**{"seppo.beta": 0, "seppo.stpes": 1, "tran_batch_size": 8, "optimizer.params.lr": -1}))
    assert text.startswith("the configuration has 4 problems:") and len(text.splitlines()) == 5


def test_missing_sections() -> None:
    assert "seppo: this section is missing" in message({key: value for key, value in RAW.items() if key != "seppo"})
    assert "seppo.model: this key is missing" in message(RAW | {"seppo": {}})
    assert "optimizer: expected" in message({key: value for key, value in RAW.items() if key != "optimizer"})


def test_two_precisions_at_once() -> None:
    assert "bf16 and fp16 are both enabled: choose one" in message(changed(bf16={"enabled": True}, fp16={"enabled": True}))


@pytest.mark.parametrize(("path", "value", "wanted"), [
    ("bf16.enabled", "False", 'expected false, not the text \'False\''),
    ("bf16.enabled", "no", "expected false, not the text 'no'"),
    ("bf16.enabled", " True", "expected true, not the text ' True'"),
    ("bf16.enabled", "auto", "a placeholder that Hugging Face's Trainer fills in"),
    ("bf16.enabled", "maybe", "expected true or false (got 'maybe')"),
    ("fp16.enabled", "1", "expected the number 1, not the text '1'"),
    ("torch_autocast.enabled", "off", "expected false"),
    ("torch_autocast.enabled", 2, "expected true or false (got 2)"),
    ("tensorboard.enabled", "yes", "expected true"),
    ("train_batch_size", "auto", "a placeholder that Hugging Face's Trainer fills in"),
    ("optimizer.params.lr", "auto", "a placeholder"),
    ("optimizer.params.betas", "auto", "a placeholder"),
    ("optimizer.params.betas", [0.9, "0.99"], "expected the number 0.99, not the text '0.99'"),
    ("optimizer.params.torch_adam", "False", "expected false"),
    ("scheduler.params.warmup_num_steps", "auto", "a placeholder"),
    ("zero_optimization.overlap_comm", "false", "expected false"),
    ("zero_optimization.offload_optimizer.pin_memory", "True", "expected true"),
    ("zero_optimization.reduce_bucket_size", "5e8", "expected the number 5e8"),
    ("wall_clock_breakdown", "no", "expected false"),
    ("zero_allow_untested_optimizer", 3, "expected true or false (got 3)"),
    ("flops_profiler.enabled", "no", "expected false"),
])
def test_a_word_of_deepspeeds_part_is_not_taken_by_its_truth(path: str, value: Any, wanted: str) -> None:
    section = {"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}}.get(path.split(".")[0])
    text = message(changed(**({"scheduler": section} if "scheduler" in path else {}), **{path: value}))
    assert f"{path}: " in text and wanted in text


def test_zero_and_one_are_false_and_true_and_a_jobs_name_is_any_word() -> None:
    for value in (0, 1):
        config = parse_config(changed(**{"bf16.enabled": value, "wall_clock_breakdown": bool(value)}))
        check_engine_config(config, batch_plan(config.deepspeed, 1))
        assert precision(config.deepspeed).dtype == (torch.bfloat16 if value else torch.float32)
    parse_config(changed(**{"tensorboard.job_name": "auto", "tensorboard.enabled": False}))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("key", ["reference", "flipper"])
def test_methods_take_their_own_reference_and_flipper_only(method: str, key: str) -> None:
    allowed = getattr(METHODS[method], key + "s")
    method_keys = {"seppo.method": method} | ({"seppo.improvement.path": "somewhere"} if method == "iterative_dpo" else {})
    every = {"reference": ["uniform", "latest", "initial"], "flipper": ["aaf", "indicator", "none"]}[key]
    assert getattr(parse_config(changed(**method_keys)).seppo, key) == (allowed[0] if allowed else None)
    for choice in every:
        raw = changed(**method_keys, **{f"seppo.{key}": choice})
        if choice in allowed:
            assert getattr(parse_config(raw).seppo, key) == choice
        else:
            assert f"{key}={choice!r} does not go with method={method!r}" in message(raw)


@pytest.mark.parametrize("method", METHODS)
def test_the_winners_error_is_added_to_a_comparison_only(method: str) -> None:
    raw = changed(**{"seppo.method": method, "seppo.sft_weight": 0.5},
                  **({"seppo.improvement.path": "somewhere"} if method == "iterative_dpo" else {}))
    if METHODS[method].flippers:
        assert parse_config(raw).seppo.sft_weight == 0.5
    else:
        assert f"sft_weight=0.5 does not go with method={method!r}, whose loss is a mean squared error already" in message(raw)


@pytest.mark.parametrize(("changes", "why"), [
    ({"seppo.flipper": "none"}, "aaf_draws=4 does not go with flipper='none'"),
    ({"seppo.method": "sft"}, "aaf_draws=4 does not go with flipper=None"),
    ({"seppo.method": "dpo"}, "aaf_draws=4 does not go with flipper='none'"),
    ({"seppo.reference_score": "rollout"}, "aaf_draws=4 does not go with reference_score='rollout'")])
def test_noises_decide_a_sign_where_there_is_one(changes: dict[str, Any], why: str) -> None:
    assert why in message(changed(**changes, **{"seppo.aaf_draws": 4}))
    assert parse_config(changed(**changes, **{"seppo.aaf_draws": 1})).seppo.aaf_draws == 1
    assert parse_config(changed(**{"seppo.flipper": "indicator", "seppo.aaf_draws": 4})).seppo.aaf_draws == 4
    assert "aaf_draws: expected" in message(changed(**{"seppo.aaf_draws": 0}))


@pytest.mark.parametrize(("key", "value", "wanted"), [("lora", {"rank": 2}, "model.lora"),
                                                       ("attention", "xformers", "model.attention='xformers'")])
def test_fused_projections_take_plain_ones(key: str, value: Any, wanted: str) -> None:
    fused = {"seppo.sampler.fuse_projections": True}
    parse_config(changed(**fused))
    assert f"sampler.fuse_projections does not go with {wanted}" in message(changed(**fused, **{f"seppo.model.{key}": value}))


@pytest.mark.parametrize(("keys", "world", "expected"), [
    ({"train_batch_size": 2048, "train_micro_batch_size_per_gpu": 1}, 8, (2048, 1, 256)),
    ({"train_batch_size": 2048, "gradient_accumulation_steps": 256}, 8, (2048, 1, 256)),
    ({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}, 4, (24, 2, 3)),
    ({"train_micro_batch_size_per_gpu": 2}, 4, (8, 2, 1)),
    ({"train_batch_size": 8}, 4, (8, 2, 1)),
    ({"gradient_accumulation_steps": 3}, 2, (6, 1, 3)),
    ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}, 4, (24, 2, 3)),
])
def test_the_third_batch_key_follows_from_two(keys: dict[str, int], world: int, expected: tuple[int, int, int]) -> None:
    batch = batch_plan(keys, world)
    assert (batch.size, batch.micro, batch.accumulation) == expected
    assert batch.size == batch.micro * batch.accumulation * world


@pytest.mark.parametrize(("keys", "world"), [
    ({"train_batch_size": 9, "train_micro_batch_size_per_gpu": 4}, 1),
    ({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4}, 4),
    ({"train_batch_size": 8, "gradient_accumulation_steps": 3}, 1),
    ({"train_batch_size": 3}, 4),
    ({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}, 1),
])
def test_batch_sizes_that_do_not_multiply_out(keys: dict[str, int], world: int) -> None:
    with pytest.raises(UserError) as caught:
        batch_plan(keys, world)
    text = str(caught.value)
    assert f"train_batch_size {keys['train_batch_size']} is not" in text and f"x {world} rank" in text and "multiply out" in text


def written(folder: Path, text: str) -> str:
    (folder / "mine.json").write_text(text)
    return str(folder / "mine.json")


def test_set_reaches_every_key_and_reads_json_or_text(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, json.dumps(RAW)), [
        "seppo.sampler.steps=20", "optimizer.params.lr=1e-6", "seppo.data.source=/some where/a=b", "seppo.data.flip=false",
        "seppo.model.lora={\"rank\": 4}", "seppo.model.revision=null", "bf16.enabled=true", "seppo.model.lora.alpha=8.0"])
    assert config.seppo.sampler.steps == 20 and config.deepspeed["optimizer"]["params"]["lr"] == 1e-6
    assert config.seppo.data.source == "/some where/a=b" and config.seppo.data.flip is False
    assert config.seppo.model.lora.rank == 4 and config.seppo.model.lora.alpha == 8.0 and config.seppo.model.revision is None
    assert config.deepspeed["bf16"] == {"enabled": True}


@pytest.mark.parametrize(("override", "wanted"), [
    ("seppo.beta", "expected key.path=value"),
    ("=3", "expected key.path=value"),
    ("seppo.beta.x=3", "seppo.beta is not a section"),
    ("seppo.sampler.stesp=3", "seppo.sampler.stesp: unknown key; did you mean seppo.sampler.steps?"),
    ("seppo.beta=abc", "seppo.beta: expected a valid number (got 'abc')"),
    ("bf16.enabled=False", "bf16.enabled: expected false, not the text 'False'"),
    ("bf16.enabled=auto", "bf16.enabled: \"auto\" is a placeholder"),
])
def test_a_wrong_override_is_named(tmp_path: Path, override: str, wanted: str) -> None:
    file = written(tmp_path, json.dumps(changed(**{"seppo.beta": 3.0})))
    with pytest.raises(UserError) as caught:
        load_config(file, [override])
    assert wanted in str(caught.value)


@pytest.mark.parametrize(("text", "wanted"), [
    ('{"train_batch_size": 8,}', "not valid JSON"),
    ("[1, 2]", "expected a JSON object at the top level, got list"),
    ('{"train_batch_size": 8, "train_batch_size": 16}', "train_batch_size is given twice"),
    ('{"seppo": {"beta": 1.0, "beta": 2.0}}', "beta is given twice"),
])
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, wanted: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_config(file)
    assert wanted in str(caught.value) and file in str(caught.value)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"--config nothing.json: no such file.*ds_a100.json"):
        load_config("nothing.json")


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.json")), ids=lambda file: file.name)
def test_shipped_configurations_are_found_by_name_and_right(file: Path) -> None:
    config = load_config(file.name)
    check_engine_config(config, batch_plan(config.deepspeed, 1))


def test_the_resolved_configuration_is_the_same_configuration() -> None:
    once = parse_config(changed(**{"seppo.method": "spin", "seppo.model.lora": {"rank": 2}}))
    assert parse_config(json.loads(json.dumps(once.as_dict()))).as_dict() == once.as_dict()


class Asked(dict):
    """A dictionary that remembers which keys it was asked for."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.keys_asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.keys_asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.keys_asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        """`key in config.keys()` asks, too."""
        return self


def test_the_installed_deepspeed_asks_for_every_key_that_we_let_through() -> None:
    import deepspeed

    asked = Asked({"train_batch_size": 8, "optimizer": RAW["optimizer"]})
    deepspeed.DeepSpeedConfig(asked)
    assert not DEEPSPEED_KEYS - asked.keys_asked, "DeepSpeed does not read these any more"
