"""The socket options of one TOML table, by key: kinds and ranges of values.

What they mean for a rule, and which rules can have them, is checked in ``option_checks``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from forwarder.config.model import Sides
from forwarder.config.raw import Placed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forwarder.config.raw import OptionValue, RawOptions
    from forwarder.config.toml_table import Table

# The kernel's own bounds, include/net/tcp.h.
_MOST_KEEPALIVE_S: Final = 32767
_MOST_KEEPALIVE_PROBES: Final = 127
_MOST_USER_TIMEOUT_S: Final = (1 << 31) // 1000  # milliseconds in an int
# Arbitrary; catches a buffer size in the wrong place.
_MOST_BACKLOG: Final = 1 << 20
# Below the least the kernel would raise it; above the most its double is no int (socket(7)).
_BUFFER_BYTES: Final = (4096, (1 << 30) - 1)
_MOST_MARK: Final = (1 << 32) - 1
_MOST_DSCP: Final = 63
# RFC 2474, RFC 2597, RFC 3246, RFC 5865, RFC 8622; by the names that tc(8) and others use.
_DSCP_NAMES: Final = {
    **{f"cs{i}": 8 * i for i in range(8)},
    **{f"af{i}{j}": 8 * i + 2 * j for i in range(1, 5) for j in range(1, 4)},
    "ef": 46,
    "va": 44,
    "le": 1,
}
# IFNAMSIZ and TCP_CA_NAME_MAX are 16, with the NUL at the end.
_DEVICE: Final = re.compile(r"(?!\.{1,2}$)[^\s/:]{1,15}")
_CONGESTION: Final = re.compile(r"[a-z0-9_-]{1,15}")


def read_options(table: Table, keys: Sequence[str]) -> RawOptions:
    """The options among ``keys`` that a table has, as far as they are right."""
    found = {key: _READERS[key](table, key) for key in keys if key in table}
    return {key: placed for key, placed in found.items() if placed is not None}


def _flag(table: Table, key: str) -> Placed[OptionValue] | None:
    flag = table.flag(key)
    return Placed(flag.value, flag.place) if flag else None


def _number(table: Table, key: str, least: int, most: int) -> Placed[OptionValue] | None:
    number = table.number(key, least, most)
    return Placed(number.value, number.place) if number else None


def _sides(table: Table, key: str) -> Placed[OptionValue] | None:
    sides = table.choice(key, Sides)
    return Placed(sides, table.place(key)) if sides else None


def _seconds(table: Table, key: str) -> Placed[OptionValue] | None:
    """Whole seconds, as the kernel counts them here."""
    duration = table.duration(key)
    if duration is None:
        return None
    if duration.value.is_integer() and 1 <= duration.value <= _MOST_KEEPALIVE_S:
        return Placed(int(duration.value), duration.place)
    table.bad(key, f"whole seconds from 1 to {_MOST_KEEPALIVE_S}")
    return None


def _milliseconds(table: Table, key: str) -> Placed[OptionValue] | None:
    duration = table.duration(key)
    if duration is None:
        return None
    if 0.001 <= duration.value <= _MOST_USER_TIMEOUT_S:
        return Placed(round(duration.value * 1000), duration.place)
    hint = "leave it out for the kernel's" if duration.value == 0 else ""
    table.bad(key, 'a duration from "1ms" to "24d"', hint)
    return None


def _matching(
    table: Table, key: str, pattern: re.Pattern[str], allowed: str
) -> Placed[OptionValue] | None:
    text = table.text(key, allowed)
    if text is None:
        return None
    if pattern.fullmatch(text.value):
        return Placed(text.value, text.place)
    table.bad(key, allowed)
    return None


def _congestion(table: Table, key: str) -> Placed[OptionValue] | None:
    return _matching(table, key, _CONGESTION, 'the name of an algorithm, such as "bbr"')


def _device(table: Table, key: str) -> Placed[OptionValue] | None:
    allowed = 'the name of a network device, 1 to 15 characters, such as "eth0"'
    return _matching(table, key, _DEVICE, allowed)


def _dscp(table: Table, key: str) -> Placed[OptionValue] | None:
    value = table.get(key)
    if isinstance(value, str) and value.lower() in _DSCP_NAMES:
        return Placed(_DSCP_NAMES[value.lower()], table.place(key))
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_DSCP:
        return Placed(value, table.place(key))
    table.bad(key, f'a number from 0 to {_MOST_DSCP}, or a name: "ef", "cs0" to "cs7", "af11" ...')
    return None


_READERS: Final = {
    "backlog": lambda table, key: _number(table, key, 1, _MOST_BACKLOG),
    "congestion": _congestion,
    "device": _device,
    "dscp": _dscp,
    "fast_open": _sides,
    "fast_open_queue": lambda table, key: _number(table, key, 1, _MOST_BACKLOG),
    "keepalive": _flag,
    "keepalive_count": lambda table, key: _number(table, key, 1, _MOST_KEEPALIVE_PROBES),
    "keepalive_idle": _seconds,
    "keepalive_interval": _seconds,
    "mark": lambda table, key: _number(table, key, 0, _MOST_MARK),
    "mptcp": _sides,
    "nodelay": _flag,
    "rcvbuf": lambda table, key: _number(table, key, *_BUFFER_BYTES),
    "sndbuf": lambda table, key: _number(table, key, *_BUFFER_BYTES),
    "transparent": _flag,
    "upstream_device": _device,
    "upstream_mark": lambda table, key: _number(table, key, 0, _MOST_MARK),
    "user_timeout": _milliseconds,
}
OPTION_KEYS: Final = tuple(_READERS)
DEFAULT_KEYS: Final = (
    "backlog",
    "keepalive",
    "keepalive_count",
    "keepalive_idle",
    "keepalive_interval",
    "nodelay",
    "user_timeout",
)
"""Those that may stand at the top, as defaults of all rules."""
