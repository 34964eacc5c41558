"""Schedules of the learning rate, beside PyTorch's own."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, OneCycleLR

from masksl.settings import ConfigError
from masksl.training.network import LocalNetwork
from masksl.training.optimizer import OptimizerConfig
from masksl.training.schedule import Rates, ScheduleConfig
from masksl.training.tensors import tensors_of
from tests.conftest import settings_of
from tests.runtime.test_checkpoint import run, run_until


def rates_of(
    rounds: int, steps: int = 1, lr: float = 1.0, **options: Any
) -> list[float]:
    """Return the rates of all steps of a run."""
    schedule = ScheduleConfig(**options)
    return [
        Rates(schedule, lr, round_, rounds).at(step, steps)
        for round_ in range(1, rounds + 1)
        for step in range(steps)
    ]


def test_schedules_by_round() -> None:
    assert rates_of(3) == [1, 1, 1]
    assert rates_of(4, name="cosine") == pytest.approx(
        [1, 0.853553, 0.5, 0.146447], abs=1e-6
    )
    steps = rates_of(5, name="multistep", milestones=(2, 4), gamma=0.2)
    assert steps == pytest.approx([1, 1, 0.2, 0.2, 0.04])
    assert rates_of(4, name="step", every=2) == pytest.approx([1, 1, 0.1, 0.1])
    assert rates_of(2, 2, name="step", every=1) == pytest.approx([1, 1, 0.1, 0.1])
    assert rates_of(2, 2, name="exponential", every=1) == pytest.approx(
        [1, 1, 0.1, 0.1]
    )


@pytest.mark.parametrize(("gamma", "every"), [(0.1, 30), (0.5, 4), (1.0, 3), (0.9, 1)])
def test_exponential_falls_by_gamma_over_some_rounds(gamma: float, every: int) -> None:
    rates = rates_of(
        3 * every + 1, lr=0.2, name="exponential", gamma=gamma, every=every
    )
    stairs = rates_of(3 * every + 1, lr=0.2, name="step", gamma=gamma, every=every)
    assert rates[::every] == pytest.approx(stairs[::every])
    factors = [after / before for before, after in pairwise(rates)]
    assert factors == pytest.approx([gamma ** (1 / every)] * (3 * every))


def test_exponential_is_pytorchs() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    schedule = ExponentialLR(optimizer, 0.1 ** (1 / 20))
    for rate in rates_of(50, lr=0.3, name="exponential", every=20):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
        optimizer.step()
        schedule.step()


def test_exponential_is_the_same_for_any_number_of_rounds() -> None:
    rates = rates_of(9, name="exponential", every=2)
    assert rates[:5] == rates_of(5, name="exponential", every=2)
    assert not ScheduleConfig(name="exponential").depends_on_rounds
    last = rates_of(2000, name="exponential", gamma=1e-9, every=1)[-1]
    assert last == 0.0  # not an error


def test_cosine_is_pytorchs() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    schedule = CosineAnnealingLR(optimizer, 9)
    for rate in rates_of(9, lr=0.3, name="cosine"):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("peak", [0.3, 0.5, 0.11])
@pytest.mark.parametrize(("rounds", "steps"), [(3, 7), (10, 1), (1, 40), (4, 33)])
def test_onecycle_is_pytorchs_to_the_bit(rounds: int, steps: int, peak: float) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.2)
    schedule = OneCycleLR(
        optimizer, 0.2, rounds * steps, pct_start=peak, cycle_momentum=False
    )
    for rate in rates_of(rounds, steps, 0.2, name="onecycle", peak=peak):
        assert optimizer.param_groups[0]["lr"] == rate
        optimizer.step()
        schedule.step() if schedule.last_epoch < rounds * steps - 1 else None


def test_onecycle_of_few_steps_is_positive_and_at_most_the_highest() -> None:
    for rounds, steps in ((1, 1), (1, 2), (2, 1), (3, 1), (1, 3)):
        rates = rates_of(rounds, steps, 0.2, name="onecycle")
        assert all(0 < rate <= 0.2 for rate in rates)


def test_warmup_rises_in_equal_steps_to_the_schedule() -> None:
    rates = rates_of(4, 5, warmup=2)
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10:] == [1] * 10
    warm, plain = (rates_of(4, 5, name="cosine", warmup=w) for w in (0.4, 0.0))
    assert warm[:2] == pytest.approx([0.5, 1.0]) and warm[1:] == plain[1:]


def test_onecycle_takes_no_warmup() -> None:
    with pytest.raises(ConfigError, match="^schedule.warmup=1: must be 0 with"):
        settings_of("schedule.name=onecycle", "schedule.warmup=1")


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_smoothed_steps_are_pytorchs_to_the_bit(smoothing: float) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    config = OptimizerConfig(lr=0.2, label_smoothing=smoothing)
    network = LocalNetwork(
        module, {k: t.detach().clone() for k, t in tensors_of(module).items()}, {}, 1
    )
    optimizer = torch.optim.SGD(
        module.parameters(), 0.2, momentum=0.9, weight_decay=5e-4
    )
    rates = Rates(ScheduleConfig(name="onecycle"), 0.2, 1, 1)
    for step in range(9):
        images, labels = torch.randn(5, 6), torch.randint(0, 4, (5,))
        lr = rates.at(step, 9)
        optimizer.param_groups[0]["lr"] = lr
        loss = nn.functional.cross_entropy(
            module(images), labels, label_smoothing=smoothing
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert network.train(images, labels, config, lr=lr, seed=0) == loss.item()
    for name, parameter in tensors_of(module).items():
        assert torch.equal(network.tensors[name], parameter)


@pytest.mark.parametrize("method", ["split", "fedavg"])
def test_onecycle_is_resumed_in_the_middle(method: str, tmp_path: Path) -> None:
    overrides = (
        *(f"method={method}", "rounds=3", "clients=2", "dataset.limit=130"),
        *("dataset.test_limit=40", "compressor=none", "schedule.name=onecycle"),
        *("optimizer.label_smoothing=0.1", "schedule.peak=0.4"),
    )
    expected = run(tmp_path / "whole", *overrides)
    run_until(tmp_path / "first", 1, *overrides)
    resume = f"resume={tmp_path}/first"
    assert run(tmp_path / "second", *overrides, resume) == expected
    rates = [row["lr"] for row in expected[0]]
    assert rates[0] < rates[1] > rates[2]
