"""LoRA on the UNet: what is trained, what it starts from, and what reference and policy share."""

import pytest
import torch
from tiny import LATENTS

from seppo_fast.config import Lora
from seppo_fast.errors import UserError
from seppo_fast.models import open_model
from seppo_fast.models.lora import add_lora, share_frozen, trainable_weights


@pytest.fixture
def sd(sd_folder):
    return open_model(str(sd_folder))


def run(model, unet, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return model.denoise(unet, torch.randn(2, *LATENTS, generator=g), torch.tensor([10, 700]),
                             {"prompt_embeds": torch.randn(2, 77, 32, generator=g)})


def train_a_little(unet):
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in trainable_weights(unet).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def test_only_the_adapter_is_trained_and_nothing_changes_at_first(sd):
    unet = sd.load_denoiser(torch.float32)
    assert trainable_weights(unet).keys() == dict(unet.named_parameters()).keys()
    before = run(sd, unet)
    add_lora(unet, Lora(rank=4), seed=1)
    weights = trainable_weights(unet)
    assert weights and all(".lora_A.default." in name or ".lora_B.default." in name for name in weights)
    kinds = {name.split(".lora_")[0].split(".", 1)[1].split("attn")[-1][2:] for name in weights}
    assert kinds == {"to_q", "to_k", "to_v", "to_out.0"}
    assert all(4 in p.shape for p in weights.values())
    assert torch.equal(run(sd, unet), before)
    train_a_little(unet)
    assert not torch.allclose(run(sd, unet), before, atol=1e-3)


def test_dropout_follows_the_mode_of_the_network(sd):
    unet = sd.load_denoiser(torch.float32)
    add_lora(unet, Lora(rank=4, dropout=0.5), seed=1)
    train_a_little(unet)
    assert torch.equal(run(sd, unet), run(sd, unet))  # as loaded: evaluation
    unet.train()
    assert not torch.equal(run(sd, unet), run(sd, unet))


def test_initialisation_depends_on_the_seed_alone(sd):
    def adapter(seed, noise):
        torch.manual_seed(noise)
        unet = sd.load_denoiser(torch.float32)
        add_lora(unet, Lora(rank=4), seed)
        return trainable_weights(unet), torch.rand(1)

    (first, draw), (again, _), (other, _) = adapter(1, 0), adapter(1, 5), adapter(2, 0)
    assert list(first) == list(again)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    torch.manual_seed(0)
    assert torch.equal(draw, torch.rand(1))  # the global stream is left as it was


def test_alpha_scales_the_adapter(sd):
    outputs = []
    for alpha in (4.0, 12.0):
        unet = sd.load_denoiser(torch.float32)
        add_lora(unet, Lora(rank=4, alpha=alpha, targets=["to_q"]), seed=1)
        module = next(m for m in unet.modules() if hasattr(m, "lora_A"))
        assert module.scaling["default"] == alpha / 4
        train_a_little(unet)
        outputs.append(run(sd, unet))
    assert not torch.allclose(*outputs)


@pytest.mark.parametrize("targets, fragments", [
    (["to_Q"], ["to_Q", "'to_q'", "attn2.to_q"]),
    (["to_q", "to_oat.0"], ["to_oat.0", "'to_out.0'"]),
    (["attn1"], ["attn1"]),
    ([], ["empty"]),
])
def test_targets_that_match_nothing(sd, targets, fragments):
    unet = sd.load_denoiser(torch.float32)
    with pytest.raises(UserError, match=r"seppo\.model\.lora\.targets") as caught:
        add_lora(unet, Lora(targets=targets), seed=0)
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)
    assert all(p.requires_grad for p in unet.parameters())


def test_convolutions_and_full_names_are_targets_too(sd):
    unet = sd.load_denoiser(torch.float32)
    add_lora(unet, Lora(rank=2, targets=["conv1", "mid_block.attentions.0.proj_in"]), seed=0)
    names = {name.split(".lora_")[0] for name in trainable_weights(unet)}
    assert "mid_block.attentions.0.proj_in" in names and any(name.endswith("resnets.0.conv1") for name in names)


def test_reference_shares_the_frozen_base_only(sd):
    policy, reference = sd.load_denoiser(torch.float32), sd.load_denoiser(torch.float32)
    for unet in (policy, reference):
        add_lora(unet, Lora(rank=4), seed=1)
    share_frozen(reference, policy)
    own = dict(reference.named_parameters())
    for name, parameter in policy.named_parameters():
        assert (own[name].data_ptr() == parameter.data_ptr()) != parameter.requires_grad, name
    before = run(sd, reference)
    train_a_little(policy)
    assert torch.equal(run(sd, reference), before)
    with torch.no_grad():
        policy.conv_in.weight.mul_(2)
    assert not torch.equal(run(sd, reference), before)


def test_partitioned_parameters_are_not_shared(sd):
    policy, reference = sd.load_denoiser(torch.float32), sd.load_denoiser(torch.float32)
    policy.requires_grad_(False)
    policy.conv_in.weight.data = torch.empty(0)
    before = reference.conv_in.weight.clone()
    share_frozen(reference, policy)
    assert torch.equal(reference.conv_in.weight, before)
    assert reference.conv_out.weight.data_ptr() == policy.conv_out.weight.data_ptr()


def test_full_fine_tuning_shares_nothing(sd):
    policy, reference = sd.load_denoiser(torch.float32), sd.load_denoiser(torch.float32)
    share_frozen(reference, policy)
    assert all(p.data_ptr() != q.data_ptr() for p, q in zip(policy.parameters(), reference.parameters(), strict=True))


def test_adapter_of_a_half_precision_base(sd):
    unet = sd.load_denoiser(torch.bfloat16)
    add_lora(unet, Lora(rank=4), seed=1)
    assert {p.dtype for p in trainable_weights(unet).values()} == {torch.bfloat16}
