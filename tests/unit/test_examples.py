"""What is shipped for people to copy works, and the documentation knows every key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.pages import Block, blocks, pages

from forwarder import __version__
from forwarder.checker.standing import What
from forwarder.config import Dialect, load, parse
from forwarder.config.advice import advise
from forwarder.config.keys import OF_CHECKS
from forwarder.config.model import (
    CONNECT_TIMEOUT_S,
    HALF_CLOSE_TIMEOUT_S,
    IDLE_TIMEOUT_S,
    UDP_TIMEOUT_S,
    Protocol,
)
from forwarder.config.rinetd_conf import KEYWORDS
from forwarder.config.toml_check import CHECK_KEYS
from forwarder.config.toml_conf import ACCESS_KEYS, LOG_KEYS, RULE_KEYS, TOP_KEYS
from forwarder.config.toml_upstreams import GROUP_KEYS, SERVER_KEYS
from forwarder.control.orders import Action
from forwarder.stats.reasons import REASONS
from forwarder.stats.rows import COUNTERS

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path for path in (ROOT / "deploy" / "examples").iterdir() if path.is_file())
DOCUMENT = ROOT / "docs" / "configuration.md"

TOP = "### Top level"
RULE = "### In a `[[forwarding_rules]]` table"
ACCESS = "### In a `[[global_rules]]` or `[[forwarding_rules.rules]]` table"
LOGS = "### In a `[[logs]]` table"
GROUP = "### In a `[[groups]]` table"
SERVER = "### In a server table"
CHECK = "### In a `check` table"
CHECKS = "### In the `[checks]` table"
RINETD = "## rinetd.conf"
KEYS = {
    TOP: TOP_KEYS,
    RULE: RULE_KEYS,
    GROUP: GROUP_KEYS,
    SERVER: SERVER_KEYS,
    CHECK: CHECK_KEYS,
    CHECKS: tuple(OF_CHECKS),
    ACCESS: ACCESS_KEYS,
    LOGS: LOG_KEYS,
}
FIRST_VERSION = (0, 1, 0)


def version(text: str) -> tuple[int, ...]:
    """A version as what can be compared."""
    return tuple(map(int, text.split(".")))


def rows_under(heading: str) -> dict[str, list[str]]:
    """Cells of the tables below a heading, up to the next one, by the key in the first cell."""
    _, found, rest = DOCUMENT.read_text().partition(f"\n{heading}\n")
    assert found, f"{DOCUMENT.name} has no heading {heading!r}"
    section = re.split(r"^#+ ", rest, maxsplit=1, flags=re.MULTILINE)[0]
    rows = re.findall(r"^\| `([a-z_]+)` \|(.*)\|$", section, flags=re.MULTILINE)
    return {key: [cell.strip() for cell in re.split(r"(?<!\\)\|", cells)] for key, cells in rows}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_loads_without_a_warning(path: Path) -> None:
    loaded = load(path)
    assert loaded.warnings == ()
    assert advise(loaded.config, Dialect.of(path)) == ()
    assert loaded.config.rules
    assert {rule.protocol for rule in loaded.config.rules} >= {Protocol.TCP, Protocol.UDP}


BLOCKS = [block for page in pages() for block in blocks(page) if block.name.endswith(".toml")]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page.name}:{block.line}")
def test_a_configuration_in_the_documentation_loads_without_a_warning(block: Block) -> None:
    loaded = parse(block.text, block.name, Dialect.TOML)
    assert loaded.warnings == ()
    assert advise(loaded.config, Dialect.TOML) == ()


def test_there_is_an_example_of_each_dialect() -> None:
    assert [path.name for path in EXAMPLES] == ["forwarder.toml", "rinetd.conf"]


@pytest.mark.parametrize("key", sorted({key for keys in KEYS.values() for key in keys}))
def test_the_toml_example_shows_every_key(key: str) -> None:
    example = (ROOT / "deploy" / "examples" / "forwarder.toml").read_text()
    alone = rf"{key} = |\[{{1,2}}(\w+\.)?{key}\]{{1,2}}$"
    assert re.search(rf"^(# )?({alone})|[{{,] {key} = ", example, flags=re.MULTILINE)


@pytest.mark.parametrize("keyword", KEYWORDS)
def test_the_rinetd_example_shows_every_keyword(keyword: str) -> None:
    example = (ROOT / "deploy" / "examples" / "rinetd.conf").read_text()
    word = "pidlogfile" if keyword == "pidfile" else keyword  # two words for one thing
    assert re.search(rf"^(# )?{word}\b", example, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("heading", "keys"),
    [*KEYS.items(), (RINETD, (*KEYWORDS, "timeout", "src"))],
)
def test_the_documentation_has_every_key_and_no_other(heading: str, keys: tuple[str, ...]) -> None:
    assert set(rows_under(heading)) == set(keys)


@pytest.mark.parametrize("heading", [*KEYS, RINETD])
def test_the_documentation_says_since_when_there_is_a_key(heading: str) -> None:
    """None is told to be older than the first version, or to come with one that is not there."""
    for key, (_, _, _, since, *_) in rows_under(heading).items():
        assert FIRST_VERSION <= version(since) <= version(__version__), key


@pytest.mark.parametrize(
    ("heading", "key", "default_s"),
    [
        (TOP, "connect_timeout", CONNECT_TIMEOUT_S),
        (TOP, "half_close_timeout", HALF_CLOSE_TIMEOUT_S),
        (TOP, "idle_timeout", IDLE_TIMEOUT_S),
        (RULE, "timeout", UDP_TIMEOUT_S),
        (RINETD, "timeout", UDP_TIMEOUT_S),
    ],
)
def test_the_documented_default_is_the_default(heading: str, key: str, default_s: float) -> None:
    _, unit, default, *_ = rows_under(heading)[key]
    assert (unit, default) == ("seconds", f"`{default_s:g}`")


def test_the_operations_guide_explains_every_reason_and_no_other() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    _, _, section = text.partition("## Why sessions end")
    found = re.findall(r"^\| `([a-z/-]+)` \|", section.partition("\n## ")[0], flags=re.MULTILINE)
    assert tuple(found) == REASONS


def first_cells(section: str) -> list[str]:
    """The words in code of the first column of the tables of a section of the operations guide."""
    _, found, rest = (ROOT / "docs" / "operations.md").read_text().partition(f"\n{section}\n")
    assert found, section
    rows = re.findall(
        r"^\| (`.*?`) \|", re.split(r"^## ", rest, flags=re.MULTILINE)[0], re.MULTILINE
    )
    return [word for row in rows for word in re.findall(r"`([^`]+)`", row)]


def test_the_operations_guide_explains_every_counter() -> None:
    assert set(COUNTERS) <= set(first_cells("### What is in the status"))


def test_the_operations_guide_names_only_events_that_are_logged() -> None:
    package = "".join(path.read_text() for path in (ROOT / "forwarder").rglob("*.py"))
    events = first_cells("## The program's log")
    assert "master.ready" in events
    # What becomes of servers, and what is ordered of them, are tables.
    of_servers = {f"upstream.{one.value}" for one in (*What, *Action)}
    assert '"upstream.%s ' in package
    for event in set(events) - of_servers:
        assert re.search(rf'"{re.escape(event)}[ :"]', package), event
    assert {f"upstream.{one.value}" for one in Action} <= set(events)
