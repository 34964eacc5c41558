"""Checks of options: one line that names the option, its value and what is allowed."""

from collections.abc import Sequence


def check_sparsity(sparsity: float) -> None:
    """Check the share of dropped elements."""
    number = isinstance(sparsity, (int, float)) and not isinstance(sparsity, bool)
    if not (number and 0 <= sparsity < 1):
        raise ValueError(f"sparsity={sparsity!r}: must be at least 0 and less than 1")


def check_whole(option: str, value: int, least: int, most: int) -> None:
    """Check that a whole number is within inclusive bounds."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (whole and least <= value <= most):
        raise ValueError(
            f"{option}={value!r}: must be a whole number from {least} to {most}"
        )


def check_number(
    option: str, value: float, least: float, most: float, *, inclusive: bool = False
) -> None:
    """Check that a number is at least ``least`` and less than ``most``.

    It may be ``most`` as well if that is ``inclusive``.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    within = number and least <= value <= most and (inclusive or value < most)
    if not within:
        below = "" if inclusive else "less than "
        raise ValueError(
            f"{option}={value!r}: must be a number from {least:g} to {below}{most:g}"
        )


def check_choice(option: str, value: str, allowed: Sequence[str]) -> None:
    """Check that a value is one of the allowed names."""
    if value not in allowed:
        raise ValueError(f"{option}={value!r}: must be one of {', '.join(allowed)}")
