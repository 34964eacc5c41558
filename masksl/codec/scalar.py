"""Symbols of elements: by a function, or by the nearest of some levels."""

from collections.abc import Callable

import torch

_BLOCK = 2**20  # elements of a block that fits the cache


def to_symbols(
    magnitude: torch.Tensor, level: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Apply a function to flat magnitudes and truncate the results to uint8.

    Parameters
    ----------
    magnitude : torch.Tensor
        Shape (d,).
    level : Callable[[torch.Tensor], torch.Tensor]
        Elementwise; its values are from 0 to less than 256.
    """
    if magnitude.device.type != "cpu":
        return level(magnitude).to(torch.uint8)
    symbols = torch.empty_like(magnitude, dtype=torch.uint8)
    parts = zip(magnitude.split(_BLOCK), symbols.split(_BLOCK), strict=True)
    for part, out in parts:
        out.copy_(level(part))
    return symbols


def number(value: float, like: torch.Tensor) -> torch.Tensor:
    """Return a number as a tensor to divide by, of the type and device of another.

    Dividing by a Python float lets CUDA multiply by the reciprocal, which rounds
    differently; dividing by a tensor does not. Values beyond the type become infinite.
    """
    exact = torch.full((), value, dtype=torch.float64, device=like.device)
    return exact.to(like.dtype)


def nearest(work: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Return the index of the nearest of ascending levels, uint8, for each element.

    Parameters
    ----------
    work : torch.Tensor
        float32 or float64, shape (d,).
    levels : torch.Tensor
        float64, at most 256, on the device of ``work``.
    """
    middles = (levels[1:] / 2 + levels[:-1] / 2).to(work)
    return torch.bucketize(work, middles, out_int32=True).to(torch.uint8)
