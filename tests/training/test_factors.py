"""Factors of linear layers give the distances of their gradients."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from masksl.training.compute import ComputeConfig
from masksl.training.factors import Trace
from masksl.training.network import LocalNetwork
from masksl.training.tensors import Tensors, copies, tensors_of

BFLOAT16 = ComputeConfig(precision="bfloat16")


class Twice(nn.Module):
    """A linear layer that takes part twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Apply it twice."""
        made: torch.Tensor = self.layer(self.layer(images))
        return made


def network(seed: int) -> nn.Module:
    """Return a network with two layers that are worth factors and others."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.Flatten(),
        nn.Linear(128, 96),
        nn.ReLU(inplace=True),
        nn.Linear(96, 80, bias=False),
        nn.Linear(80, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def batch(samples: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(samples, 1, 8, 8, generator=generator)
    return images, torch.arange(samples) % 10


def gradients(
    module: nn.Module,
    tensors: Tensors,
    trace: Trace | None,
    samples: int = 4,
    config: ComputeConfig | None = None,
) -> Tensors:
    """Return the gradients of a mini-batch at some weights."""
    own = LocalNetwork(module, copies(tensors), {}, 1, config or ComputeConfig())
    _, found = own.gradients(*batch(samples), smoothing=0.0, seed=1, trace=trace)
    assert found is not None
    return found


@pytest.mark.parametrize("change", [1.0, 1e-2, 1e-5])
def test_the_distance_is_that_of_the_gradients(change: float) -> None:
    module = network(0)
    one, towards = tensors_of(module), tensors_of(network(1))
    other = {name: t + change * (towards[name] - t) for name, t in one.items()}
    first = Trace()
    found = gradients(module, one, first)
    second = Trace(first)
    rest = gradients(module, other, second)
    assert set(second.factors) == {"2", "5", "7"}
    layers = {f"{n}.{kind}" for n in second.factors for kind in ("weight", "bias")}
    assert set(rest) == set(found) - layers
    double = module.double()
    torch.set_num_threads(1)
    wide = []
    for tensors in (one, other):
        own = {n: t.double().requires_grad_() for n, t in tensors.items()}
        images, labels = batch()
        logits = torch.func.functional_call(double, own, (images.double(),))
        loss = functional.cross_entropy(logits, labels)
        wide.append(
            dict(zip(own, torch.autograd.grad(loss, list(own.values())), strict=True))
        )
    exact = sum(float((wide[0][n] - wide[1][n]).square().sum()) for n in layers)
    assert second.distance == pytest.approx(exact, rel=min(0.01, 1e-6 / change))


def test_factors_are_the_gradients_and_change_none() -> None:
    module = network(0)
    tensors, trace = tensors_of(module), Trace()
    without, found = (gradients(module, tensors, each) for each in (None, trace))
    assert without.keys() == found.keys()
    assert all(torch.equal(without[name], found[name]) for name in found)
    for name, (inputs, outputs) in trace.factors.items():
        product = outputs.T @ inputs
        torch.testing.assert_close(product, found[f"{name}.weight"])
        torch.testing.assert_close(outputs.sum(0), found[f"{name}.bias"])


def test_equal_weights_have_the_distance_zero() -> None:
    module, first = network(0), Trace()
    gradients(module, tensors_of(module), first)
    second = Trace(first)
    gradients(module, tensors_of(module), second)
    assert second.factors and second.distance == 0


@pytest.mark.parametrize(
    ("module", "samples", "config"),
    [
        (nn.Sequential(nn.Flatten(), Twice()), 4, None),
        (network(0), 40, None),
        (network(0), 4, BFLOAT16),
        (nn.Linear(8, 10), 1, None),
    ],
    ids=["twice", "large mini-batches", "bfloat16", "images"],
)
def test_other_layers_are_left_alone(
    module: nn.Module, samples: int, config: ComputeConfig | None
) -> None:
    first = Trace()
    if isinstance(module, nn.Linear):
        module = nn.Sequential(module, nn.Flatten())
    found = gradients(module, tensors_of(module), first, samples, config)
    second = Trace(first)
    again = gradients(module, tensors_of(module), second, samples, config)
    assert not first.factors and not second.factors and not second.distance
    assert found.keys() == again.keys()
    assert not module._forward_hooks  # pylint: disable=protected-access
