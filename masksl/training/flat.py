"""The parameters of a network as one vector."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from masksl.training.tensors import Tensors

Shapes = Mapping[str, torch.Size]


@dataclass(frozen=True)
class FlatParameters:
    """How the parameters of a network lie in one vector.

    Parameters
    ----------
    shapes : Mapping[str, torch.Size]
        Shapes of the parameters by name, in order.
    device : torch.device
        Device of the vectors.
    """

    shapes: Shapes
    device: torch.device

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of elements of each parameter."""
        return tuple(shape.numel() for shape in self.shapes.values())

    @property
    def elements(self) -> int:
        """Number of elements of all parameters, d."""
        return sum(self.sizes)

    def named(self, flat: torch.Tensor) -> Tensors:
        """Return the views of a vector by name; they share its memory."""
        parts = flat.split(self.sizes)
        pairs = zip(self.shapes.items(), parts, strict=True)
        return {name: part.view(shape) for (name, shape), part in pairs}

    def flat(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the vector of tensors by name, a copy."""
        return torch.cat([tensors[name].detach().reshape(-1) for name in self.shapes])
