"""A run whose reference's weights stay in host memory is the same run; and the settings that it does not go with."""

import pytest
from outcomes import column, weights
from tiny import tiny_animatediff

from seppo_fast.configfile import parse_config
from seppo_fast.errors import UserError
from seppo_fast.models import open_model
from seppo_fast.training.networks import check_network

BLOCKS = {"seppo.reference_offload": "blocks"}


@pytest.mark.parametrize("changes", [{}, {"seppo.reference_score": "rollout", "seppo.sampler.window": "iteration"},
                                     {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}],
                         ids=["online", "ahead", "autocast"])
def test_the_same_run(changes, trained):
    plain, offloaded = trained(**changes), trained(**changes, **BLOCKS)
    assert column(plain, "loss") == column(offloaded, "loss") and column(plain, "aaf_rate") == column(offloaded, "aaf_rate")
    first, second = weights(plain), weights(offloaded)
    assert first.keys() == second.keys() and all((first[name] == second[name]).all() for name in first)


@pytest.mark.parametrize(("changes", "said"), [
    ({"seppo.model.lora": {}}, "model.lora: the reference shares the policy's weights"),
    ({"seppo.method": "sft"}, "method='sft' without grids or evaluations: there is no reference"),
    ({"seppo.model.compile": "regional"}, "model.compile"), ({"seppo.sampler.compile": "full"}, "sampler.compile"),
    ({"seppo.sampler.fuse_projections": True}, "sampler.fuse_projections"),
])
def test_what_it_does_not_go_with_is_refused(changes, said, settings):
    parse_config(settings(**BLOCKS))
    with pytest.raises(UserError, match=f"reference_offload='blocks' does not go with {said}"):
        parse_config(settings(**BLOCKS, **changes))


def test_motion_modules_are_refused(settings, tmp_path):
    model = open_model(str(tiny_animatediff(tmp_path / "video")))
    with pytest.raises(UserError, match="seppo.reference_offload: of .* only the motion modules are trained"):
        check_network(model, parse_config(settings(**BLOCKS)))
