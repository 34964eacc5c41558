"""The discrete cosine transform of blocks of 4 x 4 elements of maps, orthonormal.

Coefficients lie by frequency: first those of 0, 0 of all blocks, which are as many maps
of a quarter of the height and the width; last those of 3, 3. Every sum and product is
rounded by itself in a fixed order, so that all processors compute the same.
"""

import math
from types import ModuleType

import numpy as np

from masksl.codec.coder import loops

SIDE = 4
BANDS = SIDE * SIDE

LARGEST = 1 / 16  # share of the largest number of a type that coefficients may be

# One half; cos(pi / 8) and cos(3 pi / 8) over the root of two, to the nearest float64.
_FACTORS = (
    0.5,
    float.fromhex("0x1.4e7ae9144f0fcp-1"),
    float.fromhex("0x1.1517a7bdb3895p-2"),
)


def fits(shape: tuple[int, ...]) -> bool:
    """Return whether a tensor has maps of whole blocks: shape (B, C, H, W)."""
    if len(shape) != 4 or not math.prod(shape):
        return False
    return not (shape[2] % SIDE or shape[3] % SIDE)


def coefficients_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the coefficients of a tensor, (16, B, C, H / 4, W / 4)."""
    return (BANDS, *shape[:2], shape[2] // SIDE, shape[3] // SIDE)


def correlation(maps: np.ndarray) -> float:
    """Return how alike neighbours are, below and beside, of maps (B, C, H, W).

    It is the lesser of two sums of products of neighbours over the sum of squares; NaN
    if all elements are 0.
    """
    total = float(np.square(maps).sum())
    below = float((maps[..., 1:, :] * maps[..., :-1, :]).sum())
    beside = float((maps[..., 1:] * maps[..., :-1]).sum())
    return min(below, beside) / total if total else math.nan


def forward(flat: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the coefficients of a tensor.

    Parameters
    ----------
    flat : numpy.ndarray
        float32 or float64, shape (d,), row-major.
    shape : tuple[int, ...]
        Shape of the tensor, see `fits`.

    Returns
    -------
    numpy.ndarray
        Of the same type, shape (d,), of the shape `coefficients_shape`.
    """
    out = np.empty_like(flat)
    factors, room = _scratch(flat.dtype)
    _loops().analyse(flat, math.prod(shape[:3]), shape[3], factors, room, out)
    return out


def decode(
    symbols: np.ndarray,
    levels: np.ndarray,
    signs: np.ndarray,
    shape: tuple[int, ...],
    positive: bool,
) -> np.ndarray:
    """Return the tensor of coefficients that are given by symbols.

    Parameters
    ----------
    symbols : numpy.ndarray
        uint8, shape (d,).
    levels : numpy.ndarray
        Magnitude of each symbol, float32 or float64, at most ``LARGEST`` of the largest
        number of its type: then all elements are finite.
    signs : numpy.ndarray
        uint8, read-only: a bit for each symbol that is not 0, 1 for negative, packed.
        With ``positive`` there are none of the frequency 0, 0.
    shape : tuple[int, ...]
        Shape of the tensor.
    positive : bool
        Whether elements below 0 are returned as 0.

    Returns
    -------
    numpy.ndarray
        Of the type of the levels, shape (d,).
    """
    out = np.empty(symbols.size, levels.dtype)
    counts = np.zeros(BANDS, np.int64)
    bands = symbols.reshape(BANDS, -1)[:-1]
    counts[1:] = np.cumsum([np.count_nonzero(band) for band in bands])
    if positive:
        counts -= counts[1]
        counts[0] = -1
    factors, room = _scratch(levels.dtype)
    blocks = math.prod(shape[:3]), shape[3], factors, room
    _loops().compose(symbols, levels, signs, counts, *blocks, out)
    return out


# pylint: disable-next=too-many-arguments,too-many-positional-arguments
def error(
    flat: np.ndarray,
    symbols: np.ndarray,
    levels: np.ndarray,
    exact: np.ndarray,
    shape: tuple[int, ...],
    positive: bool,
) -> float:
    """Return the relative error of the tensor that coefficients are decoded to.

    Parameters
    ----------
    flat : numpy.ndarray
        The coefficients, float32 or float64, shape (d,).
    symbols : numpy.ndarray
        uint8, shape (d,).
    levels : numpy.ndarray
        Magnitudes that symbols are decoded as, of the type of the coefficients.
    exact : numpy.ndarray
        The tensor, of the same type, shape (d,).
    shape, positive
        See `decode`.
    """
    factors, room = _scratch(flat.dtype)
    blocks = math.prod(shape[:3]), shape[3], factors, positive, room
    lost, whole = _loops().distance(flat, symbols, levels, *blocks, exact)
    return math.sqrt(lost / whole) if whole else 0.0


def _scratch(dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors of the transform, and room for a strip of blocks."""
    return np.array(_FACTORS, dtype), np.zeros((BANDS, _loops().STRIP), dtype)


def _loops() -> ModuleType:
    """Import the compiled loops."""
    loops()
    # pylint: disable-next=import-outside-toplevel
    from masksl.codec import kernels_dct

    return kernels_dct
