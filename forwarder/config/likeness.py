"""Which language a text is written in, by the look of its lines. Pure; a guess, for a hint."""

from __future__ import annotations

import re
from enum import Enum
from typing import Final

_COMMENT: Final = re.compile(r"\s*(?:#.*)?")
_PORT: Final = r"[0-9A-Za-z_-]+(?:/(?:tcp|udp))?"


class Likeness(Enum):
    """Languages of configurations that people have, by the names that they know them by."""

    TOML = "TOML"
    RINETD = "rinetd.conf"
    YAML = "YAML"
    JSON = "JSON"


# In this order: a line is the first that it looks like.
_LINES: Final = {
    Likeness.JSON: re.compile(r"\s*(?:[{}]|\"[^\"]*\"\s*:).*"),
    Likeness.TOML: re.compile(r"\s*(?:\[\[?[\w.\" -]+\]\]?\s*(?:#.*)?|[\w.-]+\s*=\s*\S.*)"),
    Likeness.YAML: re.compile(r"\s*(?:-\s+)?[\w-]+:(?:\s.*)?|\s*-\s.*|---.*"),
    Likeness.RINETD: re.compile(
        rf"\s*(?:(?:allow|deny|logfile|pidfile|pidlogfile|logcommon)\b.*"
        rf"|\S+\s+{_PORT}\s+\S+\s+{_PORT}\s*(?:\[.*)?(?:#.*)?)"
    ),
}
# What a file given by mistake may cost; the first lines show as much as all.
_MOST_LINES: Final = 1000


def likeness(text: str) -> Likeness | None:
    """The language that more than half of its lines look like; None if there is none."""
    counts = dict.fromkeys(Likeness, 0)
    total = 0
    for line in text.split("\n")[:_MOST_LINES]:
        if _COMMENT.fullmatch(line.rstrip("\r")):
            continue
        total += 1
        for kind, pattern in _LINES.items():
            if pattern.fullmatch(line.rstrip("\r")[:1000]):
                counts[kind] += 1
                break
    kind = max(counts, key=lambda kind: counts[kind])
    return kind if 2 * counts[kind] > total else None
