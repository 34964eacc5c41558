"""Who imports whom: the rooms of the package."""

import ast
import subprocess
import sys
from itertools import chain
from pathlib import Path

from tests.conftest import ROOT

PACKAGE = ROOT / "masksl"
METHOD = {
    *("compress", "codec", "dataset", "methods", "methods.base", "model", "runtime"),
    *("settings", "training", "utils"),
}
IMPORTS: dict[str, set[str]] = {
    "codec": {"codec"},
    "utils": set(),
    "settings": set(),
    "signals": set(),
    "model": set(),
    "engine.options": set(),
    "training": {"training", "utils"},
    "compress": {"codec"},
    "modules": {"compress"},
    "data": {"data", "utils"},
    "dataset": {"data", "utils"},
    "runtime": {
        *(
            "runtime",
            "compress",
            "codec",
            "settings",
            "training.schedule",
            "training.score",
            "utils",
        ),
    },
    # the configurations alone
    "methods": {
        *("methods.fedavg", "methods.fedpm", "methods.flash", "methods.sasg"),
        *("methods.split", "settings"),
    },
    "methods.base": METHOD,
    "methods.fedavg": METHOD | {"methods.fedavg"},
    "methods.fedpm": METHOD | {"methods.fedpm"},
    "methods.flash": METHOD | {"methods.flash"},
    "methods.sasg": METHOD | {"methods.sasg"},
    "methods.split": METHOD | {"methods.split"},
    "strategy": {"methods.base", "runtime", "settings", "training", "utils"},
    "config": {
        *("methods", "compress", "dataset", "model", "training", "engine.options"),
        *("runtime.ledger", "runtime.compressors", "runtime.tracking", "settings"),
        "cli",
    },
    "cli": {"settings", "signals"},
    "client_app": {
        *("methods.base", "runtime", "settings"),
        *("engine.superlink.client", "engine.superlink.wire"),
    },
    "server_app": {
        *("config", "methods", "methods.base", "runtime", "settings", "strategy"),
        *("engine", "engine.options", "engine.superlink.grid"),
    },
    "engine": {"engine", "engine.options", "utils"},
    "main": {
        *("config", "dataset", "engine", "engine.options", "runtime", "server_app"),
        *("cli", "settings", "signals"),
    },
    "sweep": {"config", "main", "runtime.folder", "runtime.results", "server_app"},
    "report": {"report", "runtime.folder", "runtime.results"},
    "federation": {"federation", "config", "runtime.results", "server_app", "signals"},
}
"""Rooms by room that a module of it may import; `bench` may import anything."""

SHARED = {
    "base",
    "client",
    "evaluation",
    "global_model",
    "local",
    "network",
}  # of methods/: every method imports them
FRAMEWORKS = {"flwr", "ray", "hydra", "grpc"}
ALLOWED = {
    "runtime": {"flwr"},
    "methods.base": {"flwr"},
    "methods.fedavg": {"flwr"},
    "methods.fedpm": {"flwr"},
    "methods.flash": {"flwr"},
    "methods.sasg": {"flwr"},
    "methods.split": {"flwr"},
    "client_app": {"flwr"},
    "strategy": {"flwr"},
    "server_app": {"flwr"},
    "engine": {"flwr", "ray", "grpc"},
    "cli": {"hydra"},
    "config": {"hydra"},
    "main": {"hydra"},
    "bench": {"flwr", "hydra"},
}


def modules() -> list[str]:
    """Return the modules of the package by dotted name, packages by theirs."""
    paths = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")]
    names = [".".join(path.with_suffix("").parts) for path in paths]
    return [name.removesuffix(".__init__").removesuffix("__init__") for name in names]


MODULES = {name for name in modules() if name}


def room(module: str) -> str:
    """Return the room of a module of the package."""
    parts = module.split(".")
    if parts[0] == "methods" and len(parts) > 1:
        return "methods.base" if parts[1] in SHARED else ".".join(parts[:2])
    return module if module in IMPORTS else parts[0]


