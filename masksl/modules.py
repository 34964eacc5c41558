"""A compressor between two modules of any PyTorch program."""

import torch
from torch import nn

from masksl.compress import Compressor, decode


class CompressedCut(nn.Module):
    """Compresses tensors that pass through it, with a straight-through gradient.

    The forward pass encodes and decodes. The backward pass treats the compressor as the
    identity: it returns the gradient with respect to the decoded tensor unchanged.

    Parameters
    ----------
    compressor : Compressor
        A compressor made by `masksl.compress.make`.
    seed : int
        Seed of random draws; each forward pass uses the next one.

    Attributes
    ----------
    elements : int
        Number of compressed elements so far.
    bytes : int
        Bytes of their frames.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from masksl.compress import make
    >>> from masksl.modules import CompressedCut
    >>> cut = CompressedCut(make("ms", sparsity=0.99, bits=2))
    >>> network = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), cut, nn.Linear(256, 10))
    >>> network(torch.randn(128, 64)).sum().backward()
    >>> round(8 * cut.bytes / cut.elements, 2)
    2.33
    """

    def __init__(self, compressor: Compressor, *, seed: int = 0) -> None:
        super().__init__()
        self.compressor = compressor
        self.elements = 0
        self.bytes = 0
        self._seed = seed

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        """Encode and decode a tensor.

        Raises
        ------
        NotFiniteError
            If it has values that are not finite.
        """
        frame = self.compressor.encode(tensor, seed=self._seed, training=self.training)
        decoded = decode(frame, device=tensor.device, max_elements=tensor.numel())
        self._seed += 1
        self.elements += tensor.numel()
        self.bytes += len(frame)
        return _StraightThrough.apply(tensor, decoded)

    def extra_repr(self) -> str:
        """Show the compressor."""
        return repr(self.compressor)


class _StraightThrough(torch.autograd.Function):  # pylint: disable=abstract-method
    """Returns its second argument; the gradient goes to the first one."""

    @staticmethod
    def forward(ctx, tensor, decoded):  # pylint: disable=arguments-differ
        """Return the decoded tensor."""
        del ctx, tensor
        return decoded

    @staticmethod
    def backward(ctx, gradient):  # pylint: disable=arguments-differ
        """Return the gradient unchanged."""
        del ctx
        return gradient, None
