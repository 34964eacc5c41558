"""What client and server compute alike: layers, the first mask, the first weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import torch
from torch import nn

from masksl.methods.flash import FlashConfig
from masksl.methods.flash.evolution import Evolution, Growth
from masksl.methods.flash.layers import Layers, allot, draw
from masksl.settings import RunConfig, Settings
from masksl.training.tensors import Tensors, copies, tensors_of
from masksl.utils import derive_seed

FIRST = 1  # version of the first mask


def network_of(settings: Settings, units: Sequence[nn.Module]) -> nn.Sequential:
    """Return the network of a run, given its units."""
    end = [nn.Softmax(dim=1)] if settings["method.softmax"] else []
    return nn.Sequential(*units, *end)


@dataclass(frozen=True)
class Start:
    """What a run begins with, from its seed.

    Parameters
    ----------
    config : FlashConfig
        Configuration of the method.
    layers : Layers
        The maskable weights.
    tensors : dict[str, torch.Tensor]
        Initial parameters and buffers by name, not masked.
    seed : int
        Seed of the run.
    clients : int
        Clients of the run.
    """

    config: FlashConfig
    layers: Layers
    tensors: Tensors
    seed: int
    clients: int

    @classmethod
    def of(cls, module: nn.Module, config: FlashConfig, run: RunConfig) -> Self:
        """Return the start of a network with its initial weights.

        Raises
        ------
        NetworkError
            If no weight can have a mask.
        """
        layers, tensors = Layers.of(module, config), copies(tensors_of(module))
        return cls(config, layers, tensors, run.seed, run.clients)

    @cached_property
    def counts(self) -> list[int]:
        """How many weights of each layer a mask keeps at the same density in all."""
        sizes = self.layers.sizes
        if not self.config.has_masks:
            return list(sizes)
        return allot(sizes, sizes, self.layers.kept(self.config.density))

    def mask(self, counts: Sequence[int], purpose: str = "flash.mask") -> np.ndarray:
        """Draw a random mask with so many weights of each layer."""
        return draw(derive_seed(self.seed, purpose), counts, self.layers.sizes)

    def weights(self, counts: Sequence[int]) -> Tensors:
        """Return the initial weights that go with a first mask, not masked."""
        tensors = dict(self.tensors)
        if self.config.scale_init:
            for name, kept in zip(self.layers.shapes, counts, strict=True):
                density = kept / tensors[name].numel()
                if kept:
                    tensors[name] = tensors[name] / math.sqrt(density)
        return tensors

    def target(self, mask: np.ndarray) -> int:
        """Return how many weights a client should keep that begins with a mask.

        That is the number of the group whose density is closest.
        """
        factors, kept = self.config.hetero or (1.0,), int(np.count_nonzero(mask))
        targets = [self.layers.kept(self.config.density * own) for own in factors]
        return min(targets, key=lambda target: abs(target - kept))

    def next_version(self, round_: int, client: int) -> int:
        """Return the version of a client's own mask after a round, from 1 on."""
        return FIRST + 1 + (round_ - 1) * self.clients + client

    def growth(self, client: int, round_: int) -> Growth:
        """Return how masks of a client grow in a round; 0 is the first stage."""

        def seed(number: int) -> int:
            place = {"client": client, "round": round_, "step": number}
            return derive_seed(self.seed, "flash.growth", **place)

        return Growth(self.layers, seed)

    def masked(self, tensors: Tensors, mask: torch.Tensor) -> Tensors:
        """Return tensors by name whose maskable weights are 0 outside a mask."""
        flat = self.layers.flat(tensors) * mask
        return tensors | self.layers.named(flat)

    @property
    def dense_bytes(self) -> int:
        """Bytes of all floating tensors in float32."""
        floating = [t for t in self.tensors.values() if t.is_floating_point()]
        return 4 * sum(tensor.numel() for tensor in floating)

    # --- the first stage --------------------------------------------------------------

    def warmup_mask(self) -> np.ndarray:
        """Draw the mask that clients begin the first stage with."""
        return self.mask(self.counts, "flash.warmup")

    def warmup(self) -> list[int]:
        """Run the first stage on the initial weights, without training or clients.

        Returns
        -------
        list[int]
            How many weights of each layer the mask keeps at its end.
        """
        layers, epochs = self.layers, self.config.warmup_epochs
        mask = torch.from_numpy(self.warmup_mask()).to(layers.device)
        flat = layers.flat(self.weights(self.counts)) * mask
        target = layers.kept(self.config.density)
        evolution = Evolution(mask, target, self.growth(0, 0))
        shares = [1 - epoch / epochs for epoch in range(1, epochs)] or [0.5]
        for share in shares:
            rate = self.config.prune_rate * share
            evolution.adjust(layers.named(flat), rate)
        return layers.counts(mask.cpu().numpy())

    def first_counts(self, counts: Sequence[Sequence[int]]) -> list[int]:
        """Return how many weights of each layer the first mask keeps.

        Parameters
        ----------
        counts : Sequence[Sequence[int]]
            Those of each mask at the end of the first stage.
        """
        means = np.mean(np.array(counts, np.float64), axis=0).tolist()
        total = self.layers.kept(self.config.density)
        return allot(means, self.layers.sizes, total)
