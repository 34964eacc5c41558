"""The benchmark of bias and noise in the gradients of both halves."""

from pathlib import Path

import pytest
import torch
from torch import nn

from masksl import main, model
from masksl.bench import bias
from tests.conftest import settings_of


def test_what_all_batches_have_in_common_is_bias() -> None:
    exact, common = torch.tensor([[3.0, 4.0], [0.3, 0.4]]).double()
    differences = bias.Differences()
    for _ in range(3):
        differences.add(exact + common, exact)
    assert differences.figures() == pytest.approx({"bias": 0.1, "noise": 0.0}, abs=1e-6)


def test_what_averages_out_is_noise() -> None:
    exact, drawn = torch.tensor([[3.0, 4.0], [0.3, 0.4]]).double()
    differences = bias.Differences()
    for sign in (1, -1):
        differences.add(exact + sign * drawn, exact)
    assert differences.figures() == pytest.approx({"bias": 0.0, "noise": 0.1}, abs=1e-6)


def test_gradients_are_those_of_the_whole_network() -> None:
    """The halves together have the gradient that autograd gives of one network.

    Each client's part goes through the client half by itself.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 1, 8, 8, generator=generator)
    labels = torch.randint(10, (6,), generator=generator)
    units = model.build("small_cnn", 10, 1, seed=0)
    batch = bias.Halves(units, 1, 0.1, 4).batch(images, labels)
    whole = nn.Sequential(*units)
    activation = torch.cat([whole[0](part) for part in (images[:4], images[4:])])
    output = whole[1:](activation)
    loss = nn.functional.cross_entropy(output, labels, label_smoothing=0.1)
    expected = torch.autograd.grad(loss, list(whole.parameters()))
    both = torch.cat([batch.client, batch.server]).float()
    torch.testing.assert_close(both, torch.cat([each.flatten() for each in expected]))


def test_rows_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact frames change nothing; a dead zone biases more than rounding at random."""
    main.run(settings_of("rounds=1", "clients=2", "dataset.limit=100"), tmp_path)
    stochastic = {"step": 1.0, "rounding": "stochastic"}
    cases = {
        bias.ACTIVATION: [("none", {}), ("ec", {"error": 0.3})],
        bias.GRADIENT: [("none", {}), ("ec", stochastic), ("ec", {"error": 0.6})],
    }
    monkeypatch.setattr(bias, "CASES", cases)
    result = bias.measure(tmp_path, "data", 12)
    none, coded, exact, unbiased, biased = result["rows"]
    nothing = {"bias": 0.0, "noise": 0.0}
    assert none["client"] == none["server"] == exact["client"] == nothing
    assert none["bits"] > 32 > coded["bits"]
    assert min(coded["client"]["noise"], coded["server"]["noise"]) > 0
    assert "server" not in unbiased
    assert unbiased["client"]["bias"] < biased["client"]["bias"] / 2
    bias.show(result)
