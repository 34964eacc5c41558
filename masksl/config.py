"""What a configuration may say: types, ranges, combinations.

`check` looks at the whole of it before any work; the first thing that is wrong ends in
one line that names the key, the value and what is allowed.
"""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from masksl import compress, dataset, model
from masksl.settings import Settings, Value, import_plugins, parse, section

COMPRESSOR_GROUPS = ("compressor", "gradient_compressor")
SYNCS = ("step", "round", "never")
SCHEDULES = ("constant", "cosine", "multistep", "step")
PRECISIONS = ("float32", "tf32", "bfloat16")
ENGINES = ("flower", "local", "ray")


class ConfigError(ValueError):
    """A configuration that cannot be run; one line says what is wrong."""

    @classmethod
    def of(cls, key: str, value: Any, allowed: str) -> "ConfigError":
        """Return the error of a key, its value, and what it must be."""
        return cls(f"{key}={value!r}: must be {allowed}")


@dataclass(frozen=True)
class Rule:
    """What one value must be."""

    allowed: str
    holds: Callable[[Any], bool]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _whole(least: int) -> Rule:
    return Rule(f"a whole number from {least} on", lambda v: _is_int(v) and v >= least)


def _optional(rule: Rule) -> Rule:
    return Rule(f"null or {rule.allowed}", lambda v: v is None or rule.holds(v))


def _choice(allowed: Sequence[str]) -> Rule:
    return Rule(f"one of {', '.join(allowed)}", lambda v: v in allowed)


def _milestones(value: Any) -> bool:
    if not isinstance(value, tuple):
        return False
    return all(map(_is_int, value)) and list(value) == sorted(set(value))


def _modules(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(name, str) for name in value)


_PIN = re.compile(r"\S+ (\d+)(?:-(\d+))?(?: [^\s=]+=\S+)*")


def _pins(value: Any) -> bool:
    if not isinstance(value, tuple):
        return False
    return all(isinstance(pin, str) and _PIN.fullmatch(pin) for pin in value)


_POSITIVE = Rule("a number greater than 0", lambda v: _is_number(v) and v > 0)
_RATE = Rule(
    "a number greater than 0 and at most 1e30",
    lambda v: _is_number(v) and 0 < v <= 1e30,
)
_NOT_NEGATIVE = Rule("a number from 0 on", lambda v: _is_number(v) and v >= 0)
_SHARE = Rule("a number from 0 to less than 1", lambda v: _is_number(v) and 0 <= v < 1)
_FRACTION = Rule(
    "a number greater than 0 and at most 1", lambda v: _is_number(v) and 0 < v <= 1
)
_BOOL = Rule("true or false", lambda v: isinstance(v, bool))
_TEXT = Rule("text", lambda v: isinstance(v, str))
_DEVICE = Rule("auto, cpu, cuda or cuda:N", lambda v: _device_type(v) is not None)

