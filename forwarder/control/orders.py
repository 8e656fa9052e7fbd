"""What operators have ordered of servers: what an order means, and as text. Pure.

An order belongs to a server by its name, that is its group and its end as configured, not to a rule
or a seat. So it outlives whatever it is about: a reload, an upgrade, a server that is taken out of
the configuration and comes back.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final, TypeAlias

from forwarder.balancing.table import CUTS, DISABLED, DRAINS, HAS_ORDER, HAS_WEIGHT
from forwarder.config.model import MAX_WEIGHT

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

Server: TypeAlias = tuple[str, str]
"""The name of a group, and that of a server of it."""

# Orders at once. Each is given by a person; arbitrary, so that no script fills memory.
MOST_ORDERS: Final = 10_000
_VERSION: Final = 1
_MOST_NAMED: Final = 10  # in a message
_MOST_CHARACTERS: Final = 512  # of a name in a file; that of a server has 255 at most
_MOST_TIME_S: Final = 1e11  # the year 5138


class Action(Enum):
    """What an operator may order. ENABLE takes back all others."""

    DRAIN = "drain"
    DISABLE = "disable"
    ENABLE = "enable"
    WEIGHT = "weight"


class Stay(Enum):
    """Whether a server gets new sessions: as configured; no; no, and it is not checked either."""

    USED = ""
    DRAINED = "drain"
    DISABLED = "disable"


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What was ordered of one server, by whom, and when (seconds since 1970).

    ``cuts``: its sessions are reset as well. ``weight`` None is as configured.
    """

    stay: Stay = Stay.USED
    cuts: bool = False
    weight: int | None = None
    by: str = ""
    at: float = 0.0

    @property
    def word(self) -> int:
        """What the table of servers has for this; 0 for nothing but as configured."""
        word = 0
        if self.stay is not Stay.USED:
            word |= DRAINS | (DISABLED if self.stay is Stay.DISABLED else 0)
            word |= CUTS if self.cuts else 0
        if self.weight is not None:
            word |= HAS_WEIGHT | self.weight
        return word | HAS_ORDER if word else 0

    @property
    def is_out(self) -> bool:
        """Whether the server gets no new session at all."""
        return self.stay is not Stay.USED

    @property
    def is_void(self) -> bool:
        """Whether it orders nothing."""
        return not self.word

    def is_like(self, other: Order | None) -> bool:
        """Whether both order the same, whoever did."""
        return self.word == (0 if other is None else other.word)

    def as_json(self) -> dict[str, object]:
        """As in the status and in files."""
        return {
            "what": self.stay.value or "weight",
            "reset": self.cuts,
            "weight": self.weight,
            "by": self.by,
            "at": round(self.at, 3),
        }


