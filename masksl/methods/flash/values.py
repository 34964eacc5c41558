"""Weights that are kept, and what has no mask, as one frame-set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from masksl.compress import Compressor, NotFiniteError, decode_set, encode_set
from masksl.methods.flash.layers import Layers
from masksl.methods.flash.start import Start
from masksl.runtime.compressors import EXACT, compressor_of
from masksl.settings import Settings
from masksl.training.tensors import Tensors, all_finite


@dataclass(frozen=True)
class ValueCoding:
    """Turns kept weights and the rest, or their changes, into bytes and back.

    Weights are compressed together, those of each layer divided by their standard
    deviation before; ``compressor=none`` sends them as they are. What has no mask is
    compressed with them if it is a weight, of two dimensions or more; biases and what
    normalisation has travel exactly, in a type of their own.

    Parameters
    ----------
    layers : Layers
        The maskable weights.
    compressor : Compressor
        Of the weights.
    rest : Mapping[str, torch.Tensor]
        Tensors like those that have no mask, by name, of the types that they are sent
        in.
    absolute : bool
        Whether weights are sent, and not how they have changed.
    """

    layers: Layers
    compressor: Compressor
    rest: Mapping[str, torch.Tensor]
    absolute: bool

    @classmethod
    def both(
        cls, start: Start, settings: Settings
    ) -> tuple["ValueCoding", "ValueCoding"]:
        """Return how weights come down and what goes up.

        Changes go up unless nothing is lost either way.
        """
        dtype = getattr(torch, start.config.rest)
        rest = {name: start.tensors[name] for name in start.layers.rest}
        rest |= {n: tensor.to(dtype) for n, tensor in rest.items() if tensor.dim() < 2}
        down = compressor_of(settings, "model_compressor")
        up = compressor_of(settings, "compressor")
        exact = down == up == EXACT and dtype == torch.float32
        return cls(start.layers, down, rest, True), cls(start.layers, up, rest, exact)

    @property
    def dense(self) -> list[str]:
        """Names of the weights that have no mask."""
        return [name for name, tensor in self.rest.items() if tensor.dim() > 1]

    def encode(
        self,
        kept: torch.Tensor,
        counts: Sequence[int],
        rest: Mapping[str, torch.Tensor],
        *,
        seed: int,
    ) -> bytes:
        """Encode kept weights and the rest.

        Parameters
        ----------
        kept : torch.Tensor
            float32, shape (k,): those of all layers, in order.
        counts : Sequence[int]
            How many there are of each layer.
        rest : Mapping[str, torch.Tensor]
            What has no mask, by name.
        seed : int
            Seed of the compressor's draws.

        Raises
        ------
        NotFiniteError
            If a value is not finite, in the type that it is sent in.
        """
        tensors = self.layers.split(kept, counts)
        for name, like in self.rest.items():
            tensors[name] = rest[name].detach().to(like.dtype)
        for name, tensor in tensors.items():
            if not all_finite(tensor):
                raise NotFiniteError(f"tensor {name}: not finite")
        if self.compressor == EXACT:
            return encode_set(tensors)
        return encode_set(
            tensors,
            self.compressor,
            exact=self.rest.keys() - set(self.dense),
            joined=True,
            scaled=True,
            seed=seed,
        )

    def decode(
        self, data: bytes, counts: Sequence[int]
    ) -> tuple[torch.Tensor, Tensors]:
        """Decode kept weights and the rest, as `encode` got them.

        Returns
        -------
        tuple[torch.Tensor, dict[str, torch.Tensor]]
            float32, shape (k,); and what has no mask, float32, by name.

        Raises
        ------
        FrameError
            If the frame-set is broken or has other numbers of weights.
        """
        empty = torch.empty(sum(counts), device=self.layers.device)
        decoded = decode_set(data, self.layers.split(empty, counts) | dict(self.rest))
        kept = torch.cat([decoded[name] for name in self.layers.shapes])
        return kept, {name: decoded[name].float() for name in self.rest}
