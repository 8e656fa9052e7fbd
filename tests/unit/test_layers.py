"""Imports only point down, and what is called pure imports nothing that acts on the world."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import forwarder

PACKAGE = Path(forwarder.__file__).parent

# A room imports rooms of a lower rank and itself, never one beside or above it. A room is a module
# or package of ``forwarder``; ``config.model`` is one of its own, the vocabulary of all others.
RANK = {
    "errors": 0,
    "addr": 0,
    "kernel": 0,
    "printable": 0,
    "interrupt": 0,
    "config.model": 1,
    "supervision": 1,
    "asking": 1,
    "retries": 1,
    "firstanswers": 2,
    "rarely": 1,
    "stats": 1,
    "access": 2,
    "status": 2,
    "config": 3,
    "net": 4,
    "migrate": 4,
    "notify": 4,
    "daemonlog": 4,
    "privileges": 4,
    "signals": 4,
    "heartbeat": 4,
    "board": 4,
    "gate": 5,
    "limits": 1,
    "ledger": 5,
    "pidfile": 4,
    "messages": 5,
    "upstream": 5,
    "serving": 5,
    "spec": 5,
    "listeners": 5,
    "features": 5,
    "sessions": 9,
    "ending": 10,
    "lineage": 6,
    "slot": 6,
    "workerspec": 6,
    "helper": 6,
    "naming": 7,
    "inherit": 5,
    "probing": 5,
    "control": 7,
    "connlog": 5,
    "relay": 6,
    "reload": 6,
    "upgrade": 6,
    "latebind": 7,
    "handover": 8,
    "worker": 7,
    "reloading": 9,
    "preview": 8,
    "fleet": 8,
    "binding": 7,
    "surroundings": 5,
    "surviving": 1,
    "service": 9,
    "master": 11,
    "demo": 12,
    "cli": 13,
    "__main__": 14,
}
PURE = {
    "errors",
    "access",
    "config.model",
    "stats",
    "status",
    "supervision",
    "relay.wheel",
    "connlog.record",
    "relay.framing",
    "relay.flow_table",
    "upstream.schedule",
    "upstream.known",
    "upstream.wanted",
    "retries",
    "firstanswers",
    "rarely",
    "limits",
}
OF_THE_PACKAGE = {"forwarder.__version__", "forwarder.DISTRIBUTION"}
IMPURE_IMPORTS = {"socket", "asyncio", "time", "logging", "os", "select", "signal", "subprocess"}


def modules() -> dict[str, str]:
    """Dotted name below ``forwarder`` to source."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name or "__init__"] = path.read_text()
    return found


def imports(source: str) -> set[str]:
    """Dotted names of all that is imported, those for type checking too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(module: str) -> str:
    """The room of a dotted name below ``forwarder``."""
    if module == "config.model" or module.startswith("config.model."):
        return "config.model"
    return module.partition(".")[0]


def violations(sources: dict[str, str]) -> list[str]:
    """Imports that do not point down."""
    found = []
    for module, source in sources.items():
        if module == "__init__":
            continue
        room = room_of(module)
        for name in sorted(imports(source)):
            if not name.startswith("forwarder.") or name in OF_THE_PACKAGE:
                continue
            other = room_of(name.removeprefix("forwarder."))
            if other != room and RANK[other] >= RANK[room]:
                found.append(f"{module} must not import {name}")
    return found


def test_every_module_has_a_rank() -> None:
    assert {room_of(module) for module in modules()} - {"__init__"} <= RANK.keys()


def test_imports_only_point_down() -> None:
    assert violations(modules()) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("net.pipes", "from forwarder.relay import relay"),
        ("net.pipes", "import forwarder.worker"),
        ("upstream.pool", "from forwarder import messages"),
        ("config.model", "from forwarder.config.loading import Loaded"),
        ("relay.session", "if TYPE_CHECKING:\n    from forwarder.worker import Worker"),
        ("worker", "def f():\n    from forwarder.master import Master"),
    ],
)
def test_an_import_that_points_up_is_found(module: str, line: str) -> None:
    assert len(violations({module: line})) == 1


def test_pure_modules_import_nothing_that_acts() -> None:
    sources = modules()
    for module in PURE:
        roots = {name.partition(".")[0] for name in imports(sources[module])}
        assert not roots & IMPURE_IMPORTS, module


def test_the_package_itself_is_only_a_version_and_a_name() -> None:
    assert imports(modules()["__init__"]) == set()
