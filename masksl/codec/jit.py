"""How inner loops are compiled: by Numba, once, kept on disk.

Where Numba is not installed or ``NUMBA_DISABLE_JIT`` is set, they run as plain Python,
about a thousand times slower.
"""

from typing import Any

try:
    from numba import njit
except ImportError:  # pragma: no cover

    def njit(**_):  # type: ignore[no-redef]
        """Return a decorator that leaves a function as it is."""
        return lambda function: function


# The loops allocate nothing. Without the counting of references to arrays (``_nrt``),
# which Numba otherwise adds to them, they are four times as fast.
_OPTIONS: dict[str, Any] = {"nogil": True, "_nrt": False, "error_model": "numpy"}


def compiled(function):
    """Compile a function; the result is kept on disk if there is a place for it."""
    try:
        return njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # Numba finds no folder to write to
        return njit(**_OPTIONS)(function)


inlined = njit(inline="always", **_OPTIONS)
