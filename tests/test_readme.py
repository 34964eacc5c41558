"""README and docs: what they tell to type works, and what they name is there."""

import argparse
import contextlib
import io
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from masksl import compress, config
from masksl.bench.__main__ import main as bench
from masksl.engine.options import ENGINES
from masksl.methods import METHODS
from masksl.report.__main__ import main as report
from masksl.runtime.tracking import TRACKERS, TrackingConfig
from masksl.settings import Settings
from tests.conftest import ROOT, settings_of

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
CONF = ROOT / "conf"
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", read(page), re.S | re.M)


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of every command of the shell blocks."""
    for block in blocks(page, "shell"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def arguments_of(module: str, page: Path) -> Iterator[list[str]]:
    """Yield what follows ``python -m MODULE`` in the commands of a page."""
    for words in commands(page):
        if module in words and words[words.index(module) - 1] == "-m":
            yield words[words.index(module) + 1 :]


def overrides_of(page: Path) -> Iterator[list[str]]:
    """Yield the overrides of every run that a page tells to start, however it does."""
    yield from arguments_of("masksl.main", page)
    for code in re.findall(
        r"`(?:poetry run )?python -m masksl\.main( [^`]+)`", read(page)
    ):
        yield shlex.split(code)
    for code in re.findall(r'make run ARGS="([^"…]+)"', read(page)):
        yield shlex.split(code)
    for words in commands(page):
        if words[-2:-1] == ["--run-config"]:
            yield config.split_overrides(tomllib.loads(words[-1]))


def jobs(overrides: list[str]) -> list[list[str]]:
    """Return runs of a sweep in which every value of every swept key comes up."""
    parsed = OverridesParser.create().parse_overrides(
        [override for override in overrides if override != "--multirun"]
    )
    swept = {o.get_key_element(): o for o in parsed if o.is_sweep_override()}
    fixed = [str(o.input_line) for o in parsed if not o.is_sweep_override()]
    values = {key: list(o.sweep_string_iterator()) for key, o in swept.items()}
    if "--multirun" not in overrides:
        assert not swept, "a sweep without --multirun"
        return [fixed]
    with initialize_config_dir(str(CONF), version_base=None):
        sweep = compose("base", overrides=fixed, return_hydra_config=True)
    given = {o.get_key_element() for o in parsed}  # the command line wins
    for key, text in (sweep.hydra.sweeper.params or {}).items():
        if key not in given:
            values[key] = str(text).split(",")
    number = max(map(len, values.values()))
    return [
        [*fixed, *(f"{key}={some[i % len(some)]}" for key, some in values.items())]
        for i in range(number)
    ]


@every_page
def test_python_blocks_run_and_print_what_they_say(page: Path) -> None:
    code = "\n".join(blocks(page, "python"))
    printed = io.StringIO()
    # What a page registers as an example stays in it.
    registries = (compress.COMPRESSORS, METHODS, TRACKERS)
    services = dict.fromkeys(("mlflow", "wandb"), MagicMock())
    with contextlib.ExitStack() as stack:
        for registry in registries:
            stack.enter_context(patch.dict(registry))
        stack.enter_context(patch.dict(sys.modules, services))
        stack.enter_context(contextlib.redirect_stdout(printed))
        exec(code, {})  # pylint: disable=exec-used
    said = re.findall(r"^print\(.*#\s*(.*)$", code, re.M)
    for line, number in zip(printed.getvalue().splitlines(), said, strict=False):
        if number[0].isdigit():
            assert f"{float(line):.4f}" == number
    assert page.name != "compressors.md" or len(said) == 3


@every_page
def test_runs_compose_and_are_allowed(
    page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data are not read, so that it needs none; a GPU is taken to be there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for overrides in {tuple(overrides) for overrides in overrides_of(page)}:
        if any(override.startswith("plugins=") for override in overrides):
            continue  # the module is the reader's own
        for job in jobs(list(overrides)):
            composed(*job)


@cache
def composed(*overrides: str) -> Settings:
    """Compose and check a run, once however often pages repeat it."""
    return config.compose(overrides)


def test_every_way_to_start_a_run_is_looked_at() -> None:
    runs = [overrides for page in PAGES for overrides in overrides_of(page)]
    assert len(runs) > 40
    assert any("--multirun" in overrides for overrides in runs)
    assert list(overrides_of(ROOT / "docs/flwr-run.md"))


class Parsed(Exception):
    """Arguments were parsed, and nothing is done."""


@every_page
def test_arguments_of_reports_and_benchmarks_parse(
    page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser: argparse.ArgumentParser) -> None:
        parse(parser)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    for module, main in (("masksl.report", report), ("masksl.bench", bench)):
        for arguments in arguments_of(module, page):
            monkeypatch.setattr("sys.argv", [module, *arguments])
            with pytest.raises(Parsed):
                main()


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", read(linked), re.M)
            slugs = [re.sub(r"[^\w\- ]", "", h.lower()) for h in headings]
            assert anchor in [slug.replace(" ", "-") for slug in slugs], target


def test_every_page_is_linked_from_the_readme() -> None:
    for page in PAGES[1:]:
        assert f"]({page.relative_to(ROOT).as_posix()}" in read(README), page


@every_page
def test_pages_are_short(page: Path) -> None:
    assert read(page).count("\n") <= (250 if page == README else 200)


def test_make_targets_are_there() -> None:
    makefile = read(ROOT / "Makefile")
    targets = {
        target
        for page in PAGES
        for target in re.findall(r"(?:^|`)make ([a-z][a-z-]+)", read(page), re.M)
    }
    assert {"run", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_the_title_is_the_same_everywhere() -> None:
    text = read(README)
    _, front, body = text.split("---\n", 2)
    title = yaml.safe_load(front)["title"]
    assert body.strip().splitlines()[0] == f"# {title}"
    project = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]
    assert project["description"] == title


# --- docs/configuration.md ------------------------------------------------------------


CONFIGURATION = ROOT / "docs/configuration.md"
Keys = dict[tuple[str, str], list[str]]


def documented_keys() -> Keys:
    """Return the cells default and allowed by key and by whose it is, if not all's."""
    keys: Keys = {}
    head: list[str] = []
    pages = read(CONFIGURATION), read(ROOT / "docs/configuration-methods.md")
    for line in "\n".join(pages).splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        head = (head or cells) if line.startswith("|") else []
        match = re.fullmatch(r"`([\w.]+)`", cells[0])
        if match and head[0] == "key":
            owned = head[1] == "of"
            owners = re.findall(r"`(\w+)`", cells[1]) if owned else [""]
            for owner in owners or [""]:
                assert (match[1], owner) not in keys, line
                keys[match[1], owner] = cells[1 + owned : 3 + owned]
    return keys


