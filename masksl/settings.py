"""Settings: one flat dictionary with dotted keys, as Flower's records carry it.

Values are str, int, float or bool; null and lists are YAML text. A section is a strict
pydantic model: each field declares the type and range of one key once, and the
``description`` of the field says in words what is allowed. `read` makes a section of
settings; the type of a field decides whether text is read as YAML.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from importlib import import_module
from types import UnionType
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError

Value = str | int | float | bool
Settings = dict[str, Value]
Model = TypeVar("Model", bound=BaseModel)


SLOTS = ("compressor", "gradient_compressor", "model_compressor")
"""Groups of the compressors of what goes up, of what comes down, and of models."""

EARLIER: Settings = {
    "method.name": "split",
    "model.stem_stride": 1,
    "traffic": "null",
}
"""What holds for runs from the time before these keys."""


class ConfigError(ValueError):
    """A configuration that cannot be run; one line says what is wrong."""

    @classmethod
    def of(cls, key: str, value: Any, allowed: str) -> "ConfigError":
        """Return the error of a key, its value, and the values that are allowed."""
        return cls(f"{key}={shown(value)}: must be {allowed}")


class Section(BaseModel, frozen=True, strict=True, extra="forbid", allow_inf_nan=False):
    """Base of the sections of a configuration.

    Attributes
    ----------
    top_level : tuple[str, ...]
        Fields whose keys stand without the prefix of their section.
    unused_slots : tuple[str, ...]
        Of a method: slots of compressors that must be ``none``, because it sends
        nothing through them.
    fixed : Mapping[str, tuple[str | int | float | bool, str]]
        Of a method: keys outside of its section, the one value that each must have, and
        why.
    """

    top_level: ClassVar[tuple[str, ...]] = ()
    unused_slots: ClassVar[tuple[str, ...]] = ()
    fixed: ClassVar[Mapping[str, tuple[Value, str]]] = {}

    @property
    def depends_on_rounds(self) -> bool:
        """Whether a round depends on the number of all rounds."""
        return False


_DEVICE = r"^(auto|cpu|cuda(:(0|[1-9][0-9]{0,2}))?)$"
_DEVICES = "auto, cpu, cuda or cuda:N"
_FRACTION = "a number greater than 0 and at most 1"


class RunConfig(Section):
    """The keys outside every group, whatever the method.

    Parameters
    ----------
    rounds : int
        Rounds of the run.
    evaluations : int
        Evaluations in a round, evenly spaced; the last one at its end.
    target : float | None
        Top-1 accuracy, a fraction, up to which tables count the traffic.
    clients, min_clients : int
        Number of clients. Least number that must not have failed in a round.
    fraction : float
        Share of the clients that take part in a round.
    batch_size, eval_batch_size : int
        Samples of one client in a training step, in an evaluation step.
    seed : int
        Seed of everything random.
    device, client_device : str
        Devices of the server's and of the clients' tensors.
    plugins : tuple[str, ...]
        Modules that every process imports first.
    resume : str | None
        Run folder to continue; ``auto``: the run's own.
    """

    rounds: int = Field(ge=1, description="a whole number from 1 on")
    evaluations: int = Field(
        1, ge=1, le=1_000_000, description="a whole number from 1 to 1000000"
    )
    target: float | None = Field(None, gt=0, le=1, description=f"null or {_FRACTION}")
    clients: int = Field(
        ge=1, le=1_000_000, description="a whole number from 1 to 1000000"
    )
    fraction: float = Field(1.0, gt=0, le=1, description=_FRACTION)
    min_clients: int = Field(1, ge=1, description="a whole number from 1 on")
    batch_size: int = Field(ge=1, description="a whole number from 1 on")
    eval_batch_size: int = Field(ge=1, description="a whole number from 1 on")
    seed: int = Field(ge=0, description="a whole number from 0 on")
    device: str = Field("cpu", pattern=_DEVICE, description=_DEVICES)
    client_device: str = Field("cpu", pattern=_DEVICE, description=_DEVICES)
    plugins: tuple[str, ...] = Field(
        (), description="a list of modules that can be imported"
    )
    resume: str | None = Field(
        None, min_length=1, description="null, auto or the path of a run folder"
    )

    @classmethod
    def of(cls, settings: Mapping[str, Value]) -> "RunConfig":
        """Return the section of checked settings."""
        return read(cls, settings)


MOST_THREADS = 256
"""The same on every machine; OpenMP ends the process where it gets no more of them."""

_THREADS = f"a whole number from 1 to {MOST_THREADS}"

PLUGINS = dict(RunConfig.model_fields)["plugins"]
"""The field of the one key that is read before all others."""


class ThreadsConfig(Section):
    """Threads of the CPU kernels; some gradients depend on their number.

    Parameters
    ----------
    client, server : int
        Threads of a client, of the server.
    """

    client: int = Field(1, ge=1, le=MOST_THREADS, description=_THREADS)
    server: int = Field(2, ge=1, le=MOST_THREADS, description=_THREADS)


class CheckpointConfig(Section):
    """When checkpoints are written.

    Parameters
    ----------
    every : int
        Rounds between two checkpoints, and one after the last round; 0 for none.
    """

    every: int = Field(1, ge=0, description="a whole number from 0 on")

    def due(self, round_: int, rounds: int) -> bool:
        """Return whether a checkpoint is written after a round."""
        return bool(self.every) and (round_ % self.every == 0 or round_ == rounds)


# --- what an error line says ----------------------------------------------------------


def shown(value: Any) -> str:
    """Return a value as it would be typed, text in quotes; long ones are shortened.

    >>> shown(None), shown(True), shown((0.9, None)), shown("x")
    ('null', 'true', '[0.9, null]', "'x'")
    """
    if value is None or value == "null":
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return shortened(f"[{', '.join(map(shown, value))}]")
    if isinstance(value, Mapping):
        pairs = (f"{key}: {shown(member)}" for key, member in value.items())
        return shortened(f"{{{', '.join(pairs)}}}")
    return shortened(repr(value))


def shortened(text: str, most: int = 100) -> str:
    """Return text with the middle left out if it has more characters than ``most``."""
    if len(text) <= most:
        return text
    return f"{text[: most - 30]}[{len(text)} characters]{text[-10:]}"


def among(word: str, known: Iterable[str]) -> str:
    """Say which words are known: near ones, else those of the same section.

    >>> among("optimizer.ebs", ["rounds", "optimizer.lr", "optimizer.eps"])
    'a known name, near ones: optimizer.eps'
    >>> among("optimizer.zeta", ["rounds", "optimizer.lr", "optimizer.eps"])
    'one of optimizer.lr, optimizer.eps'
    """
    every = list(dict.fromkeys(known))
    section, _, last = word.rpartition(".")
    same = {key.rpartition(".")[2]: key for key in every if _section(key) == section}
    near = [same[name] for name in get_close_matches(last, same)]
    if not section:
        near += [key for key in every if key.endswith(f".{word}")]
        same = same or dict(zip(every, every, strict=True))
    if not same:
        near = get_close_matches(word, every)
        same = {key: key for key in every if not _section(key)}
    if near:
        return f"a known name, near ones: {', '.join(near)}"
    return f"one of {', '.join(same.values())}"


def _section(key: str) -> str:
    return key.rpartition(".")[0]


# --- from settings to sections --------------------------------------------------------


def read(
    section: type[Model], settings: Mapping[str, Value], prefix: str = ""
) -> Model:
    """Read one section of settings.

    Parameters
    ----------
    section : type[BaseModel]
        The section, as described above.
    settings : Mapping[str, Value]
        All settings, flat.
    prefix : str
        Prefix of its keys, without the dot.

    Raises
    ------
    ConfigError
        On the first key that is missing or has a value that is not allowed.
    """
    values = {}
    for name, field in section.model_fields.items():
        key = key_of(section, name, prefix)
        if key not in settings:
            raise _missing(key, settings, str(field.description))
        values[name] = parse(settings[key], field.annotation)
    try:
        return section(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        allowed = str(section.model_fields[name].description)
        if first["type"] == "allowed":  # raised by a validator of ours
            allowed = first["msg"]
        key = key_of(section, name, prefix)
        raise ConfigError.of(key, values[name], allowed) from None


def _missing(key: str, settings: Mapping[str, Value], allowed: str) -> ConfigError:
    """Return the error of a key without a value, or with keys below it."""
    below = options(settings, key, {})
    if below:
        return ConfigError.of(key, below, allowed)
    return ConfigError(f"{key}: is missing, must be {allowed}")


def key_of(section: type[BaseModel], name: str, prefix: str) -> str:
    """Return the key of a field of a section."""
    if not prefix or name in getattr(section, "top_level", ()):
        return name
    return f"{prefix}.{name}"


def options(
    settings: Mapping[str, Value], prefix: str, types: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the values under ``prefix.`` by name, read by the types of their fields.

    >>> options({"ec.bits": "null", "ec.step": 2}, "ec", {"bits": float | None})
    {'bits': None, 'step': 2}
    """
    start = prefix + "."
    named = {
        key.removeprefix(start): value
        for key, value in settings.items()
        if key.startswith(start)
    }
    return {name: parse(value, types.get(name)) for name, value in named.items()}