RULES: dict[str, Rule] = {
    "plugins": Rule("a list of modules that can be imported", _modules),
    "rounds": _whole(1),
    "evaluations": _whole(1),
    "target": _optional(_FRACTION),
    "clients": _whole(1),
    "min_clients": _whole(1),
    "checkpoint.every": _whole(0),
    "resume": _optional(_TEXT),
    "fraction": _FRACTION,
    "batch_size": _whole(1),
    "eval_batch_size": _whole(1),
    "seed": _whole(0),
    "client_sync": _choice(SYNCS),
    "gradient_positions": _choice(("all", "kept")),
    "device": _DEVICE,
    "client_device": _DEVICE,
    "threads.client": _whole(1),
    "threads.server": _whole(1),
    "compute.precision": _choice(PRECISIONS),
    "compute.channels_last": _BOOL,
    "compute.compile": _BOOL,
    "optimizer.lr": _RATE,
    "optimizer.momentum": _SHARE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.nesterov": _BOOL,
    "schedule.name": _choice(SCHEDULES),
    "schedule.milestones": Rule("a list of ascending whole numbers", _milestones),
    "schedule.gamma": _FRACTION,
    "schedule.every": _whole(1),
    "link.up_mbps": _POSITIVE,
    "link.down_mbps": _POSITIVE,
    "link.latency_ms": _NOT_NEGATIVE,
    "engine.name": _choice(ENGINES),
    "engine.cpus_per_client": _POSITIVE,
    "engine.gpus_per_client": _NOT_NEGATIVE,
    "engine.hosts": _whole(1),
    "engine.cpus_per_host": _NOT_NEGATIVE,
    "engine.gpus_per_host": _NOT_NEGATIVE,
    "engine.gpu_memory_fraction": _optional(_FRACTION),
    "engine.clients_in_flight": _optional(_whole(1)),
    "engine.address": _optional(_TEXT),
    "engine.pin": _optional(
        Rule("a list of entries RESOURCE FIRST-LAST [KEY=VALUE ...]", _pins)
    ),
    "engine.max_restarts": _whole(0),
    "model.name": _choice(list(model.ARCHITECTURES)),
    "dataset.name": _choice(list(dataset.DATASETS)),
    "dataset.root": _TEXT,
    "dataset.download": _BOOL,
    "dataset.limit": _optional(_whole(1)),
    "dataset.test_limit": _optional(_whole(1)),
    "dataset.partition": _choice(dataset.PARTITIONS),
    "dataset.alpha": _POSITIVE,
    "dataset.classes_per_client": _whole(1),
    "dataset.workers": _whole(1),
}
"""What each key must be; ``cut`` and the compressors have checks of their own."""


def check(settings: Mapping[str, Value]) -> None:
    """Check a whole configuration.

    Parameters
    ----------
    settings : Mapping[str, Value]
        All settings, flat.

    Raises
    ------
    ConfigError
        On the first key that is missing or has a value that is not allowed.
    """
    _check_plugins(settings)
    for key, rule in RULES.items():
        if key.startswith("engine.") and key not in settings:
            continue  # an engine has the options of its own file
        value = parse(settings[key]) if key in settings else None
        if key not in settings or not rule.holds(value):
            raise ConfigError.of(key, value, rule.allowed)
    for group in COMPRESSOR_GROUPS:
        _check_compressor(settings, group)
    _check_gradient_positions(settings)
    _check_model(settings)
    for key in ("device", "client_device"):
        _check_device(key, str(settings[key]))
    _check_compute(settings)
    _check_optimizer(settings)
    _check_participation(settings)
    _check_engine(settings)
    _check_samples(settings)
    options = tuple(f"{group}." for group in COMPRESSOR_GROUPS)
    for key, value in settings.items():
        if key not in RULES and key != "cut" and not key.startswith(options):
            raise ConfigError(f"{key}={value!r}: is no key of conf/base.yaml")


def from_run_config(run_config: Mapping[str, Value]) -> Settings:
    """Return settings from Flower's run config.

    A run config can set values but not take keys away: where it names another
    compressor than the default, the options that this one does not have are dropped.
    """
    settings = dict(run_config)
    for group in COMPRESSOR_GROUPS:
        name = settings.get(f"{group}.name")
        if name in compress.COMPRESSORS:
            known = {"name", *compress.options_of(str(name))}
            for option in section(settings, group):
                if option not in known:
                    del settings[f"{group}.{option}"]
    return settings


_FREE_ON_RESUME = (
    *("engine.", "checkpoint.", "resume", "min_clients", "target"),
    *("dataset.root", "dataset.download", "dataset.workers"),
)


