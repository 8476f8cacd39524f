"""Signs of several noises of the winner (`aaf_draws`): against a plain loop in fp64, and where policy and reference are equal."""

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from seppo_fast.training.noise import NoiseProcess, noise_process
from seppo_fast.training.objective import Objective, Pairs

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
SCHEDULES = {"noise": dict(DDPMScheduler().config), "velocity": dict(DDPMScheduler(prediction_type="v_prediction").config),
             "flow": FLOW}
PAIRS, SHAPE = 4, (3, 5, 7)


class Network(nn.Module):
    """Answers by sample, time and condition, so that a mixed-up row shows; which of two is better depends on the noise."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, noised: Tensor, times: Tensor, given: Tensor) -> Tensor:
        scale = (0.5 + 0.1 * torch.sin(times + given)).to(noised.dtype).view(-1, 1, 1, 1)
        return scale * noised + 0.3 * torch.sin(50 * self.weight * noised)


def denoise(network: nn.Module, noised: Tensor, times: Tensor, conditions: dict[str, Tensor]) -> Tensor:
    return network(noised, times, conditions["given"])


def pairs(further: int, seed: int = 0, shared: bool = False) -> Pairs:
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    times = torch.randint(1000, (PAIRS,), generator=random)
    given = {"given": draw(PAIRS)}
    latents, noise = draw(2 * PAIRS, *SHAPE), draw((2 - shared) * PAIRS, *SHAPE)
    return Pairs(latents, noise, times, given, more_noise=draw(further, PAIRS, *SHAPE) if further else None)


def plain_signs(process: NoiseProcess, networks: list[Network], batch: Pairs) -> list[float]:
    """The mean of each winner's differences over all its noises, one after another, in fp64."""
    signs = []
    for i in range(PAIRS):
        noises, found = [batch.noise[i], *(batch.more_noise[:, i] if batch.more_noise is not None else [])], []
        for noise in noises:
            x, e, t = batch.latents[i:i + 1].double(), noise[None].double(), batch.timesteps[i:i + 1]
            target = process.target(x, e, t)
            errors = [float(((network(process.noised(x, e, t), t, batch.conditions["given"][i:i + 1])
                              - (e if target is None else target)) ** 2).mean()) for network in networks]
            found.append(errors[0] - errors[1])
        signs.append(1.0 if sum(found) / len(found) > 0 else -1.0)
    return signs


@pytest.mark.parametrize("further", [0, 1, 2, 5])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_against_a_plain_loop(schedule: str, further: int) -> None:
    process = noise_process(SCHEDULES[schedule])
    networks, differing = [Network(0.4), Network(0.41)], 0
    for seed in range(6):
        batch = pairs(further, seed, shared=seed % 2 == 0)
        _, table = Objective(denoise, process, "aaf", torch.float32)(*networks, batch, 1.0, 100.0)
        want = plain_signs(process, networks, batch)
        assert table[:, 4].tolist() == want
        _, indicator = Objective(denoise, process, "indicator", torch.float32)(*networks, batch, 1.0, 100.0)
        assert indicator[:, 4].tolist() == [min(sign, 0.0) for sign in want]
        m_w, m_l, q_w, q_l = table[:, :4].T
        torch.testing.assert_close(table[:, 5], -50 * (m_w - q_w + torch.tensor(want) * (m_l - q_l)), rtol=1e-3, atol=1e-4)
        differing += sum((row[0] > row[2]) != (row[4] > 0) for row in table.tolist())
    assert (differing > 0) == (further > 0), "the further noises decided nothing"


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_equal_networks_tie(autocast: torch.dtype | None) -> None:
    process = noise_process(SCHEDULES["noise"])
    policy, reference = Network(0.4), Network(0.4)
    _, table = Objective(denoise, process, "aaf", torch.float32, autocast)(policy, reference, pairs(5), 1.0, 5000.0)
    assert (table[:, 4] == -1).all() and (table[:, 5] == 0).all()


def test_the_gradient_is_that_of_the_pairs_own_noise() -> None:
    process, grads = noise_process(SCHEDULES["noise"]), {}
    for further in (0, 5):
        policy, reference = Network(0.4), Network(0.41)
        loss, table = Objective(denoise, process, "aaf", torch.float32)(policy, reference, pairs(further), 1.0, 100.0)
        loss.backward()
        grads[further] = policy.weight.grad, table
        assert reference.weight.grad is None
    same = (grads[0][1][:, 4] == grads[5][1][:, 4])
    assert torch.equal(grads[0][1][same], grads[5][1][same])


def test_an_error_that_is_not_finite_is_not_hidden() -> None:
    """The pair's own noise is sound, a further one is not."""
    batch = pairs(2)
    assert batch.more_noise is not None
    batch.more_noise[1, 2, 0, 0, 0] = torch.inf
    objective = Objective(denoise, noise_process(SCHEDULES["noise"]), "aaf", torch.float32)
    loss, table = objective(Network(0.4), Network(0.41), batch, 1.0, 100.0)
    assert not loss.isfinite() and table[:, 4].isfinite().tolist() == [True, True, False, True]
