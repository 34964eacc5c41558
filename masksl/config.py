"""The checks of a whole configuration.

`check` looks at all of it before any work. The first error ends in one line that names
the key, the value and what is allowed.
"""

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from traceback import extract_tb, format_exception_only
from typing import Any

import torch
from pydantic import BaseModel

from masksl import compress, dataset, model
from masksl.compress import Compressor
from masksl.dataset import DatasetConfig
from masksl.engine.options import ENGINES, Processes, RayOptions
from masksl.methods import method_config, method_of
from masksl.model import ModelConfig
from masksl.runtime.compressors import EXACT, compressor_of, default_options
from masksl.runtime.ledger import Link
from masksl.runtime.tracking import tracker_of
from masksl.settings import (
    EARLIER,
    PLUGINS,
    SLOTS,
    CheckpointConfig,
    ConfigError,
    RunConfig,
    Settings,
    ThreadsConfig,
    Value,
    among,
    flatten,
    import_plugins,
    key_of,
    parse,
    read,
    shortened,
)
from masksl.training.compute import ComputeConfig
from masksl.training.optimizer import OptimizerConfig
from masksl.training.schedule import ScheduleConfig

CONF = Path(__file__).resolve().parents[1] / "conf"
MOST = 2**63 - 1  # of whole numbers in Flower's records

SECTIONS: dict[str, type[BaseModel]] = {
    "": RunConfig,
    "checkpoint": CheckpointConfig,
    "threads": ThreadsConfig,
    "compute": ComputeConfig,
    "optimizer": OptimizerConfig,
    "schedule": ScheduleConfig,
    "link": Link,
    "dataset": DatasetConfig,
    "model": ModelConfig,
}
"""The sections of every run by prefix.

Engine, method, tracker and compressors have others.
"""


def compose(overrides: Sequence[str]) -> Settings:
    """Compose ``conf/`` with overrides, as the command line does.

    Parameters
    ----------
    overrides : Sequence[str]
        What would be typed after ``python -m masksl.main``.

    Returns
    -------
    Settings
        Checked, flat.

    Raises
    ------
    ConfigError
        If an override is unknown or a value is not allowed; the text is one line.
    """
    # Imported here: Hydra is needed by those who compose alone.
    # pylint: disable=import-outside-toplevel
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from masksl import cli

    try:
        with initialize_config_dir(str(CONF), version_base=None):
            composed = hydra_compose("base", overrides=list(overrides))
        nested: Any = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException, OSError, ValueError) as error:
        raise ConfigError(cli.explain(error, overrides, CONF)) from error
    settings = flatten(nested)
    check(settings)
    return settings


def split_overrides(run_config: Mapping[str, Any]) -> list[str]:
    """Return the overrides of Flower's run config, quoted as in a shell.

    >>> split_overrides({"overrides": "rounds=3 'dataset.root=/my data'"})
    ['rounds=3', 'dataset.root=/my data']

    Raises
    ------
    ConfigError
        If there is another key, or quotes do not match.
    """
    for key, value in run_config.items():
        if key != "overrides":
            raise ConfigError(f"{key}={value!r}: the run config has the key overrides")
    text = run_config.get("overrides", "")
    try:
        return shlex.split(text)
    except (ValueError, AttributeError) as error:
        allowed = f"overrides of conf/, quoted as in a shell ({error})"
        raise ConfigError.of("overrides", text, allowed) from error


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
    _check_integers(settings)
    sections = {p: read(section, settings, p) for p, section in SECTIONS.items()}
    run, data = sections[""], sections["dataset"]
    assert isinstance(run, RunConfig) and isinstance(data, DatasetConfig)
    read(tracker_of(settings).config, settings, "tracking")
    compressors = {slot: compressor_of(settings, slot) for slot in SLOTS}
    _check_model(settings)
    method = method_config(settings)
    if "traffic" in settings and not hasattr(method, "traffic"):
        name = settings["method.name"]
        allowed = f"left out with method={name}, which has other payloads than split"
        raise ConfigError.of("traffic", settings["traffic"], allowed)
    for slot in method.unused_slots:
        _check_unused(settings, slot, compressors[slot])
    for key, (value, reason) in method.fixed.items():
        if settings[key] != value:
            allowed = f"{value} with method={settings['method.name']}, where {reason}"
            raise ConfigError.of(key, settings[key], allowed)
    _check_gradient_positions(settings)
    if settings["method.name"] == "split":
        _check_halves(compressors["model_compressor"])
    for key in ("device", "client_device"):
        _check_device(key, str(settings[key]))
    _check_participation(run)
    _check_engine(settings, run)
    _check_samples(run, data)
    _check_keys(settings)


