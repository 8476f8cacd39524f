"""Another model as the reference: it is compared with from the first update on, and must be of the policy's architecture."""

import shutil

import pytest
import torch
from outcomes import apart, rows, weights
from tiny import NARROW, tiny_animatediff, unet

from seppo_fast.configfile import parse_config
from seppo_fast.errors import UserError
from seppo_fast.planning.dry_run import dry_run
from seppo_fast.reference.network import Reference
from seppo_fast.reference.pool import Pool


def with_unet(source, folder, **changes):
    """A model's directory with another network."""
    shutil.copytree(source, folder)
    torch.manual_seed(5)
    unet(**NARROW | changes).save_pretrained(folder / "unet")
    return folder


@pytest.fixture
def of_another(settings, sd, tmp_path):
    """`of_another(**changes)`: DITTO with another model as reference."""
    other = with_unet(sd, tmp_path / "other")
    return lambda **changes: settings(**{"seppo.method": "ditto", "seppo.reference_model": {"path": str(other)}, "seppo.beta": 30.0,
                                         "optimizer.params.eps": 1e-5} | changes)


def test_errors_of_another_reference_are_not_taken_for_the_policy_s_own(of_another, train, tmp_path):
    online, rollout = (train(of_another(**{"seppo.reference_score": score, "seppo.output_dir": str(tmp_path / score)}))
                       for score in ("online", "rollout"))
    assert rows(online)[0]["ref_mse_winner"] != pytest.approx(rows(online)[0]["model_mse_winner"], rel=1e-3)
    for one, other in zip(rows(online), rows(rollout), strict=True):
        for name in ("loss", "ref_mse_winner", "ref_mse_loser", "logit_p05"):
            assert one[name] == pytest.approx(other[name], rel=1e-3), name
    assert apart(weights(online), weights(rollout)) < 2e-5


def test_what_comes_next_is_read_from_where_it_is_taken(tmp_path):
    own, fixed = (Pool(tmp_path / name, torch.float32, 10**6) for name in ("pool", "fixed"))
    for pool in (own, fixed):
        Pool(pool.folder, torch.float32, 0).add(0, {"weight": torch.ones(2)}, write=True)
    Reference(None, None, 1, own, offloaded=False, fixed=fixed).prefetch(0)
    assert own._coming is None and fixed._coming[1].result()["weight"].tolist() == [1, 1]


@pytest.mark.parametrize(("changes", "words"), [
    ({"block_out_channels": (16,)}, r"its network is another: \d+ weights are missing or of another shape, the first conv_in"),
    ({"layers_per_block": 2}, r"its network is another: \d+ weights are missing or of another shape, the first "),
])
def test_a_network_of_another_shape_is_refused_before_anything_is_written(changes, words, settings, sd, tmp_path):
    folder = with_unet(sd, tmp_path / "other", **changes)
    raw = settings(**{"seppo.method": "dpo", "seppo.reference_model": {"path": str(folder)}})
    with pytest.raises(UserError, match=f"reference_model.path: {folder} does not fit the policy's model .*: {words}") as said:
        dry_run(parse_config(raw), 1)
    assert "improvement" not in str(said.value) and not (tmp_path / "run").exists()


def test_a_video_model_shares_its_image_layers_with_the_reference(settings, tmp_path):
    one, other = (tiny_animatediff(tmp_path / name, seed=seed) for name, seed in (("one", 0), ("other", 1)))
    raw = settings(**{"seppo.method": "ditto", "seppo.model.path": str(one), "seppo.data.video.frames": 4,
                      "seppo.reference_model": {"path": str(other)}})
    with pytest.raises(UserError, match="seppo.reference_model.path: .* is an AnimateDiff, of which only the motion modules"):
        dry_run(parse_config(raw), 1)


def test_the_improvement_model_may_leave_the_device_in_a_resumed_run(of_another, train):
    raw = of_another()
    train(raw)
    raw["seppo"]["improvement"] = {"offload": True}
    train(raw, "auto")
