"""Compressors by the slots of a configuration."""

from collections.abc import Mapping
from typing import get_type_hints

import torch

from masksl import compress
from masksl.compress import Compressor
from masksl.settings import SLOTS, ConfigError, Settings, Value, flatten, options

EXACT = compress.make("none")
"""The compressor that loses nothing."""


def default_options(settings: Mapping[str, Value], slot: str) -> Settings:
    """Return the defaults of the options of a slot's compressor, as settings.

    There are none for a compressor that is not registered.
    """
    name = str(settings.get(f"{slot}.name"))
    if name not in compress.COMPRESSORS:
        return {}
    made = compress.make(name)
    given = {option: getattr(made, option) for option in compress.options_of(name)}
    return flatten({slot: given})


def compressor_of(
    settings: Mapping[str, Value], slot: str, dtype: torch.dtype = torch.float32
) -> Compressor:
    """Make the compressor of a slot.

    Parameters
    ----------
    settings : Mapping[str, Value]
        All settings, flat.
    slot : str
        ``compressor``, ``gradient_compressor``, ...
    dtype : torch.dtype
        Type of the tensors that go through it.

    Raises
    ------
    ConfigError
        If its name is unknown, it does not encode tensors of the type, or an option is
        unknown or not allowed.
    """
    name = settings.get(f"{slot}.name")
    able = [key for key, cls in compress.COMPRESSORS.items() if dtype in cls.dtypes]
    if name not in able:
        raise ConfigError.of(f"{slot}.name", name, f"one of {', '.join(able)}")
    types = get_type_hints(compress.COMPRESSORS[str(name)])
    given = options(settings, slot, types)
    del given["name"]
    try:
        return compress.make(str(name), **given)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{slot}.{error}") from error


def warm_up(settings: Mapping[str, Value]) -> None:
    """Compile or load what the compressors of all slots need, before the first round.

    Parameters
    ----------
    settings : Mapping[str, Value]
        All settings, flat, checked.
    """
    for slot in SLOTS:
        compressor_of(settings, slot).warm_up()
