"""Selection of kept elements: exact, ties to the lower index, without a full sort."""

import math
from decimal import ROUND_FLOOR, Decimal

import numpy as np
import torch

from masksl.codec.bits import BLOCK


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
    if magnitude.device.type != "cpu":
        return _largest_on_device(magnitude, k)
    if len(magnitude) == 1:
        return torch.from_numpy(_of_row(magnitude.view(-1).numpy(), k))
    step = max(1, BLOCK // magnitude.shape[1])
    mask = torch.cat([_of_rows(part, k).view(-1) for part in magnitude.split(step)])
    return positions(mask)


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
    speed = (
        outside * k / ((1 - outside) * (count - k))
    )  # of the other elements; those of the top k have 1
    arrival.view(-1)[top] *= speed
    arrival.clamp_(min=torch.finfo(torch.float32).tiny)
    return largest(arrival.reciprocal_(), k)


def positions(mask: torch.Tensor, count: int | None = None) -> torch.Tensor:
    """Return the positions of true elements of a flat bool tensor, int64, ascending.

    Parameters
    ----------
    mask : torch.Tensor
        bool, shape (n,).
    count : int | None
        Number of true elements; if it is given, a GPU is not synchronised.
    """
    if mask.device.type == "cpu":  # NumPy is several times as fast here
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    if count is None:
        return mask.nonzero().view(-1)
    return torch.nonzero_static(mask, size=count).view(-1)


def with_sign(values: torch.Tensor, count: int) -> torch.Tensor:
    """Return the positions of ``count`` values with a sign, int64, ascending.

    These are the negative values and the zero with a sign.
    """
    if values.device.type == "cpu":  # several times as fast as PyTorch's
        return torch.from_numpy(np.flatnonzero(np.signbit(values.numpy())))
    return positions(torch.signbit(values), count)


def masked(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the elements of a flat tensor at the true elements of a mask."""
    if mask.device.type == "cpu":  # NumPy needs no positions for it
        return torch.from_numpy(values.numpy()[mask.numpy()])
    return values[mask]


def _largest_on_device(magnitude: torch.Tensor, k: int) -> torch.Tensor:
    """Select like `largest`, by whole-tensor operations without synchronising."""
    smallest = magnitude.topk(k, sorted=False).values.amin(1, keepdim=True)
    mask, ties = magnitude > smallest, magnitude == smallest
    places = k - mask.sum(1, keepdim=True)
    mask |= ties & (ties.cumsum(1, dtype=torch.int32) <= places)
    return positions(mask.view(-1), mask.shape[0] * k)


def _of_row(values: np.ndarray, k: int) -> np.ndarray:
    """Select the k largest of flat values, as ascending positions."""
    candidates, smallest = _at_least_kth(values, k)
    if candidates.size == k:
        return candidates
    del candidates  # as large as two tensors if many are tied
    mask = values >= smallest
    ties = np.flatnonzero(values == smallest)
    mask[ties[k - np.count_nonzero(mask) :]] = False
    return np.flatnonzero(mask)


def _of_rows(magnitude: torch.Tensor, k: int) -> torch.Tensor:
    """Select the k largest of some rows together, bool, shape (rows, n)."""
    rows = magnitude.numpy()
    rank = rows.shape[1] - k
    smallest = np.partition(rows, rank)[:, rank, None]
    mask = rows >= smallest
    tied = np.flatnonzero(mask.sum(1, dtype=np.int32) > k)
    if len(tied):
        rows, smallest = rows[tied], smallest[tied]
        above, ties = rows > smallest, rows == smallest
        places = k - above.sum(1, dtype=np.int32, keepdims=True)
        mask[tied] = above | ties & (ties.cumsum(1, dtype=np.int32) <= places)
    return torch.from_numpy(mask)


def _kth(values: np.ndarray, k: int) -> np.generic:
    """Return the k-th largest of flat values."""
    rank = values.size - k
    kth: np.generic = np.partition(values, rank)[rank]
    return kth


def _at_least_kth(values: np.ndarray, k: int) -> tuple[np.ndarray, np.generic]:
    """Return the positions of the k largest values and their ties, and the k-th value.

    A sample gives a threshold that is very likely a lower bound of the k-th value. The
    exact selection is made among the few elements above it. If there are fewer than k,
    it is made among all.
    """
    stride = values.size // 2**15
    while math.gcd(stride, values.size) > 1:  # not the same column of every map
        stride += 1
    if stride > 1 and 8 * k < values.size:
        sample = values[::stride]
        expected = k / stride
        rank = int(expected + 4 * expected**0.5) + 4
        guess = _kth(sample, min(rank, sample.size))
        candidates = np.flatnonzero(values >= guess)
        if candidates.size >= k:
            above = values[candidates]
            smallest = _kth(above, k)
            return candidates[above >= smallest], smallest
    smallest = _kth(values, k)
    return np.flatnonzero(values >= smallest), smallest
