"""Which elements are kept: exact selection, ties to the lower index, no full sort."""

import math
from decimal import ROUND_FLOOR, Decimal

import numpy as np
import torch


def kept(sparsity: float, count: int) -> int:
    """Return k = floor((1 - sparsity) * count), at least 1, in decimal arithmetic."""
    exact = (1 - Decimal(str(sparsity))) * count
    return max(1, int(exact.to_integral_value(ROUND_FLOOR)))


def largest(magnitude: torch.Tensor, k: int) -> torch.Tensor:
    """Return the positions of the k largest elements of every row.

    Parameters
    ----------
    magnitude : torch.Tensor
        Shape (rows, n), not negative, contiguous.
    k : int
        1 to n. Of equal elements those of lower index are taken.

    Returns
    -------
    torch.Tensor
        int64, shape (rows * k,): ascending positions in the flat tensor.
    """
    if len(magnitude) == 1:
        candidates, smallest = _at_least_kth(magnitude.view(-1), k)
        if candidates.numel() == k:
            return candidates
        del candidates  # as large as two tensors where many are tied
    else:
        smallest = _kth(magnitude, k)
    mask = magnitude >= smallest.view(-1, 1)
    found = torch.stack([row.count_nonzero() for row in mask])  # sum(1) takes memory
    for row, surplus in enumerate((found - k).tolist()):
        if surplus:
            ties = positions(magnitude[row] == smallest.view(-1)[row])
            mask[row, ties[-surplus:]] = False
            del ties
    return positions(mask.view(-1))


def draw(
    magnitude: torch.Tensor, k: int, outside: float, generator: torch.Generator
) -> torch.Tensor:
    """Draw k positions of every row without replacement, mostly among its k largest.

    An element of the k largest has the weight (1 - outside) / k, any other
    outside / (n - k). An exponential race (the smallest of E / weight win) draws from
    these as one draw after the other would, for any n.

    Parameters
    ----------
    magnitude : torch.Tensor
        Shape (rows, n), not negative, contiguous.
    k : int
        1 to n.
    outside : float
        Weight of all elements outside the k largest, from 0 to less than 1.
    generator : torch.Generator
        On the device of ``magnitude``.

    Returns
    -------
    torch.Tensor
        int64, shape (rows * k,): ascending positions in the flat tensor.
    """
    count = magnitude.shape[1]
    top = largest(magnitude, k)
    if outside == 0 or k == count:
        return top
    arrival = torch.empty_like(magnitude, dtype=torch.float32)
    arrival.exponential_(generator=generator)
    speed = outside * k / ((1 - outside) * (count - k))  # of the others, top has 1
    arrival.view(-1)[top] *= speed
    arrival.clamp_(min=torch.finfo(torch.float32).tiny)
    return largest(arrival.reciprocal_(), k)


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Return where a flat bool tensor is true, int64, ascending."""
    if mask.device.type == "cpu":  # NumPy is several times as fast here
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().view(-1)


def below_zero(values: torch.Tensor) -> torch.Tensor:
    """Return where flat values are negative, int64, ascending."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(values.numpy() < 0))
    return positions(values < 0)


def masked(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the elements of a flat tensor where a bool one is true."""
    if mask.device.type == "cpu":  # NumPy needs no positions for it
        return torch.from_numpy(values.numpy()[mask.numpy()])
    return values[mask]


def _kth(values: torch.Tensor, k: int) -> torch.Tensor:
    """Return the k-th largest along the last dimension, which stays with size 1."""
    if values.device.type != "cpu":
        return values.topk(k, sorted=False).values.amin(-1, keepdim=True)
    if values.ndim > 1:
        return torch.stack([_kth(row, k) for row in values])
    rank = values.numel() - k  # NumPy again: topk takes four times the memory
    return torch.from_numpy(np.partition(values.numpy(), rank)[rank, None].copy())


def _at_least(values: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """Return where flat values are at least a bound, int64, ascending."""
    if values.device.type == "cpu":  # likewise
        return torch.from_numpy(np.flatnonzero(values.numpy() >= bound.numpy()))
    return positions(values >= bound)


def _at_least_kth(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where values are at least the k-th largest, and that one, shape (1,).

    A sample gives a threshold below which it cannot well lie; the exact choice is then
    made among the few elements above. Where fewer than k are, all are looked at.
    """
    stride = values.numel() // 2**15
    while math.gcd(stride, values.numel()) > 1:  # not the same column of every map
        stride += 1
    if stride > 1 and 8 * k < values.numel():
        sample = values[::stride]
        expected = k / stride
        rank = int(expected + 4 * expected**0.5) + 4
        guess = sample.topk(min(rank, sample.numel())).values[-1]
        candidates = _at_least(values, guess)
        if candidates.numel() >= k:
            above = values[candidates]
            smallest = _kth(above, k)
            return candidates[above >= smallest], smallest
    smallest = _kth(values, k)
    return _at_least(values, smallest), smallest
