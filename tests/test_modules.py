"""A compressor between two modules."""

import doctest

import torch
from torch import nn

from masksl import compress, modules, settings
from masksl.compress import decode, make
from masksl.modules import CompressedCut


def test_examples_in_docstrings_run() -> None:
    for module in (modules, compress, settings):
        result = doctest.testmod(module)
        assert result.attempted > 0
        assert result.failed == 0


def test_gradients_pass_straight() -> None:
    before, after = nn.Linear(6, 40), nn.Linear(40, 3)
    cut = CompressedCut(make("ms", sparsity=0.9))
    images = torch.randn(5, 6)
    nn.Sequential(before, cut, after)(images).square().sum().backward()
    activation = before(images)
    decoded = decode(make("ms", sparsity=0.9).encode(activation)).requires_grad_(True)
    after(decoded).square().sum().backward()
    (gradient,) = torch.autograd.grad(activation, before.weight, decoded.grad)
    assert torch.equal(before.weight.grad, gradient)
    assert cut.elements == 200
    assert cut.bytes == len(make("ms", sparsity=0.9).encode(activation))


def test_without_loss_it_changes_nothing() -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    cut = nn.Sequential(network[0], network[1], CompressedCut(make("none")), network[2])
    images = torch.randn(3, 4)
    assert torch.equal(cut(images), network(images))


def test_training_and_evaluation_are_told_apart() -> None:
    cut = CompressedCut(make("rt", sparsity=0.9, alpha=0.5))
    tensor = torch.rand(400)
    first, second = cut(tensor), cut(tensor)
    assert not torch.equal(first, second)
    cut.eval()
    top = decode(make("sp", sparsity=0.9).encode(tensor))
    assert torch.equal(cut(tensor), top)
    assert torch.equal(cut(tensor), top)
