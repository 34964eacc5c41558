"""Methods: how clients and server cooperate.

A plugin adds a method of its own to `METHODS`, as it adds compressors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from masksl.methods.fedavg import FedAvgConfig
from masksl.methods.fedpm import FedPmConfig
from masksl.methods.flash import FlashConfig
from masksl.methods.sasg import SasgConfig
from masksl.methods.split import SplitConfig
from masksl.settings import ConfigError, Section, Value, read


@dataclass(frozen=True)
class Method:
    """A registered method.

    Parameters
    ----------
    config : type[Section]
        Its section of the configuration, keys under ``method.``; the field ``name``
        is the method's name.
    server : str
        Its `masksl.methods.base.ServerMethod`, as ``module:class``.
    client : str
        Its `masksl.methods.client.ClientMethod`, as ``module:object``.
    """

    config: type[Section]
    server: str
    client: str

    @property
    def server_side(self) -> Any:
        """The class of the server side, imported when it is used."""
        return _named(self.server)

    @property
    def client_side(self) -> Any:
        """The object of the client side, imported when it is used."""
        return _named(self.client)


METHODS: dict[str, Method] = {
    "split": Method(
        SplitConfig,
        "masksl.methods.split.server:SplitServer",
        "masksl.methods.split.client:CLIENT",
    ),
    "fedavg": Method(
        FedAvgConfig,
        "masksl.methods.fedavg.server:FedAvgServer",
        "masksl.methods.fedavg.client:CLIENT",
    ),
    "fedpm": Method(
        FedPmConfig,
        "masksl.methods.fedpm.server:FedPmServer",
        "masksl.methods.fedpm.client:CLIENT",
    ),
    "flash": Method(
        FlashConfig,
        "masksl.methods.flash.server:FlashServer",
        "masksl.methods.flash.client:CLIENT",
    ),
    "sasg": Method(
        SasgConfig,
        "masksl.methods.sasg.server:SasgServer",
        "masksl.methods.sasg.client:CLIENT",
    ),
}
"""Every method by its name."""


def method_of(settings: Mapping[str, Value]) -> Method:
    """Return the method named by settings.

    Raises
    ------
    ConfigError
        If there is none of that name.
    """
    name = settings.get("method.name")
    if name not in METHODS:
        raise ConfigError.of("method.name", name, f"one of {', '.join(METHODS)}")
    return METHODS[str(name)]


def method_config(settings: Mapping[str, Value]) -> Section:
    """Return the section of the method named by settings; raises `ConfigError`."""
    return read(method_of(settings).config, settings, "method")


def _named(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)
