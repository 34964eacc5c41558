"""A compressor between two modules of any PyTorch program."""

import torch
from torch import nn

from masksl.compress import Compressor, decode


class CompressedCut(nn.Module):
    """Sends what passes through it through a compressor, gradients straight.

    The forward pass encodes and decodes; the backward pass counts the compressor as the
    identity, so that the module before it gets the gradient with respect to the decoded
    tensor as it is.

    Parameters
    ----------
    compressor : Compressor
        What `masksl.compress.make` returns.
    seed : int
        Seed of what the compressor draws; each forward pass takes the next one.

    Attributes
    ----------
    elements : int
        Elements that have passed so far.
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
        """Return the tensor as it comes out on the other side.

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
    """The second argument's value with the first one's gradient."""

    @staticmethod
    def forward(ctx, tensor, decoded):  # pylint: disable=arguments-differ
        """Return the decoded tensor."""
        del ctx, tensor
        return decoded

    @staticmethod
    def backward(ctx, gradient):  # pylint: disable=arguments-differ
        """Hand the gradient through."""
        del ctx
        return gradient, None
