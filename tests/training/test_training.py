"""Steps on tensors: averages, networks with tensors of their own."""

import pytest
import torch
from torch import nn

from masksl.training.compute import compute
from masksl.training.network import LocalNetwork
from masksl.training.tensors import average


def test_average() -> None:
    one = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3)}
    two = {"w": torch.tensor([5.0, 2.0]), "n": torch.tensor(7)}
    mean = average([one, two], [1, 3])
    assert torch.equal(mean["w"], torch.tensor([4.0, 2.0]))
    assert int(mean["n"]) == 7
    assert average([one], [5])["w"] is one["w"]


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
