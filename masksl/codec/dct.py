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

_HALF = 0.5
_LONG, _SHORT = (math.cos(k * math.pi / 8) / math.sqrt(2) for k in (1, 3))


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


def inverse(flat: np.ndarray, shape: tuple[int, ...], positive: bool) -> np.ndarray:
    """Return the tensor of coefficients; the inverse of `forward`.

    Parameters
    ----------
    flat : numpy.ndarray
        float32 or float64, shape (d,).
    shape : tuple[int, ...]
        Shape of the tensor.
    positive : bool
        Whether elements below 0 are returned as 0.

    Returns
    -------
    numpy.ndarray
        Of the same type, shape (d,).
    """
    out = np.empty_like(flat)
    factors, room = _scratch(flat.dtype)
    blocks = math.prod(shape[:3]), shape[3], factors, positive, room
    _loops().compose(flat, *blocks, out)
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
        uint8, shape (d,); 255 are sent exactly.
    levels : numpy.ndarray
        Magnitudes that symbols are decoded as, of the type of the coefficients.
    exact : numpy.ndarray
        The tensor, of the same type, shape (d,).
    shape, positive
        See `inverse`.
    """
    factors, room = _scratch(flat.dtype)
    blocks = math.prod(shape[:3]), shape[3], factors, positive, room
    lost, whole = _loops().distance(flat, symbols, levels, *blocks, exact)
    return math.sqrt(lost / whole) if whole else 0.0


def _scratch(dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors of the transform, and room for the loops."""
    factors = np.array([_HALF, _LONG, _SHORT], dtype)
    return factors, np.zeros((BANDS, _loops().STRIP), dtype)


def _loops() -> ModuleType:
    """Import the compiled loops."""
    loops()
    # pylint: disable-next=import-outside-toplevel
    from masksl.codec import kernels_dct

    return kernels_dct
