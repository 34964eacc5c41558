"""Who imports whom: the layers of the package."""

import ast
from pathlib import Path

from tests.conftest import ROOT

PACKAGE = ROOT / "masksl"
IMPORTS = {
    "wire": set(),
    "entropy": {"wire"},
    "topk": set(),
    "planes": {"entropy", "topk", "wire"},
    "scalar": set(),
    "options": set(),
    "compress": {"options", "entropy", "planes", "scalar", "topk", "wire"},
    "model": set(),
    "seeds": set(),
    "settings": set(),
    "dataset": {"seeds"},
    "heap": set(),
    "halves": {"heap"},
    "config": {"compress", "dataset", "model", "settings"},
    "ledger": set(),
    "results": set(),
    "console": set(),
    "checkpoint": set(),
    "timing": set(),
    "messages": {"compress", "ledger", "wire"},
    "client_app": {
        *("compress", "dataset", "halves", "messages", "model", "seeds", "settings"),
        "timing",
    },
    "strategy": {
        *("compress", "halves", "ledger", "messages", "seeds", "settings", "timing"),
    },
    "server_app": {
        *("checkpoint", "compress", "config", "console", "dataset", "halves", "ledger"),
        *("messages", "model", "results", "seeds", "settings", "strategy"),
    },
    "modules": {"compress"},
    "bench": {
        *(
            "bench",
            "checkpoint",
            "compress",
            "dataset",
            "engine",
            "halves",
            "main",
            "messages",
        ),
        *("model", "modules", "results", "seeds", "server_app", "settings"),
    },
    "report": {"report", "results"},
    "main": {
        *("checkpoint", "config", "dataset", "engine", "messages", "server_app"),
        "settings",
    },
    "sweep": {"config", "main", "results", "server_app"},
    "engine": {"engine", "heap"},
}
FRAMEWORKS = {"flwr", "ray", "hydra"}
ALLOWED = {
    "messages": {"flwr"},
    "client_app": {"flwr"},
    "strategy": {"flwr"},
    "server_app": {"flwr"},
    "engine": {"flwr", "ray"},
    "main": {"hydra"},
    "bench": {"flwr", "hydra"},
}


def imported(path: Path) -> set[str]:
    """Return dotted names that a file imports, wherever it does."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_modules_import_what_the_layers_allow() -> None:
    seen = set()
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if module == "__init__":
            continue
        seen.add(module)
        names = imported(path)
        ours = {n.split(".")[1] for n in names if n.startswith("masksl.")}
        assert ours <= IMPORTS[module], (module, ours - IMPORTS[module])
        frameworks = {n.split(".")[0] for n in names} & FRAMEWORKS
        assert frameworks <= ALLOWED.get(module, set()), (module, frameworks)
    assert seen == IMPORTS.keys()


def test_layers_have_no_cycles() -> None:
    done: set[str] = set()
    while remaining := IMPORTS.keys() - done:
        ready = {m for m in remaining if IMPORTS[m] - {m} <= done}
        assert ready, f"a cycle among {sorted(remaining)}"
        done |= ready


def test_nothing_pickles() -> None:
    for path in PACKAGE.rglob("*.py"):
        names = imported(path)
        assert not names & {"pickle", "cloudpickle", "dill"}, path
        assert "torch.load" not in path.read_text(encoding="utf-8"), path