def imported(path: Path) -> set[str]:
    """Return dotted names that a file imports, in whatever function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_modules(path: Path) -> set[str]:
    """Return the modules of the package that a file imports."""
    found = set()
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "masksl":
            every = (".".join(parts[1:end]) for end in range(len(parts), 1, -1))
            found.add(next(module for module in every if module in MODULES))
    return found


def test_modules_import_what_the_rooms_allow() -> None:
    seen = set()
    for path in PACKAGE.rglob("*.py"):
        relative = path.relative_to(PACKAGE).with_suffix("")
        module = ".".join(relative.parts).removesuffix(".__init__")
        own = room(module)
        if module == "__init__":
            continue
        seen.add(own)
        frameworks = {name.split(".")[0] for name in imported(path)} & FRAMEWORKS
        assert frameworks <= ALLOWED.get(own, set()), (module, frameworks)
        if module.startswith("methods.") and module in IMPORTS["methods"]:
            assert imported_modules(path) == {"settings"}  # its configuration
        elif own != "bench":
            for other in imported_modules(path):
                rooms = {other, room(other), other.split(".")[0]}
                if other.startswith("methods"):  # each part of methods by its name
                    rooms = {room(other)}
                assert rooms & IMPORTS[own], (module, other)
    assert seen == IMPORTS.keys() | {"bench"}


def test_rooms_have_no_cycles() -> None:
    """Modules, one by one, import each other without a cycle.

    The methods are left out of the package that lists them: it names their classes as
    text and imports their configurations alone.
    """
    arrows: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        relative = path.relative_to(PACKAGE).with_suffix("")
        module = ".".join(relative.parts).removesuffix(".__init__")
        arrows[module] = imported_modules(path) - {module}
    typed = ("runtime.clients", "runtime.round")  # imported for its type alone
    arrows[typed[0]].discard(typed[1])
    done: set[str] = set()
    while remaining := arrows.keys() - done:
        ready = {m for m in remaining if arrows[m] <= done}
        assert ready, f"a cycle among {sorted(remaining)}"
        done |= ready


def test_a_method_never_imports_another() -> None:
    folders = [path for path in (PACKAGE / "methods").iterdir() if path.is_dir()]
    names = {path.name for path in folders} - {"__pycache__"}
    assert names
    for name in names:
        for path in (PACKAGE / "methods" / name).rglob("*.py"):
            others = {f"methods.{other}" for other in names - {name}}
            assert not {room(m) for m in imported_modules(path)} & others, path


def test_shared_rooms_name_no_method() -> None:
    """Strategy, runtime and engines work for every method."""
    shared = (PACKAGE / "runtime").glob("*.py"), (PACKAGE / "engine").glob("*.py")
    words = ("split", "activation", "gradient", "half", "halves")
    for path in chain([PACKAGE / "strategy.py"], *shared):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [
                *([node.id] if isinstance(node, ast.Name) else []),
                *([node.attr] if isinstance(node, ast.Attribute) else []),
                *([node.name] if isinstance(node, ast.FunctionDef) else []),
            ]
            for name in names:
                if name != "split":  # that of text and tensors
                    assert name not in words, (path, name)


def test_modules_and_classes_are_short() -> None:
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 500, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 300, (name, node.name)


def test_the_names_that_flower_demands_are_there() -> None:
    for name in ("client_app", "dataset", "model", "server_app", "strategy", "utils"):
        assert (PACKAGE / f"{name}.py").exists(), name


def test_nothing_pickles() -> None:
    for path in PACKAGE.rglob("*.py"):
        names = imported(path)
        assert not names & {"pickle", "cloudpickle", "dill"}, path
        assert "torch.load" not in path.read_text(encoding="utf-8"), path


def test_a_process_starts_without_what_it_may_not_need() -> None:
    """Importing them takes longer than all else, and most processes need none."""
    script = (
        "import sys, masksl.main, masksl.client_app, masksl.methods.split.server\n"
        "slow = {'torchvision', 'torch._dynamo', 'datasets', 'flwr_datasets',\n"
        "        'matplotlib', 'ray', 'tensorboard'}\n"
        "assert not slow & sys.modules.keys(), slow & sys.modules.keys()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
