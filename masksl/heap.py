"""Memory that is free but that the C library keeps to itself."""

import ctypes

CROWD = 64
"""Clients from which the holes that they leave in the heap are worth the time."""


def trim() -> None:
    """Give free memory back to the system, where the C library can (glibc)."""
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if release is not None:
        release(0)
