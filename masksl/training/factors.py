"""Gradients of linear layers as two factors, and distances without multiplying them.

The gradient of a linear layer's weights is a product: of what went into the layer, and
of the gradient of what came out. Where a mini-batch is small, the two are much smaller
than their product.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge


class Factors(NamedTuple):
    """The gradient of a linear layer.

    That of its weights is ``outputs.T @ inputs``, that of its biases
    ``outputs.sum(0)``.

    Parameters
    ----------
    inputs : torch.Tensor
        What went in, shape (B, I).
    outputs : torch.Tensor
        Gradient of the loss with respect to what came out, shape (B, O).
    """

    inputs: torch.Tensor
    outputs: torch.Tensor


@dataclass
class Trace:
    """Factors of the linear layers of a network, found while it computes gradients.

    The layers are those with biases that take part once, on vectors and in float32,
    where two mini-batches of inputs and outputs are smaller than the weights, and share
    no weights with another. Their inputs must not be changed in place.

    Parameters
    ----------
    other : Trace | None
        A trace of the same network and mini-batch at other weights. If it is given, the
        gradients of those layers are compared with it and not computed themselves.

    Attributes
    ----------
    factors : dict[str, Factors]
        By name of the layer.
    distance : float
        Sum over the layers of the `squared_distance` to ``other``.
    """

    other: "Trace | None" = None
    factors: dict[str, Factors] = field(default_factory=dict, init=False)
    distance: float = field(default=0.0, init=False)
    _inputs: dict[str, torch.Tensor] = field(default_factory=dict, init=False)
    _edges: dict[str, GradientEdge] = field(default_factory=dict, init=False)

    @contextmanager
    def forward(self, module: nn.Module) -> Iterator[None]:
        """Note what goes into the layers, in one forward pass."""
        calls = Counter[str]()
        every = module.named_parameters(remove_duplicate=False)
        uses = Counter(id(parameter) for _, parameter in every)

        def note(name: str, layer: nn.Linear, given: Any, made: torch.Tensor) -> None:
            (inputs,) = given
            calls[name] += 1
            smaller = 2 * (inputs.numel() + made.numel()) < layer.weight.numel()
            if inputs.dim() == 2 and smaller and made.dtype == torch.float32:
                self._inputs[name] = inputs.detach()
                self._edges[name] = get_gradient_edge(made)

        hooks = [
            layer.register_forward_hook(
                lambda *of, name=name: note(name, *of)  # type: ignore[misc]
            )
            for name, layer in module.named_modules()
            if isinstance(layer, nn.Linear) and layer.bias is not None
            if uses[id(layer.weight)] == uses[id(layer.bias)] == 1
        ]
        try:
            yield
        finally:
            for each in hooks:
                each.remove()
        for name in [n for n in self._inputs if calls[n] > 1]:
            del self._inputs[name], self._edges[name]

    def replaces(self, parameter: str) -> bool:
        """Return whether the gradient of a parameter need not be computed itself."""
        layer = parameter.rpartition(".")[0]
        return self.other is not None and layer in self._inputs

    @property
    def edges(self) -> list[GradientEdge]:
        """Where the gradients of the layers' outputs arise."""
        return list(self._edges.values())

    def backward(self, outputs: Sequence[torch.Tensor]) -> None:
        """Take the gradients at the `edges`."""
        pairs = zip(self._inputs.items(), outputs, strict=True)
        self.factors = {name: Factors(own, d) for (name, own), d in pairs}
        if self.other is not None:
            self.distance = sum(
                squared_distance(own, self.other.factors[name])
                for name, own in self.factors.items()
            )


def squared_distance(one: Factors, other: Factors) -> float:
    """Return the squared norm of the difference of two gradients of a linear layer.

    With inputs X and output gradients D the difference is (D − D')ᵀX + D'ᵀ(X − X'), one
    product over 2B rows. Its squared norm is the sum of the elementwise product of the
    two Gram matrices. Equal gradients have the distance 0.

    Parameters
    ----------
    one, other : Factors
        Of the same layer, at mini-batches of B samples.

    Returns
    -------
    float
        Of weights and biases together, computed in float64.
    """
    x, d = (tensor.double() for tensor in one)
    x_other, d_other = (tensor.double() for tensor in other)
    inputs, outputs = torch.cat([x, x - x_other]), torch.cat([d - d_other, d_other])
    weights = ((inputs @ inputs.T) * (outputs @ outputs.T)).sum()
    return float(weights + (d - d_other).sum(0).square().sum())
