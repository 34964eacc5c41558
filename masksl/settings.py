"""Settings: one flat dictionary with dotted keys, as Flower's run config carries.

Values are str, int, float or bool; null and lists are YAML text. ``section`` gives the
values under one key back as they were.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any, Self

import yaml

Value = str | int | float | bool
Settings = dict[str, Value]


@dataclass(frozen=True)
class RunConfig:
    """The settings that stand outside every group; each field is a key.

    Parameters
    ----------
    rounds, evaluations, clients, batch_size, eval_batch_size, seed : int
        See ``conf/base.yaml``; ``batch_size`` is that of one client.
    fraction : float
        Share of the clients that take part in a round.
    cut : int | str
        Units that the client keeps, or the name of a cut.
    client_sync : str
        ``step``, ``round`` or ``never``.
    gradient_positions : str
        ``all``, or ``kept``: of a gradient only what the activation's frame kept.
    device, client_device : str
        Where the server half and the client halves are.
    """

    rounds: int
    evaluations: int
    clients: int
    fraction: float
    batch_size: int
    eval_batch_size: int
    seed: int
    cut: int | str
    client_sync: str
    gradient_positions: str
    device: str
    client_device: str

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """Return the fields of checked settings."""
        return cls(**{field.name: settings[field.name] for field in fields(cls)})


def checkpoint_due(settings: Mapping[str, Any], round_: int) -> bool:
    """Tell whether a checkpoint is written after a round."""
    every = int(settings["checkpoint.every"])
    return bool(every) and (round_ % every == 0 or round_ == int(settings["rounds"]))


def import_plugins(settings: Mapping[str, Value]) -> None:
    """Import the modules that ``plugins`` names; they register what they bring.

    Every process of a run does so before it looks anything up by its name.

    Raises
    ------
    ImportError
        If there is no such module.
    """
    for module in parse(settings.get("plugins", "[]")):
        import_module(module)


def flatten(nested: Mapping[str, Any], prefix: str = "") -> Settings:
    """Return a nested mapping as settings.

    >>> flatten({"rounds": 3, "dataset": {"limit": None, "name": "digits"}})
    {'rounds': 3, 'dataset.limit': 'null', 'dataset.name': 'digits'}
    """
    flat: Settings = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif value is None or isinstance(value, (list, tuple)):
            listed = None if value is None else list(value)
            text = yaml.safe_dump(listed, default_flow_style=True)
            flat[prefix + key] = text.removesuffix("\n").removesuffix("\n...")
        else:
            flat[prefix + key] = value
    return flat


def section(settings: Mapping[str, Value], prefix: str) -> dict[str, Any]:
    """Return the values under ``prefix.``, lists as tuples, null as None.

    >>> section({"dataset.limit": "null", "schedule.milestones": "[6, 9]"}, "schedule")
    {'milestones': (6, 9)}
    """
    start = prefix + "."
    return {
        key.removeprefix(start): parse(value)
        for key, value in settings.items()
        if key.startswith(start)
    }


def parse(value: Value) -> Any:
    """Return a value with YAML text of null and lists read; other text stays text."""
    if isinstance(value, str) and (value == "null" or value.startswith("[")):
        read = yaml.safe_load(value)
        return tuple(read) if isinstance(read, list) else read
    return value
