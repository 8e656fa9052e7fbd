"""Readers of single values out of a TOML table: what each may be, and the error if it is not.

Which keys they are for is in ``keys``; what values mean together is checked in ``resolve``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

from forwarder.config.address import AddressError, parse_host
from forwarder.config.model import MAX_WORKERS, BindPolicy, Sides
from forwarder.config.raw import Placed
from forwarder.config.toml_table import describe

if TYPE_CHECKING:
    from collections.abc import Callable
    from enum import Enum

    from forwarder.config.raw import Value
    from forwarder.config.toml_table import Table

# A worker gives a sign of life every second.
_MIN_HANG_TIMEOUT_S: Final = 3.0
# The kernel's own bounds, include/net/tcp.h.
_MOST_KEEPALIVE_S: Final = 32767
_MOST_USER_TIMEOUT_S: Final = (1 << 31) // 1000  # milliseconds in an int
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
_MODE: Final = re.compile(r"0?[0-7]{3}")

V = TypeVar("V")

Reader: TypeAlias = "Callable[[Table, str], Placed[Value] | None]"
"""Takes a key that the table has; returns None if its value is wrong, once that is reported."""


def number(least: int, most: int) -> Reader:
    """A whole number within bounds."""
    return lambda table, key: table.number(key, least, most)


def choice(choices: type[Enum]) -> Reader:
    """One of the values of an enumeration."""
    return lambda table, key: table.choice(key, choices)


def quantity(
    parse: Callable[[object], V], allowed: str
) -> Callable[[Table, str], Placed[V] | None]:
    """What ``parse`` takes, which raises ValueError; ``allowed`` says what that is."""

    def read(table: Table, key: str) -> Placed[V] | None:
        value = table.get(key)
        try:
            return Placed(parse(value), table.place(key))
        except ValueError as error:
            what = f"{key}: {describe(value)} {error}"
            table.issues.error(table.place(key), what, allowed=allowed)
            return None

    return read


def text(table: Table, key: str) -> Placed[str] | None:
    """Any text."""
    return table.text(key)


def flag(table: Table, key: str) -> Placed[bool] | None:
    """True or false."""
    return table.flag(key)


def duration(table: Table, key: str) -> Placed[float] | None:
    """Seconds."""
    return table.duration(key)


def sides(table: Table, key: str) -> Placed[Sides] | None:
    """On which sides of a rule."""
    return table.choice(key, Sides)


def whole_seconds(table: Table, key: str) -> Placed[int] | None:
    """Whole seconds, as the kernel counts them here."""
    found = table.duration(key)
    if found is None:
        return None
    if found.value.is_integer() and 1 <= found.value <= _MOST_KEEPALIVE_S:
        return Placed(int(found.value), found.place)
    table.bad(key, f"whole seconds from 1 to {_MOST_KEEPALIVE_S}")
    return None


def milliseconds(table: Table, key: str) -> Placed[int] | None:
    """A duration that the kernel counts in milliseconds."""
    found = table.duration(key)
    if found is None:
        return None
    if 0.001 <= found.value <= _MOST_USER_TIMEOUT_S:
        return Placed(round(found.value * 1000), found.place)
    hint = "leave it out for the kernel's" if found.value == 0 else ""
    table.bad(key, 'a duration from "1ms" to "24d"', hint)
    return None


def _matching(table: Table, key: str, pattern: re.Pattern[str], allowed: str) -> Placed[str] | None:
    found = table.text(key, allowed)
    if found is None or pattern.fullmatch(found.value):
        return found
    table.bad(key, allowed)
    return None


def congestion(table: Table, key: str) -> Placed[str] | None:
    """The name of an algorithm for congestion control."""
    return _matching(table, key, _CONGESTION, 'the name of an algorithm, such as "bbr"')


def device(table: Table, key: str) -> Placed[str] | None:
    """The name of a network device."""
    allowed = 'the name of a network device, 1 to 15 characters, such as "eth0"'
    return _matching(table, key, _DEVICE, allowed)


def dscp(table: Table, key: str) -> Placed[int] | None:
    """A class of service, by number or by name."""
    value = table.get(key)
    if isinstance(value, str) and value.lower() in _DSCP_NAMES:
        return Placed(_DSCP_NAMES[value.lower()], table.place(key))
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_DSCP:
        return Placed(value, table.place(key))
    table.bad(key, f'a number from 0 to {_MOST_DSCP}, or a name: "ef", "cs0" to "cs7", "af11" ...')
    return None


def host(table: Table, key: str) -> Placed[str] | None:
    """A host without a port."""
    allowed = "an IPv4 or IPv6 address or a host name, without a port"
    found = table.text(key, allowed)
    if found is None:
        return None
    if found.value == "*" and key != "bind_address":
        what = f"{key} is '*', which can only be listened on"
        table.issues.error(found.place, what, allowed=allowed)
        return None
    try:
        return Placed(parse_host(found.value), found.place)
    except AddressError as error:
        table.issues.error(found.place, f"{key}: {error}", allowed=allowed)
    return None


def permissions(table: Table, key: str) -> Placed[int] | None:
    """Permissions, which are a text: TOML does not show whether a number was octal."""
    value = table.get(key)
    if isinstance(value, str) and _MODE.fullmatch(value):
        return Placed(int(value, 8), table.place(key))
    hint = "write it in quotes" if isinstance(value, int) else ""
    table.bad(key, 'permissions as octal digits, "0000" to "0777", such as "0660"', hint)
    return None


def is_retry(table: Table, key: str) -> Placed[bool] | None:
    """Whether a rule may wait for its address."""
    found = table.choice(key, BindPolicy)
    return Placed(found.value is BindPolicy.RETRY, found.place) if found else None


def hang_timeout(table: Table, key: str) -> Placed[float] | None:
    """Seconds; fewer than a few of a worker's signs of life would kill healthy ones."""
    found = table.duration(key)
    if found is not None and found.value < _MIN_HANG_TIMEOUT_S:
        table.bad(key, f"at least {_MIN_HANG_TIMEOUT_S:.0f} seconds")
    return found


def workers(table: Table, key: str) -> Placed[int] | None:
    """How many workers; 0 for "auto"."""
    value = table.get(key)
    if value == "auto":
        return Placed(0, table.place(key))
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_WORKERS:
        return Placed(value, table.place(key))
    hint = 'write "auto" for one per CPU' if value == 0 else ""
    table.bad(key, f'"auto" or a number from 1 to {MAX_WORKERS}', hint)
    return None