def follow(
    before: Order | None, action: Action, *, cuts: bool, weight: int | None, by: str, at: float
) -> Order:
    """The order that results when one follows another.

    DRAIN and DISABLE replace each other, and whether sessions are cut; a weight stays. WEIGHT
    leaves a drained server drained. ENABLE leaves nothing. What orders the same as before keeps its
    author.
    """
    known = before or Order()
    match action:
        case Action.ENABLE:
            order = Order(by=by, at=at)
        case Action.WEIGHT:
            order = Order(stay=known.stay, cuts=known.cuts, weight=weight, by=by, at=at)
        case Action.DRAIN | Action.DISABLE:
            stay = Stay(action.value)
            order = Order(stay=stay, cuts=cuts, weight=known.weight, by=by, at=at)
    return before if before is not None and order.is_like(before) else order


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What one operator asks for: an order for some servers of a group.

    ``servers`` as the operator writes them, see :func:`find`. ``weight`` belongs to WEIGHT.
    ``login`` is who the operator is by his own account, or "".
    """

    action: Action
    group: str
    servers: tuple[str, ...]
    cuts: bool = False
    weight: int | None = None
    login: str = ""


class NonsenseError(ValueError):
    """A text has no orders; the message names the place and what is wrong there."""


class Orders:
    """All orders in force, by server."""

    def __init__(self) -> None:
        self.given: dict[Server, Order] = {}

    def word(self, server: Server) -> int:
        """What the table of servers has to have for a server."""
        order = self.given.get(server)
        return 0 if order is None else order.word

    def put(self, server: Server, order: Order) -> bool:
        """Put an order in force, or the last one out of it. Returns whether that is a change."""
        before = self.given.get(server)
        if order.is_like(before):
            return False
        if order.is_void:
            del self.given[server]
        else:
            self.given[server] = order
        return True

    def take(self, given: Mapping[Server, Order]) -> None:
        """Put orders in force in place of all others."""
        self.given = dict(given)

    def as_json(self) -> list[dict[str, object]]:
        """All of them, see :func:`read_json`."""
        return [
            {"group": group, "server": server, **order.as_json()}
            for (group, server), order in sorted(self.given.items())
        ]

    def as_text(self) -> bytes:
        """All of them as a file, see :func:`read_text`."""
        content = {"version": _VERSION, "orders": self.as_json()}
        return json.dumps(content, indent=1).encode() + b"\n"


def read_text(text: bytes) -> dict[Server, Order]:
    """What :meth:`Orders.as_text` has written.

    Raises NonsenseError.
    """
    try:
        found = json.loads(text)
    except UnicodeDecodeError as err:
        raise NonsenseError(f"byte {err.start + 1}: not UTF-8") from err
    except json.JSONDecodeError as err:
        raise NonsenseError(f"line {err.lineno}, column {err.colno}: {err.msg}") from err
    except RecursionError as err:
        raise NonsenseError("nested too deeply") from err
    if not isinstance(found, dict) or found.get("version") != _VERSION:
        raise NonsenseError(f'not an object with "version": {_VERSION}')
    return read_json(found.get("orders"))


def read_json(listed: object) -> dict[Server, Order]:
    """What :meth:`Orders.as_json` has made. Raises NonsenseError."""
    if not isinstance(listed, list) or len(listed) > MOST_ORDERS:
        raise NonsenseError(f"orders: not a list of at most {MOST_ORDERS}")
    orders: dict[Server, Order] = {}
    for index, one in enumerate(listed):
        server, order = _read_one(one, f"orders[{index}]")
        if server in orders:
            raise NonsenseError(
                f"orders[{index}]: another order for {server[1]!r} of {server[0]!r}"
            )
        orders[server] = order
    return orders


def _read_one(found: object, place: str) -> tuple[Server, Order]:
    if not isinstance(found, dict):
        raise NonsenseError(f"{place}: not an object")
    names = []
    for key in ("group", "server", "by"):
        name = found.get(key)
        if not isinstance(name, str) or not name.isprintable() or len(name) > _MOST_CHARACTERS:
            raise NonsenseError(
                f"{place}.{key}: not a text of at most {_MOST_CHARACTERS} characters"
            )
        names.append(name)
    group, server, by = names
    what, resets, weight, at = (found.get(key) for key in ("what", "reset", "weight", "at"))
    if what not in ("drain", "disable", "weight"):
        raise NonsenseError(f"{place}.what: {_shown(what)} is none of drain, disable, weight")
    if not isinstance(resets, bool):
        raise NonsenseError(f"{place}.reset: {_shown(resets)} is neither true nor false")
    if weight is not None and not is_weight(weight):
        raise NonsenseError(f"{place}.weight: {_shown(weight)} is no number from 0 to {MAX_WEIGHT}")
    if not isinstance(at, int | float) or isinstance(at, bool) or not 0 <= at < _MOST_TIME_S:
        raise NonsenseError(f"{place}.at: {_shown(at)} is no time in seconds since 1970")
    stay = Stay.USED if what == "weight" else Stay(what)
    order = Order(
        stay=stay,
        cuts=resets and stay is not Stay.USED,
        weight=weight if isinstance(weight, int) else None,
        by=by,
        at=float(at),
    )
    if order.is_void:
        raise NonsenseError(f"{place}: what is weight, and there is none")
    return (group, server), order


def is_weight(value: object) -> bool:
    """Whether it is a weight that a server may have."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_WEIGHT


def _shown(value: object) -> str:
    return repr(value)[:40]


# -- which servers are meant


def find(word: str, known: Collection[str]) -> list[str]:
    """The servers that a word may mean: that of this name, else of this host, else with this part.

    A part ends where a word ends: 10.0.0.1 is none of 10.0.0.12. More than one is ambiguous.
    """
    if word in known:
        return [word]
    of_host = [name for name in known if host_of(name) == word]
    # A word that begins or ends with a sign ends there by itself.
    part = re.compile(rf"(?:(?<!\w)|(?!\w)){re.escape(word)}(?:(?!\w)|(?<!\w))")
    return of_host or [name for name in known if part.search(name)]


def host_of(server: str) -> str:
    """The host of a server's name, without brackets; a name without a port is its own."""
    host, colon, _ = server.rpartition(":")
    return host.strip("[]") if colon else server


def listed(names: Collection[str]) -> str:
    """Names for people, the first few."""
    shown = list(names)[:_MOST_NAMED]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