def check_resume(
    settings: Mapping[str, Value], saved: Mapping[str, Value], done: int
) -> None:
    """Refuse to go on with a run under a configuration that would change it.

    Engines, places of data and checkpoints change nothing; nor do more rounds, unless
    the schedule of the learning rate depends on their number.

    Parameters
    ----------
    settings : Mapping[str, Value]
        Checked settings of the run that goes on.
    saved : Mapping[str, Value]
        Those of the run that it goes on from.
    done : int
        Rounds that this one completed.

    Raises
    ------
    ConfigError
        Naming every key that differs.
    """
    free: tuple[str, ...] = _FREE_ON_RESUME
    if settings["schedule.name"] != "cosine" and int(settings["rounds"]) >= done:
        free = (*free, "rounds")
    differing = [
        f"{key} ({saved.get(key, 'not given')!r} there, "
        f"{settings.get(key, 'not given')!r} here)"
        for key in sorted(settings.keys() | saved.keys())
        if settings.get(key) != saved.get(key) and not key.startswith(free)
    ]
    if differing:
        allowed = f"a run of the same configuration, which differs in {differing[0]}"
        allowed = ", ".join([allowed, *differing[1:]])
        raise ConfigError.of("resume", settings["resume"], allowed)


def _check_plugins(settings: Mapping[str, Value]) -> None:
    value, rule = parse(settings.get("plugins", "[]")), RULES["plugins"]
    if not rule.holds(value):
        raise ConfigError.of("plugins", value, rule.allowed)
    try:
        import_plugins(settings)
    except ImportError as error:
        allowed = f"{rule.allowed} ({error})"
        raise ConfigError.of("plugins", list(value), allowed) from error


