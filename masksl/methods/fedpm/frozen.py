"""The frozen weights of a network: a magnitude for each layer, a random sign each."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import xxhash
from torch import nn

from masksl.codec import philox
from masksl.training.flat import FlatParameters


class NetworkError(ValueError):
    """A network with layers that are not supported."""


@dataclass(frozen=True)
class Frozen(FlatParameters):
    """The frozen weights of a network, and how they lie in one vector.

    Parameters
    ----------
    shapes : dict[str, torch.Size]
        Shapes of the parameters by name, in order.
    device : torch.device
        Device of the vectors.
    signs : numpy.ndarray
        uint8, shape (d,): 1 for a negative weight.
    magnitudes : dict[str, float]
        Magnitude of the weights by the parameter's name.
    constant : float
        Magnitude of a weight of fan-in 1.
    seed : int
        Seed of the signs.
    """

    signs: np.ndarray
    magnitudes: Mapping[str, float]
    constant: float
    seed: int

    @classmethod
    def of(cls, module: nn.Module, constant: float, seed: int) -> "Frozen":
        """Draw the frozen weights of a network.

        Parameters
        ----------
        module : nn.Module
            A network of linear layers and convolutions; its weights do not matter.
        constant : float
            Magnitude of a weight of fan-in 1.
        seed : int
            Seed of the signs.

        Raises
        ------
        NetworkError
            If it has other parameters, or buffers.
        """
        magnitudes = {}
        for prefix, layer in module.named_modules():
            own = [name for name, _ in layer.named_parameters(recurse=False)]
            own += [name for name, _ in layer.named_buffers(recurse=False)]
            if own and not isinstance(layer, nn.Linear | nn.Conv2d):
                raise NetworkError(
                    f"{type(layer).__name__} has {own[0]}; masks need a network of "
                    "linear layers and convolutions"
                )
            for name in own:
                fan_in = layer.weight[0].numel()  # type: ignore[union-attr,index]
                key = f"{prefix}.{name}" if prefix else name
                magnitudes[key] = constant / math.sqrt(fan_in)
        named = dict(module.named_parameters())
        shapes = {name: parameter.shape for name, parameter in named.items()}
        count = sum(parameter.numel() for parameter in named.values())
        signs = philox.bits(seed, 0, count)
        device = next(iter(named.values())).device
        return cls(shapes, device, signs, magnitudes, constant, seed)

    @cached_property
    def weights(self) -> torch.Tensor:
        """The frozen weights, float32, shape (d,)."""
        signs = 1 - 2 * torch.from_numpy(self.signs).to(torch.float32)
        parts = signs.split(self.sizes)
        pairs = zip(self.shapes, parts, strict=True)
        scaled = [part * self.magnitudes[name] for name, part in pairs]
        return torch.cat(scaled).to(self.device)

    @cached_property
    def layers(self) -> torch.Tensor:
        """Which parameter each weight belongs to, int32, shape (d,)."""
        numbers = np.arange(len(self.sizes), dtype=np.int32)
        return torch.from_numpy(np.repeat(numbers, self.sizes))

    @cached_property
    def digest(self) -> bytes:
        """64 bits by which two sides compare their frozen weights (XXH3)."""
        packed = np.packbits(self.signs, bitorder="little")
        magnitudes = np.array([*self.magnitudes.values()], "<f8").tobytes()
        return xxhash.xxh3_64_digest(packed.tobytes() + magnitudes)