def known_keys(settings: Mapping[str, Value]) -> Iterator[str]:
    """Yield the keys of all sections of a configuration, compressors left out."""
    own: dict[str, type[BaseModel]] = {
        "engine": ENGINES[_engine_name(settings)],
        "method": method_of(settings).config,
        "tracking": tracker_of(settings).config,
    }
    for prefix, section in (SECTIONS | own).items():
        for name in section.model_fields:
            yield key_of(section, name, prefix)


def check_resume(
    settings: Mapping[str, Value], saved: Mapping[str, Value], done: int
) -> None:
    """Refuse to resume a run under a configuration that would change it.

    Engines, paths of data, checkpoints and trackers change nothing. Nor do more rounds,
    unless the method or the schedule of the learning rate depends on their number.

    Parameters
    ----------
    settings : Mapping[str, Value]
        Checked settings of the resuming run.
    saved : Mapping[str, Value]
        Settings of the run to resume.
    done : int
        Its completed rounds.

    Raises
    ------
    ConfigError
        Naming every key that differs.
    """
    free: tuple[str, ...] = _FREE_ON_RESUME
    for slot in SLOTS:  # options that came later, or that were left out
        saved = default_options(saved, slot) | dict(saved)
        settings = default_options(settings, slot) | dict(settings)
    earlier = {key: value for key, value in EARLIER.items() if key in settings}
    saved = earlier | dict(saved)
    schedule = read(ScheduleConfig, settings, "schedule")
    depends = schedule.depends_on_rounds or method_config(settings).depends_on_rounds
    if not depends and int(settings["rounds"]) >= done:
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


_FREE_ON_RESUME = (
    "traffic",  # the compressors that it sets are compared
    *("engine.", "checkpoint.", "resume", "min_clients", "target"),
    *("dataset.root", "dataset.download", "dataset.workers", "dataset.unreadable"),
    "tracking.",
)


def warnings(settings: Mapping[str, Value]) -> list[str]:
    """Return warnings for valid but probably unintended settings."""
    lines = []
    if settings["engine.name"] == "ray" and settings["engine.address"] == "null":
        hosts, threads = int(settings["engine.hosts"]), int(settings["threads.client"])
        cores = os.cpu_count() or 1
        if hosts * threads > cores:
            lines.append(
                f"engine.hosts={hosts} times threads.client={threads} is "
                f"{hosts * threads} threads on {cores} cores"
            )
    if settings.get("client_sync") == "round":
        halves = compressor_of(settings, "model_compressor")
        if halves == compress.make("ec"):
            lines.append(
                "client_sync=round: halves travel once a round; with "
                "model_compressor.error=0.05 they take few bytes more and lose less"
            )
    return lines


# --- parts of the check ---------------------------------------------------------------


def _check_plugins(settings: Mapping[str, Value]) -> None:
    """Import the plugins first: they register names that the other checks look up."""
    field = PLUGINS
    plugins = parse(settings.get("plugins", "[]"), field.annotation)
    names = isinstance(plugins, tuple) and all(isinstance(n, str) for n in plugins)
    if not names:
        raise ConfigError.of("plugins", plugins, str(field.description))
    try:
        import_plugins(settings)
    except (Exception, SystemExit) as error:  # a plugin may raise anything
        allowed = f"{field.description} ({_reason(error)})"
        raise ConfigError.of("plugins", list(plugins), allowed) from error


def _reason(error: BaseException) -> str:
    """Return in one line what a plugin raised, and where if that is in a file."""
    text = "".join(format_exception_only(error)).splitlines()[-1].strip()
    place = extract_tb(error.__traceback__)[-1]
    where = f"{place.filename}, line {place.lineno}: "
    return shortened(text if "importlib" in place.filename else where + text, 300)


def _check_integers(settings: Mapping[str, Value]) -> None:
    """Refuse whole numbers that Flower's records cannot carry."""
    for key, value in settings.items():
        if isinstance(value, int) and not -MOST - 1 <= value <= MOST:
            raise ConfigError.of(key, value, f"at most {MOST} and at least {-MOST - 1}")


def _check_model(settings: Mapping[str, Value]) -> None:
    """Refuse a network that does not take the images, or a cut outside of it."""
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
    if "cut" in settings:
        try:
            model.resolve_cut(name, settings["cut"])  # type: ignore[arg-type]
        except ValueError as error:
            allowed = str(error).partition(": must be ")[2]
            raise ConfigError.of("cut", settings["cut"], allowed) from error


def _check_unused(
    settings: Mapping[str, Value], slot: str, compressor: Compressor
) -> None:
    """Refuse a compressor that nothing would go through."""
    if compressor != EXACT:
        same = compressor.name == EXACT.name
        key, allowed = ("values", "float32") if same else ("name", EXACT.name)
        key, method = f"{slot}.{key}", settings["method.name"]
        raise ConfigError.of(key, settings[key], f"{allowed} with method={method}")


