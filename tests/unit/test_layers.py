"""Imports only point down and never in a circle; what is called pure imports nothing that acts."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import forwarder

if TYPE_CHECKING:
    from collections.abc import Container

PACKAGE = Path(forwarder.__file__).parent

# From the ground up: a room imports itself and rooms above it in this list. A room is a module or a
# folder of ``forwarder``.
ROOMS = (
    "errors",
    "system",
    "config",
    "stats",
    "net",
    "limits",
    "balancing",
    "ipc",
    "connlog",
    "upstream",
    "checker",
    "control",
    "serving",
    "succession",
    "relay",
    "worker",
    "supervision",
    "master",
    "migrate",
    "cli",
    "__main__",
)
PURE = {
    "errors",
    "relay.access",
    "config.model",
    "control.orders",
    "control.protocol",
    "config.patterns",
    "stats.reasons",
    "stats.rows",
    "cli.status",
    "supervision.move_plan",
    "supervision.policy",
    "relay.wheel",
    "connlog.record",
    "relay.moving.flow_state",
    "relay.moving.parcel",
    "relay.moving.terms",
    "relay.udp.framing",
    "relay.udp.flow_table",
    "upstream.schedule",
    "upstream.known",
    "upstream.wanted",
    "checker.outcome",
    "checker.passive",
    "checker.plan",
    "checker.probes.agent_words",
    "checker.probes.certificate",
    "checker.probes.names",
    "checker.probes.readers",
    "checker.probes.why",
    "checker.standing",
    "serving.retries",
    "serving.firstanswers",
    "system.backoff",
    "system.rarely",
    "limits.tables",
    "balancing.choose",
    "balancing.tiers",
}
# Arbitrary; what grows beyond it has had two subjects each time.
MOST_LINES = 500
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
            if ROOMS.index(other) > ROOMS.index(room):
                found.append(f"{module} must not import {name}")
    return found


def test_the_list_has_every_room() -> None:
    assert {room_of(module) for module in modules()} - {"__init__"} == set(ROOMS)


def test_imports_only_point_down() -> None:
    assert violations(modules()) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("net.pipes", "from forwarder.relay import relay"),
        ("net.pipes", "import forwarder.worker"),
        ("upstream.pool", "from forwarder import master"),
        ("config.model", "from forwarder.serving import retries"),
        ("relay.session", "if TYPE_CHECKING:\n    from forwarder.worker import Worker"),
        ("worker", "def f():\n    from forwarder.master import Master"),
    ],
)
def test_an_import_that_points_up_is_found(module: str, line: str) -> None:
    assert len(violations({module: line})) == 1


def imported(name: str, known: Container[str]) -> str | None:
    """The module below ``forwarder`` that a dotted name is, or is in."""
    module = name.removeprefix("forwarder.")
    while module != name and module:
        if module in known:
            return module
        module = module.rpartition(".")[0]
    return None


def circles(sources: dict[str, str]) -> list[list[str]]:
    """Modules that import each other, for types too, directly or through others."""
    above = {
        module: {other for name in imports(source) if (other := imported(name, sources))}
        for module, source in sources.items()
    }
    reached = {module: reach(module, above) for module in above}
    of_each = {
        tuple(sorted(other for other in reached[module] if module in reached[other]))
        for module in above
    }
    return sorted([*circle] for circle in of_each if circle)


def reach(module: str, above: dict[str, set[str]]) -> set[str]:
    """What a module imports, directly or through others."""
    found: set[str] = set()
    left = {module}
    while left:
        new = above[left.pop()] - found
        found |= new
        left |= new
    return found


def test_no_modules_import_each_other() -> None:
    assert circles(modules()) == []


def test_a_circle_is_found() -> None:
    sources = {
        "relay.a": "from forwarder.relay.b import B\nfrom forwarder.errors import Issue",
        "relay.b": "if TYPE_CHECKING:\n    from forwarder.relay import c",
        "relay.c": "def f():\n    import forwarder.relay.a",
        "relay.d": "from forwarder.relay.a import A",
        "net": "",
        "net.pipes": "from forwarder import net",
        "errors": "",
    }
    assert circles(sources) == [["relay.a", "relay.b", "relay.c"]]


def test_pure_modules_import_nothing_that_acts() -> None:
    sources = modules()
    for module in PURE:
        roots = {name.partition(".")[0] for name in imports(sources[module])}
        assert not roots & IMPURE_IMPORTS, module


def test_the_package_itself_is_only_a_version_and_a_name() -> None:
    assert imports(modules()["__init__"]) == set()


@pytest.mark.parametrize("module", ["control", "sessions"])
def test_a_command_that_asks_an_instance_loads_neither_service_nor_configuration(
    module: str,
) -> None:
    """Probes and scripts ask often, and would spend most of their time on that."""
    code = f"import sys, forwarder.cli.main, forwarder.cli.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    needless = {"forwarder.master", "forwarder.relay", "forwarder.worker", "asyncio", "subprocess"}
    assert not loaded & {*needless, "forwarder.config", "forwarder.cli.run", "difflib"}


def test_the_command_line_loads_no_command_before_it_is_called() -> None:
    code = "import sys, forwarder.cli.main; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name for name in done.stdout.split() if name.startswith("forwarder.cli.")}
    own = {"main", "group", "arguments", "interrupt"}
    assert loaded == {f"forwarder.cli.{name}" for name in own}


def test_no_module_is_longer_than_one_can_keep_in_mind() -> None:
    lines = {module: len(source.splitlines()) for module, source in modules().items()}
    assert {module: count for module, count in lines.items() if count > MOST_LINES} == {}
