"""The command line: Hydra around a task, and what it refuses, in one line.

Hydra explains its errors in many lines, and often advises against this configuration:
``+key=value``, say, adds a key that nothing reads.
"""

import argparse
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.main import get_args_parser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from masksl import signals
from masksl.settings import ConfigError, among, shortened, shown

_GRAMMAR = "KEY=VALUE, +KEY=VALUE or ~KEY, with quotes around special characters"
_EXPLAINED = {
    r"Ambiguous value for argument '(.*)' 1\.": (
        "one value; a list has brackets, text has quotes, and --multirun makes a run "
        "of each value"
    ),
    r"Sweep parameters '(.*)' requires": "given with --multirun",
    r"Could not append .* Either remove \+ prefix: '(.*?)' Or": (
        "given without the +: the key exists"
    ),
    r"Multiple values for (\S+)\.": "given without the +: an option is chosen already",
    r"force-add of .* not supported: '(.*)'": "given without the ++",
    r"Could not delete .*value of '(.*)' is (.*) and not (.*)\.": (
        r"deleted as ~\1=\2, not as ~\1=\3"
    ),
    r"Error merging override (.*?): ([^:]*)$": r"a value of another type (\2)",
}
"""What is allowed, by the text of an error of Hydra whose first group is the input."""

_HYDRAS = re.compile(r"\s*(See https?://\S+ for \w+|To append to your .*)")

logger = logging.getLogger(__name__)


def start(task: Callable[[], Any], conf: Path) -> None:
    """Run a task that is decorated by Hydra; what Hydra refuses ends it in one line.

    Parameters
    ----------
    task : Callable[[], Any]
        Function under ``hydra.main``. It ends the program on its own errors.
    conf : Path
        Folder of the configuration.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors, and prints none
    try:
        arguments = _arguments(sys.argv[1:])
        if arguments.config_path is None and not conf.is_dir():
            allowed = (
                "a folder, and the package has none when it is installed: run in a "
                "checkout of the repository, or name its conf/ with --config-path"
            )
            raise ConfigError.of("conf", str(conf), allowed)
    except ConfigError as error:
        refuse(error)
    # A folder that it does not find is worth no more than a warning to Hydra.
    warnings.filterwarnings("error", message=".*path=.* is not available")
    try:
        task()
    except Exception as error:  # pylint: disable=broad-exception-caught
        # Hydra raised it, whatever it is: the task ends the program on its own errors.
        if _is_of_folder(error):
            refuse(_unwritable(error, arguments))
        refuse(explain(error, arguments.overrides, conf))


@contextmanager
def in_one_line(*errors: type[Exception]) -> Iterator[None]:
    """End the program with one line on these errors and on failing files.

    Any other exception is a fault of the program, and is shown with its traceback.
    """
    expected: tuple[type[Exception], ...] = (*errors, OSError)
    try:
        yield
    except expected as error:
        refuse(error)
    except Exception:  # pylint: disable=broad-exception-caught
        if signals.came():
            sys.exit(1)
        # Hydra would shorten the traceback, and end in a line about itself.
        traceback.print_exc()
        sys.exit(1)


# pylint: disable-next=too-many-return-statements
def explain(error: Exception, overrides: Sequence[str], conf: Path) -> str:
    """Return in one line why Hydra refuses overrides.

    Parameters
    ----------
    error : Exception
        What Hydra raised.
    overrides : Sequence[str]
        Overrides as they were typed.
    conf : Path
        Folder of the configuration, from which near keys are taken.
    """
    text = _one_line(error)
    parsed = _parsed(overrides)
    if isinstance(error, OverrideParseException):
        return f"{shown(error.override)}: must be {_GRAMMAR}"
    if isinstance(error, MissingConfigException):
        return _explain_missing(error, parsed, text)
    if isinstance(error, OmegaConfBaseException):
        reason = f"that can be resolved ({text.partition(' full_key:')[0]})"
        return f"{error.full_key}: must be a value {reason}"
    if "group override must be" in text or "File name too long" in text:
        return _explain_group(parsed, conf, text)
    for pattern, explained in _EXPLAINED.items():
        if (match := re.match(pattern, text)) is not None:
            return f"{shortened(match[1])}: must be {match.expand(explained)}"
    named = re.search(r"Could not (override|delete)[^']*'([^']+)'", text)
    if named is not None:
        key = named[2]
        typed = [_typed(o) for o in parsed if o.key_or_group == key] or [key]
        allowed = among(key, _known(parsed, key, conf))
        return f"{shortened(typed[-1])}: must be {allowed}"
    hydras = [o for o in parsed if o.is_hydra_override()]
    if hydras := [o for o in hydras if o.key_or_group in text] or hydras:
        if "--" not in text:
            given = shortened(" ".join(map(_typed, hydras)))
            return f"{given}: must be what Hydra takes ({shortened(text, 300)})"
    return shortened(text, 300)


def _explain_missing(
    error: MissingConfigException, parsed: Iterable[Override], text: str
) -> str:
    """Return in one line which option of a group is missing."""
    file = str(error.missing_cfg_file)
    if not error.options:
        reason = text.partition(". Check")[0]
        return f"{shown(file)}: must be a file of the configuration ({reason})"
    group, _, option = file.rpartition("/")
    chosen = [_typed(o) for o in parsed if o.key_or_group == group]
    typed = chosen[-1] if chosen else f"{group}={option}"
    options = [name for name in error.options if not name.startswith("_")]
    return f"{shortened(typed)}: must be one of {', '.join(options)}"


def _explain_group(parsed: Iterable[Override], conf: Path, text: str) -> str:
    """Return in one line that a group got a value that names none of its options."""
    for override in parsed:
        folder, value = conf / override.key_or_group, override.value()
        named = isinstance(value, (str, list)) and len(value) < 200
        if folder.is_dir() and not named:
            options = sorted(path.stem for path in folder.glob("[!_]*.yaml"))
            return f"{shortened(_typed(override))}: must be one of {', '.join(options)}"
    return shortened(text, 300)


# --- parts of an explanation ----------------------------------------------------------


def _one_line(error: BaseException) -> str:
    """Return the text of an error and of its cause, without Hydra's own advice."""
    texts = [_HYDRAS.sub("", str(error)) or type(error).__name__]
    if isinstance(error.__cause__, OmegaConfBaseException):
        texts.append(str(error.__cause__).partition("\n")[0])
    return ": ".join(" ".join(text.split()) for text in texts)


