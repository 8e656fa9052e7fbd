"""Whose configuration a file is: by its name and, where two share that, by its words."""

from __future__ import annotations

import re
from enum import Enum
from typing import TYPE_CHECKING, Final

from forwarder.migrate.uv_words import CONF_WORDS

if TYPE_CHECKING:
    from pathlib import PurePath


class Kind(Enum):
    """A program and its format."""

    RINETD = "rinetd"
    UV_CONF = "rinetd-uv"
    UV_YAML = "rinetd-uv-yaml"
    OXIDINETD = "oxidinetd"


# What rinetd 0.73 refuses: unix sockets, and options of a rule.
_UV_RULE: Final = re.compile(
    r"^[^#]*(?:\bunix:[@/]|\[[^#\]]*\b(?:keepalive|dns-refresh|connect-timeout|mode)[ \t]*=)"
)


def guess(name: PurePath, text: str) -> Kind:
    """The kind of a file; rinetd's own if nothing indicates another."""
    if name.suffix in {".yaml", ".yml"}:
        return Kind.UV_YAML
    if name.suffix == ".toml":
        return Kind.OXIDINETD
    for line in text.split("\n"):
        words = line.split(maxsplit=1)
        if words and (words[0] in CONF_WORDS or _UV_RULE.match(line)):
            return Kind.UV_CONF
    return Kind.RINETD
