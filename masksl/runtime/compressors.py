"""Compressors by the slots of a configuration."""

from collections.abc import Mapping
from typing import get_type_hints

from masksl import compress
from masksl.compress import Compressor
from masksl.settings import ConfigError, Value, options


def compressor_of(settings: Mapping[str, Value], slot: str) -> Compressor:
    """Make the compressor of a slot.

    Parameters
    ----------
    settings : Mapping[str, Value]
        All settings, flat.
    slot : str
        ``compressor``, ``gradient_compressor``, ...

    Raises
    ------
    ConfigError
        If its name is unknown, or an option is unknown or not allowed.
    """
    name = settings.get(f"{slot}.name")
    if name not in compress.COMPRESSORS:
        allowed = f"one of {', '.join(compress.COMPRESSORS)}"
        raise ConfigError.of(f"{slot}.name", name, allowed)
    types = get_type_hints(compress.COMPRESSORS[str(name)])
    given = options(settings, slot, types)
    del given["name"]
    try:
        return compress.make(str(name), **given)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{slot}.{error}") from error