def _check_compressor(settings: Mapping[str, Value], group: str) -> None:
    options = section(settings, group)
    name = options.pop("name", None)
    if name not in compress.COMPRESSORS:
        raise ConfigError.of(
            f"{group}.name", name, f"one of {', '.join(compress.COMPRESSORS)}"
        )
    try:
        compress.make(name, **options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{group}.{error}") from error


def _check_gradient_positions(settings: Mapping[str, Value]) -> None:
    """Refuse ``kept`` where no positions are, or what is kept has no samples."""
    if settings["gradient_positions"] == "all":
        return
    if not compress.has_positions(str(settings["compressor.name"])):
        named = ", ".join(filter(compress.has_positions, compress.COMPRESSORS))
        allowed = f"all with compressor={settings['compressor.name']}, kept takes "
        raise ConfigError.of("gradient_positions", "kept", allowed + named)
    if settings.get("gradient_compressor.scope") == "sample":
        allowed = "tensor with gradient_positions=kept"
        raise ConfigError.of("gradient_compressor.scope", "sample", allowed)


def _check_model(settings: Mapping[str, Value]) -> None:
    name = str(settings["model.name"])
    architecture = model.ARCHITECTURES[name]
    spec = dataset.DATASETS[str(settings["dataset.name"])]
    if architecture.image_sizes and spec.size not in architecture.image_sizes:
        sizes = ", ".join(f"{size}x{size}" for size in architecture.image_sizes)
        allowed = f"a network for {spec.size}x{spec.size} images, {name} takes {sizes}"
        raise ConfigError.of("model.name", name, allowed)
    if spec.channels not in architecture.channels:
        allowed = f"a network for images of {spec.channels} channel(s)"
        raise ConfigError.of("model.name", name, allowed)
    try:
        model.resolve_cut(name, settings.get("cut"))  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_compute(settings: Mapping[str, Value]) -> None:
    """Refuse what PyTorch's compiler cannot do."""
    if settings["compute.compile"] and settings["compute.precision"] == "tf32":
        raise ConfigError.of("compute.compile", True, "false with precision tf32")


def _check_optimizer(settings: Mapping[str, Value]) -> None:
    if settings["optimizer.nesterov"] and not settings["optimizer.momentum"]:
        raise ConfigError.of("optimizer.nesterov", True, "false without momentum")


def _check_participation(settings: Mapping[str, Value]) -> None:
    """Refuse a least number of clients that no round could have."""
    fraction, clients = float(settings["fraction"]), int(settings["clients"])
    most = max(1, round(fraction * clients))
    if int(settings["min_clients"]) > most:
        allowed = f"at most {most}, the clients of a round"
        raise ConfigError.of("min_clients", settings["min_clients"], allowed)


_ENGINE_KEYS = {
    "local": (),
    "flower": ("cpus_per_client", "gpus_per_client"),
    "ray": (
        *("hosts", "cpus_per_host", "gpus_per_host", "gpu_memory_fraction"),
        *("clients_in_flight", "address", "pin", "max_restarts"),
    ),
}


def _check_engine(settings: Mapping[str, Value]) -> None:
    """Refuse what an engine could never place."""
    name = str(settings["engine.name"])
    for key in (f"engine.{option}" for option in _ENGINE_KEYS[name]):
        if key not in settings:
            raise ConfigError.of(key, None, RULES[key].allowed)
    if name == "flower":
        _check_here(settings, "client", 1)
    elif name == "ray":
        if parse(settings["engine.pin"]):
            _check_pins(settings)
        if parse(settings["engine.address"]) is None:
            _check_here(settings, "host", int(settings["engine.hosts"]))


def _check_here(settings: Mapping[str, Value], each: str, number: int) -> None:
    """Refuse more than this machine has for a process of the engine."""
    key = f"engine.cpus_per_{each}"
    cpus, here = float(settings[key]), os.cpu_count() or 1
    if cpus > here:
        raise ConfigError.of(key, cpus, f"at most {here}, the CPUs that are here")
    key = f"engine.gpus_per_{each}"
    gpus = float(settings[key])
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if number * gpus > count:
        shared = f" for {number} {each}s" if number > 1 else ""
        allowed = f"at most {count / number:g}{shared}: {count} CUDA devices are here"
        raise ConfigError.of(key, gpus, allowed)
    if _device_type(settings["client_device"]) == "cuda" and not gpus:
        allowed = "greater than 0 with client_device=cuda: Ray hides GPUs otherwise"
        raise ConfigError.of(key, gpus, allowed)


def _check_pins(settings: Mapping[str, Value]) -> None:
    """Refuse pins that leave a partition out or name one twice."""
    pinned: list[int] = []
    for pin in parse(settings["engine.pin"]):
        match = _PIN.fullmatch(pin)
        assert match is not None
        first, last = int(match[1]), int(match[2] or match[1])
        pinned += range(first, last + 1)
    if sorted(pinned) != list(range(int(settings["clients"]))):
        last = int(settings["clients"]) - 1
        allowed = f"entries that name each partition from 0 to {last} once"
        raise ConfigError.of("engine.pin", list(parse(settings["engine.pin"])), allowed)


def warnings(settings: Mapping[str, Value]) -> list[str]:
    """Return what of a checked configuration is allowed but hardly meant, in lines."""
    found = []
    if settings["engine.name"] == "ray" and parse(settings["engine.address"]) is None:
        hosts, threads = int(settings["engine.hosts"]), int(settings["threads.client"])
        here = os.cpu_count() or 1
        if hosts * threads > here:
            found.append(
                f"engine.hosts={hosts} times threads.client={threads} is "
                f"{hosts * threads} threads on {here} cores"
            )
    return found


def _check_samples(settings: Mapping[str, Value]) -> None:
    """Refuse more clients than samples, as far as the number of samples is fixed."""
    spec = dataset.DATASETS[str(settings["dataset.name"])]
    limit = parse(settings["dataset.limit"])
    known = [n for n in (limit, spec.samples and spec.samples[0]) if n is not None]
    if known and int(settings["clients"]) > min(known):
        allowed = f"at most {min(known)}, the training samples"
        raise ConfigError.of("clients", settings["clients"], allowed)


def _device_type(name: Any) -> str | None:
    if name in ("auto", "cpu", "cuda"):
        return str(name)
    numbered = isinstance(name, str) and re.fullmatch(r"cuda:\d+", name)
    return "cuda" if numbered else None


def _check_device(key: str, name: str) -> None:
    if _device_type(name) != "cuda":
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (torch.device(name).index or 0) >= count:
        raise ConfigError.of(key, name, f"auto or cpu: {count} CUDA devices are here")