def _parsed(overrides: Sequence[str]) -> list[Override]:
    """Return the overrides that can be parsed."""
    parser, parsed = OverridesParser.create(), []
    for override in overrides:
        with suppress(Exception):
            parsed += parser.parse_overrides([override])
    return parsed


def _typed(override: Override) -> str:
    return override.input_line or override.key_or_group


def _known(parsed: Iterable[Override], wrong: str, conf: Path) -> list[str]:
    """Return the keys that can be overridden, with the groups chosen as they are."""
    chosen = [
        _typed(o)
        for o in parsed
        if (conf / o.key_or_group).is_dir() and o.key_or_group != wrong
    ]
    for overrides in (chosen, []):
        with suppress(Exception):
            GlobalHydra.instance().clear()
            with initialize_config_dir(str(conf), version_base=None):
                composed = compose("base", overrides, return_hydra_config=True)
            keys = _keys(OmegaConf.to_container(composed, resolve=False))
            groups = [path.name for path in conf.iterdir() if path.is_dir()]
            return [key for key in (*keys, *groups) if key != "hydra"]
    return []


def _keys(nested: Any, prefix: str = "") -> Iterator[str]:
    for name, value in nested.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{name}.")


# --- the program ----------------------------------------------------------------------


def _arguments(typed: Sequence[str]) -> argparse.Namespace:
    """Parse the command line as Hydra does; raises `ConfigError`."""
    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        arguments, unknown = parser.parse_known_args(typed)
    except argparse.ArgumentError as error:
        line = f"{error.argument_name}: {error.message}"
        raise ConfigError(shortened(line, 300)) from None
    rerun = arguments.experimental_rerun
    if rerun is not None:
        allowed = "left out: no file of this program is pickled"
        raise ConfigError.of("--experimental-rerun", rerun, allowed)
    path, more = arguments.config_path, arguments.config_dir
    if path is not None and path.startswith("/") and not Path(path).is_dir():
        raise ConfigError.of("--config-path", path, "a folder")
    if more is not None and not Path(more).is_dir():
        raise ConfigError.of("--config-dir", more, "a folder")
    if unknown and unknown[0].startswith("-"):
        allowed = among(unknown[0], re.findall(r"--[a-z-]+", parser.format_usage()))
        raise ConfigError(f"{shortened(unknown[0])}: must be {allowed}")
    if unknown:
        allowed = "beside the other overrides, not between options"
        raise ConfigError(f"{shortened(unknown[0])}: must be {allowed}")
    return arguments


def _is_of_folder(error: Exception) -> bool:
    """Return whether a run folder failed, rather than a file of a configuration."""
    if isinstance(error, HydraException) or not isinstance(error, OSError):
        return False
    return not str(error.filename).endswith(".yaml")


def _unwritable(error: Any, arguments: argparse.Namespace) -> str:
    """Return in one line that the folder of a run or of a sweep cannot be written."""
    multirun = arguments.multirun or "hydra.mode=MULTIRUN" in arguments.overrides
    key = "hydra.sweep.dir" if multirun else "hydra.run.dir"
    if error.filename is None:
        return _one_line(error)
    allowed = f"a folder that can be written ({error.strerror})"
    return str(ConfigError.of(key, str(error.filename), allowed))


def refuse(reason: object) -> NoReturn:
    """Say in one line why the program ends; Hydra's ``hydra.verbose`` adds the rest."""
    if not signals.came():  # a signal has its own line, and can make much fail
        line = " ".join(str(reason).split()) or type(reason).__name__
        print(f"masksl: {shortened(line, 2000)}", file=sys.stderr)
        logger.debug("the whole error:", exc_info=True)
    sys.exit(1)
