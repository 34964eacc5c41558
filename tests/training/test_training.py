"""Steps on tensors: averages, schedules, networks with tensors of their own."""

from typing import Any

import pytest
import torch
from torch import nn

from masksl.training.compute import compute
from masksl.training.network import LocalNetwork
from masksl.training.optimizer import OptimizerConfig, ScheduleConfig
from masksl.training.tensors import average


def test_average() -> None:
    one = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3)}
    two = {"w": torch.tensor([5.0, 2.0]), "n": torch.tensor(7)}
    mean = average([one, two], [1, 3])
    assert torch.equal(mean["w"], torch.tensor([4.0, 2.0]))
    assert int(mean["n"]) == 7
    assert average([one], [5])["w"] is one["w"]


def test_schedules() -> None:
    def factors(rounds: int, **options: Any) -> list[float]:
        schedule = ScheduleConfig(**options)
        return [schedule.factor(r, rounds) for r in range(1, rounds + 1)]

    assert factors(3) == [1, 1, 1]
    assert factors(4, name="cosine") == pytest.approx(
        [1, 0.853553, 0.5, 0.146447], abs=1e-6
    )
    steps = factors(5, name="multistep", milestones=(2, 4), gamma=0.2)
    assert steps == pytest.approx([1, 1, 0.2, 0.2, 0.04])
    assert factors(4, name="step", every=2) == pytest.approx([1, 1, 0.1, 0.1])
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = OptimizerConfig(lr=0.3).make([parameter])
    torch_cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
    for factor in factors(9, name="cosine"):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.3 * factor)
        optimizer.step()
        torch_cosine.step()


def test_gradient_of_a_wrong_shape_is_refused() -> None:
    module = nn.Linear(4, 3)
    half = LocalNetwork(
        module, {n: p.detach() for n, p in module.named_parameters()}, {}, 1
    )
    half.forward(torch.randn(2, 4), seed=0)
    with pytest.raises(ValueError, match=r"shape \(1, 3\) .* shape \(2, 3\)"):
        half.backward(torch.randn(1, 3))
    half.forward(torch.randn(2, 4), seed=0)
    with pytest.raises(ValueError, match=r"shape \(2, 3\) .* expected \(4,\)"):
        half.backward(torch.randn(2, 3), torch.arange(4))


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    state = torch.random.get_rng_state()
    with compute(before + 1, torch.device("cpu"), 3):
        assert torch.get_num_threads() == before + 1
        torch.rand(3)
    assert torch.get_num_threads() == before
    assert torch.equal(torch.random.get_rng_state(), state)
