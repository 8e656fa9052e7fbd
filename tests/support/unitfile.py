"""Reading unit files of systemd: sections of lists of values, systemd.syntax(7)."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def read_unit(path: Path) -> Mapping[str, list[str]]:
    """Every value of every key, in order; an empty one forgets those before it."""
    found: dict[str, list[str]] = defaultdict(list)
    for raw in path.read_text().splitlines():
        key, is_assignment, value = raw.strip().partition("=")
        if not is_assignment or key.startswith(("#", ";")):
            continue
        if value:
            found[key].append(value)
        else:
            found[key].clear()
    return found


def words(unit: Mapping[str, list[str]], key: str) -> list[str]:
    """All words of a key that may stand several times."""
    return " ".join(unit.get(key, [])).split()