def _check_gradient_positions(settings: Mapping[str, Value]) -> None:
    """Refuse ``kept`` if frames have no positions, or if samples are selected apart."""
    if settings.get("gradient_positions", "all") == "all":
        return
    if not compress.has_positions(str(settings["compressor.name"])):
        named = ", ".join(filter(compress.has_positions, compress.COMPRESSORS))
        allowed = f"all with compressor={settings['compressor.name']}, kept takes "
        raise ConfigError.of("gradient_positions", "kept", allowed + named)
    if settings.get("gradient_compressor.scope") == "sample":
        allowed = "tensor with gradient_positions=kept"
        raise ConfigError.of("gradient_compressor.scope", "sample", allowed)


def _check_halves(compressor: Compressor) -> None:
    """Refuse compressors of halves whose errors grow: these are added to the next.

    One change's error is larger than the change itself; that of ``qu`` is if a few
    elements are much larger than the rest. A ``sign`` that stands for 1 moves what does
    not change.
    """
    refused = {
        "qsgd": ("name", ("qsgd",), "another one than qsgd"),
        "ec": ("rounding", ("stochastic",), "nearest"),
        "qu": ("bits", (1, 2, 3), "at least 4"),
        "sign": ("magnitude", ("none",), "mean"),
    }
    option, values, allowed = refused.get(compressor.name, ("name", (), ""))
    value = getattr(compressor, option)
    if value in values:
        why = "where what a change loses is added to the next one"
        key = f"model_compressor.{option}"
        raise ConfigError.of(key, value, f"{allowed} with method=split, {why}")


def _check_participation(run: RunConfig) -> None:
    """Refuse a least number of clients that no round could have."""
    most = max(1, round(run.fraction * run.clients))
    if run.min_clients > most:
        allowed = f"at most {most}, the clients of a round"
        raise ConfigError.of("min_clients", run.min_clients, allowed)


def _check_samples(run: RunConfig, data: DatasetConfig) -> None:
    """Refuse more clients than samples, as far as the number of samples is fixed."""
    spec = dataset.DATASETS[data.name]
    known = [data.limit, spec.samples and spec.samples[0]]
    least = min((n for n in known if n is not None), default=run.clients)
    if run.clients > least:
        allowed = f"at most {least}, the training samples"
        raise ConfigError.of("clients", run.clients, allowed)


def _check_keys(settings: Mapping[str, Value]) -> None:
    """Refuse keys that no section has."""
    known = dict.fromkeys(known_keys(settings))
    options = tuple(f"{slot}." for slot in SLOTS)
    for key, value in settings.items():
        if key not in known and not key.startswith(options):
            raise ConfigError.of(key, value, among(key, known))


# --- engines and devices --------------------------------------------------------------


def _check_engine(settings: Mapping[str, Value], run: RunConfig) -> None:
    """Refuse processes that an engine could never place."""
    options = read(ENGINES[_engine_name(settings)], settings, "engine")
    if isinstance(options, RayOptions):
        try:
            options.check_pins(run.clients)
        except ValueError as error:
            pins = list(options.pin or ())
            raise ConfigError.of("engine.pin", pins, str(error)) from error
    if processes := options.processes():
        _check_processes(processes, run)


def _engine_name(settings: Mapping[str, Value]) -> str:
    name = settings.get("engine.name")
    if name not in ENGINES:
        raise ConfigError.of("engine.name", name, f"one of {', '.join(ENGINES)}")
    return str(name)


def _check_processes(processes: Processes, run: RunConfig) -> None:
    """Refuse more than this machine has for the processes of an engine."""
    kind, number, cpus, gpus = processes
    available = os.cpu_count() or 1
    if cpus > available:
        allowed = f"at most {available}, the CPUs that are here"
        raise ConfigError.of(f"engine.cpus_per_{kind}", cpus, allowed)
    key = f"engine.gpus_per_{kind}"
    count = _cuda_devices()
    if number * gpus > count:
        shared = f" for {number} {kind}s" if number > 1 else ""
        allowed = f"at most {count / number:g}{shared}: {count} CUDA devices are here"
        raise ConfigError.of(key, gpus, allowed)
    if run.client_device.startswith("cuda") and not gpus:
        allowed = "greater than 0 with client_device=cuda: Ray hides GPUs otherwise"
        raise ConfigError.of(key, gpus, allowed)


def _check_device(key: str, name: str) -> None:
    """Refuse a CUDA device that is not here."""
    if name.startswith("cuda"):
        count = _cuda_devices()
        if int(name.partition(":")[2] or 0) >= count:  # torch.device has 8 bits
            allowed = f"auto or cpu: {count} CUDA devices are here"
            raise ConfigError.of(key, name, allowed)


def _cuda_devices() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
