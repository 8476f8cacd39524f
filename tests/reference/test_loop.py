"""The sampling loop: guidance, dtypes, batches, and that it never waits for the device."""

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from seppo_fast.reference import SolverTable, classifier_free, sample, solver_table

SCHEDULE = {"beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False,
            "num_train_timesteps": 1000, "set_alpha_to_one": False, "steps_offset": 1}


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=12, attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")).eval()


def denoiser(unet):
    return lambda latents, t, conditions: unet(latents, t, encoder_hidden_states=conditions["prompt_embeds"]).sample


def given(batch, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, 4, 8, 8, generator=g), {"prompt_embeds": 3 * torch.randn(batch, 5, 12, generator=g)},
            {"prompt_embeds": 3 * torch.randn(1, 5, 12, generator=g)})


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5, 7.5])
def test_equals_the_loop_of_a_diffusers_pipeline(unet, guidance):
    noise, conditions, unconditional = given(3)
    scheduler = DDIMScheduler.from_config(SCHEDULE)
    scheduler.set_timesteps(8)
    latents = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            c = unet(latents, t, encoder_hidden_states=conditions["prompt_embeds"]).sample
            u = unet(latents, t, encoder_hidden_states=unconditional["prompt_embeds"].expand(3, -1, -1)).sample
            latents = scheduler.step(u + guidance * (c - u), t, latents, return_dict=False)[0]
    got = sample(denoiser(unet), solver_table(SCHEDULE, "ddim", 8), noise, conditions, unconditional,
                 classifier_free(guidance, unconditional), torch.float32)
    torch.testing.assert_close(got, latents, rtol=1e-4, atol=1e-4)
    assert (got - noise).abs().max() > 0.1


def test_one_sample_without_guidance_leaves_the_empty_prompt_as_it_was(unet):
    noise, conditions, unconditional = given(1)
    before = unconditional["prompt_embeds"].clone()
    sample(denoiser(unet), solver_table(SCHEDULE, "ddim", 2), noise, conditions, unconditional, classifier_free(1.0, unconditional),
           torch.float32)
    assert torch.equal(unconditional["prompt_embeds"], before)


@pytest.mark.parametrize("solver,calls", [("ddim", 4), ("pndm", 5), ("euler", 4)])
@pytest.mark.parametrize("guidance,factor", [(1.0, 1), (7.5, 2), (0.0, 2)])
def test_what_the_network_is_given(solver, calls, guidance, factor):
    seen = []

    def denoise(latents, timesteps, conditions):
        seen.append((latents, timesteps, conditions))
        return latents * 0.1

    noise, _, _ = given(3)
    conditions = {"prompt_embeds": torch.full((3, 5, 12), 2.0), "pooled": torch.full((3, 7), 3.0)}
    unconditional = {"prompt_embeds": torch.zeros(1, 5, 12), "pooled": torch.ones(1, 7)}
    table = solver_table(SCHEDULE, solver, 4)
    got = sample(denoise, table, noise, conditions, unconditional, classifier_free(guidance, unconditional), torch.bfloat16)
    assert got.dtype == torch.float32 and got.shape == noise.shape
    assert len(seen) == calls
    for i, (latents, timesteps, c) in enumerate(seen):
        assert latents.shape == (3 * factor, 4, 8, 8) and latents.dtype == torch.bfloat16
        assert torch.equal(timesteps, table.timesteps[i].repeat(3 * factor))
        assert {v.dtype for v in c.values()} == {torch.bfloat16}
        assert c["prompt_embeds"][:, 0, 0].tolist() == [0.0] * 3 * (factor - 1) + [2.0] * 3  # unconditional first
        assert c["pooled"][:, 0].tolist() == [1.0] * 3 * (factor - 1) + [3.0] * 3
        if factor == 2:
            assert torch.equal(latents[:3], latents[3:])
    assert torch.equal(seen[0][0][:3], (table.inputs[0, 0] * noise).bfloat16())


def test_a_sample_does_not_depend_on_its_batch(unet):
    noise, conditions, unconditional = given(5)
    table = solver_table(SCHEDULE, "dpmsolver++", 6)
    whole = sample(denoiser(unet), table, noise, conditions, unconditional, classifier_free(3.0, unconditional), torch.float32)
    for i in range(5):
        one = {"prompt_embeds": conditions["prompt_embeds"][i:i + 1]}
        alone = sample(denoiser(unet), table, noise[i:i + 1], one, unconditional, classifier_free(3.0, unconditional),
                       torch.float32)
        torch.testing.assert_close(alone[0], whole[i], rtol=1e-4, atol=1e-4)


def test_sums_are_fp32_under_autocast_and_low_precision():
    """With a network that always answers 1, the sample is known exactly, whatever the network's dtype."""
    table = solver_table(SCHEDULE, "ddim", 50)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    want = table.outputs[-1, 0].double() * noise.double() + table.outputs[-1, 1:].double().sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = sample(lambda x, t, c: torch.ones_like(x), table, noise, {}, {}, classifier_free(1.0, ()), torch.bfloat16)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_no_graph_is_kept_and_inputs_are_left_alone(unet):
    noise, conditions, unconditional = given(2)
    copies = noise.clone(), conditions["prompt_embeds"].clone()
    table = solver_table(SCHEDULE, "ddim", 3)
    got = sample(denoiser(unet), table, noise, conditions, unconditional, classifier_free(2.0, unconditional), torch.float32)
    assert not got.requires_grad and got.grad_fn is None
    assert torch.equal(noise, copies[0]) and torch.equal(conditions["prompt_embeds"], copies[1])


def test_video_latents():
    noise = torch.randn(2, 4, 3, 8, 8)
    table = solver_table(SCHEDULE, "ddim", 4)
    frames = sample(lambda x, t, c: torch.tanh(x), table, noise, {}, {}, classifier_free(1.0, ()), torch.float32)
    each = [sample(lambda x, t, c: torch.tanh(x), table, noise[:, :, f], {}, {}, classifier_free(1.0, ()), torch.float32)
            for f in range(3)]
    torch.testing.assert_close(frames, torch.stack(each, 2))


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_it_never_reads_a_value(guidance):
    """On the meta device `.item()`, a branch on a value or a copy to the host raises: so nothing synchronises."""
    table: SolverTable = solver_table(SCHEDULE, "pndm", 5).to("meta")
    noise = torch.empty(2, 4, 8, 8, device="meta")
    conditions = {"prompt_embeds": torch.empty(2, 5, 12, device="meta")}
    unconditional = {"prompt_embeds": torch.empty(1, 5, 12, device="meta")}
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=12,
            attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    got = sample(denoiser(unet), table, noise, conditions, unconditional, classifier_free(guidance, unconditional), torch.float32)
    assert got.device.type == "meta" and got.shape == noise.shape