def parse(value: Value, type_: Any) -> Any:
    """Return a value; null is None, and text is read as YAML if the type admits a list.

    >>> parse("null", int | None), parse("[6, 9]", tuple[int, ...]), parse("[6]", str)
    (None, (6, 9), '[6]')
    """
    if not isinstance(value, str):
        return value
    if value == "null":
        return None
    members = get_args(type_) if get_origin(type_) in (Union, UnionType) else (type_,)
    if any(get_origin(member) is tuple for member in members):
        try:
            loaded = yaml.safe_load(value)
        except yaml.YAMLError:
            return value
        return tuple(loaded) if isinstance(loaded, list) else value
    return value


def import_plugins(settings: Mapping[str, Value]) -> None:
    """Import the modules named by ``plugins``; they register what they add.

    Every process of a run does so before it looks up anything by name.

    Raises
    ------
    ImportError
        If there is no such module.
    """
    for module in parse(settings.get("plugins", "[]"), PLUGINS.annotation):
        import_module(module)


def flatten(nested: Mapping[str, Any], prefix: str = "") -> Settings:
    """Return a nested mapping as settings.

    >>> flatten({"rounds": 3, "dataset": {"limit": None, "name": "digits"}})
    {'rounds': 3, 'dataset.limit': 'null', 'dataset.name': 'digits'}
    """
    flat: Settings = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, Mapping):  # no section is empty: it is a wrong value
            flat[f"{prefix}{key}"] = "{}"
        elif value is None or isinstance(value, (list, tuple)):
            listed = None if value is None else list(value)
            text = yaml.safe_dump(listed, default_flow_style=True)
            flat[f"{prefix}{key}"] = text.removesuffix("\n").removesuffix("\n...")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