def sections() -> Iterator[tuple[str, str, str, Any]]:
    """Yield whose it is, an override that takes it, the prefix and the section."""
    for prefix, section in config.SECTIONS.items():
        yield "", "engine=ray", prefix, section
    for name, method in METHODS.items():
        yield name, f"method={name}", "method", method.config
    for name, options in ENGINES.items():
        yield name, f"engine={name}", "engine", options


def same(shown: str, value: Any) -> bool:
    """Return whether a cell shows a value of settings."""
    shown = shown.strip("`")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return shown == (str(value).lower() if isinstance(value, bool) else value)
    return float(shown) == value


def test_every_key_stands_in_the_configuration() -> None:
    documented = documented_keys()
    for owner, override, prefix, section in sections():
        settings = settings_of(override)
        for name, field in section.model_fields.items():
            key = config.key_of(section, name, prefix)
            assert (key, owner) in documented, f"{key} of {owner or 'every run'}"
            default, allowed = documented.pop((key, owner))
            assert same(default, settings[key]), key
            assert allowed == field.description, key
    documented.pop(("compressor.name", ""))
    default, allowed = documented.pop(("tracking.name", ""))
    assert same(default, settings_of()["tracking.name"])
    assert allowed == TrackingConfig.model_fields["name"].description
    for path in (CONF / "compressor").glob("*.yaml"):
        if "defaults" in yaml.safe_load(read(path)):
            continue  # other defaults of another one
        settings = settings_of(f"compressor={path.stem}")
        for option in compress.options_of(path.stem):
            key = f"compressor.{option}"
            assert (key, path.stem) in documented, f"{key} of {path.stem}"
            assert same(documented.pop((key, path.stem))[0], settings[key]), key
    launcher = yaml.safe_load(read(CONF / "hydra/launcher/processes.yaml"))
    del launcher["_target_"]
    for option in launcher:
        del documented[f"hydra.launcher.{option}", ""]
    assert not documented, "unknown keys"


def test_every_file_of_a_group_stands_in_the_configuration() -> None:
    table = read(CONFIGURATION).split("## Groups")[1].split("\n## ")[0]
    for path in CONF.glob("*/*.yaml"):
        if not path.stem.startswith("_"):
            assert f"`{path.parent.name}`" in table, path
            assert f"`{path.stem}`" in table, path
