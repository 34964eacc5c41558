"""Coding of votes: whole numbers, bit by bit, each bit as a mask.

The highest bit comes first. A bit is coded by the bits above it and by a context that
both sides hold, so that all bits together take what the numbers' own shares in each
context do.
"""

from collections.abc import Sequence

import numpy as np
import torch

from masksl.codec import wire
from masksl.compress import FrameError, decode, make

_MASK = make("mask")
_MOST = 2**16  # levels of a mask


def encode_votes(
    votes: np.ndarray, most: int, contexts: np.ndarray | None = None
) -> list[bytes]:
    """Encode whole numbers.

    Parameters
    ----------
    votes : numpy.ndarray
        Shape (d,), 0 to ``most``.
    most : int
        The largest that is possible, at least 1.
    contexts : numpy.ndarray | None
        Whole numbers from 0 on, shape (d,). Left out where there would be too many
        together with the bits.

    Returns
    -------
    list[bytes]
        A frame for each bit, the highest first.
    """
    frames = []
    above = _start(len(votes), most, contexts)
    for place in reversed(range(most.bit_length())):
        bit = votes.astype(np.int64) >> place & 1
        frames.append(
            _MASK.encode(torch.from_numpy(bit == 1), reference=torch.from_numpy(above))
        )
        above = above << 1 | bit
    return frames


def decode_votes(
    frames: Sequence[bytes],
    count: int,
    most: int,
    contexts: np.ndarray | None = None,
) -> np.ndarray:
    """Decode whole numbers; the inverse of `encode_votes`.

    Parameters
    ----------
    frames : Sequence[bytes]
        What it returned.
    count : int
        Number of votes, d.
    most, contexts
        As they were encoded with.

    Returns
    -------
    numpy.ndarray
        int64, shape (d,).

    Raises
    ------
    FrameError
        If a frame is broken, there are not as many as bits, or a number is larger than
        ``most``.
    """
    if len(frames) != most.bit_length():
        raise FrameError(f"{len(frames)} frames of votes up to {most}")
    above, votes = _start(count, most, contexts), np.zeros(count, np.int64)
    for frame in frames:
        reference = torch.from_numpy(above)
        bit = decode_mask(frame, count, reference).astype(np.int64)
        above, votes = above << 1 | bit, votes << 1 | bit
    if int(votes.max()) > most:
        raise FrameError(f"{int(votes.max())} votes of {most}")
    return votes


def decode_mask(frame: bytes, count: int, reference: torch.Tensor | None) -> np.ndarray:
    """Decode one mask.

    Parameters
    ----------
    frame : bytes
        A frame of the compressor `mask`.
    count : int
        Expected number of elements, d.
    reference : torch.Tensor | None
        What it was encoded by.

    Returns
    -------
    numpy.ndarray
        uint8, shape (d,): zeros and ones.

    Raises
    ------
    FrameError
        If it is broken, of other elements, or was encoded by another reference.
    """
    header, _ = wire.parse(frame, max_elements=count)
    if header.compressor != _MASK.name or header.shape != (count,):
        raise FrameError(
            f"{header.compressor} frame of shape {header.shape}, expected a mask of "
            f"{count}"
        )
    mask = decode(frame, max_elements=count, reference=reference)
    return mask.view(torch.uint8).numpy()


def _start(count: int, most: int, contexts: np.ndarray | None) -> np.ndarray:
    """Return the context of the highest bit."""
    if contexts is None or (int(contexts.max()) + 1) << (most.bit_length() - 1) > _MOST:
        return np.zeros(count, np.int64)
    return contexts.astype(np.int64)
