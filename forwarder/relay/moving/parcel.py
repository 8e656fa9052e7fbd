"""What one session is, beside its descriptors, when it leaves its worker: a value. Pure.

An old and a new version of this program exchange these. So what is missing has a default, and what
is not known is ignored; times are those of CLOCK_MONOTONIC, which all processes share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

if TYPE_CHECKING:
    from forwarder.net.sockets import SockAddr

Json: TypeAlias = Mapping[str, object]
_Value = TypeVar("_Value", bool, int, float, str)

# What ``Way.waiting`` may be: data in a pipe, both of whose ends travel, or in a memory file.
PIPE: Final = "pipe"
FILE: Final = "file"
_DESCRIPTORS: Final = {"": 0, FILE: 1, PIPE: 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One direction of a session: ``moved`` bytes were read from its source.

    ``is_done``: nothing follows. ``is_sink``: what is read is dropped, as its destination is gone.
    ``can_splice``: splice(2) has not been found not to do. ``waiting``: where the data is that was
    read, and not sent yet.
    """

    moved: int = 0
    is_done: bool = False
    is_sink: bool = False
    can_splice: bool = True
    waiting: str = ""

    @property
    def descriptors(self) -> int:
        """How many it has beside those of the session."""
        return _DESCRIPTORS[self.waiting]

    def as_json(self) -> dict[str, object]:
        """What is not the default."""
        return {key: value for key in _WAY if (value := getattr(self, key)) != _WAY[key]}

    @classmethod
    def from_json(cls, content: object) -> Way:
        """The same again. Raises ValueError for nonsense."""
        given = _mapping(content)
        way = cls(
            moved=read(given, "moved", 0),
            is_done=read(given, "is_done", False),
            is_sink=read(given, "is_sink", False),
            can_splice=read(given, "can_splice", True),
            waiting=read(given, "waiting", ""),
        )
        if way.moved < 0 or way.waiting not in _DESCRIPTORS:
            raise ValueError("not a direction")
        return way


_WAY: Final[dict[str, object]] = {
    "moved": 0,
    "is_done": False,
    "is_sink": False,
    "can_splice": True,
    "waiting": "",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerShare:
    """The server of a session. ``row`` is that of its counts, in the instance it comes from.

    ``is_counted``: it is held there for this session at the gate.
    """

    name: str
    row: int
    is_counted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """A session. ``kind`` says who can make it one again; ``more`` is what only that kind has.

    ``terms``: which of the terms of its consignment are its rule's; ``offset``: its port behind the
    first one of the rule. ``id`` is that of its birth, see ``Session``. ``held_as``: by the gate of
    the instance it comes from; None: not at all. ``deadline`` 0 is none. ``cut_at``: when it will
    be reset, as its rule is gone; ``due_at``: when its timer looks at it; 0 is never. ``ending``:
    who, phase, detail and whether by reset, of a session of which one side is gone.

    Its descriptors: client, upstream, those of the data that waits in ``c2u``, and in ``u2c``; then
    what ``more`` says.
    """

    kind: str
    id: int
    terms: int
    client: SockAddr
    state: str
    offset: int = 0
    family: int = 0
    target: SockAddr | None = None
    started_at: float = 0.0
    connected_at: float = 0.0
    active_at: float = 0.0
    deadline: float = 0.0
    held_as: int | None = None
    server: ServerShare | None = None
    cut_at: float = 0.0
    due_at: float = 0.0
    adoptions: int = 0
    ending: tuple[str, str, str, bool] | None = None
    unsent: int = 0
    c2u: Way = Way()
    u2c: Way = Way()
    more: Json = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """What is not the default."""
        content: dict[str, object] = {
            key: getattr(self, key) for key in ("kind", "id", "terms", "client", "state")
        }
        content |= {key: value for key in _PLAIN if (value := getattr(self, key)) != _PLAIN[key]}
        if self.deadline == math.inf:
            content["deadline"] = None
        for key in ("target", "held_as", "ending"):
            value = getattr(self, key)
            if value is not None:
                content[key] = value
        if self.server is not None:
            content["server"] = [self.server.name, self.server.row, self.server.is_counted]
        content["c2u"] = self.c2u.as_json()
        content["u2c"] = self.u2c.as_json()
        if self.more:
            content["more"] = self.more
        return content

    @classmethod
    def from_json(cls, content: object) -> Parcel:
        """The same again. Raises ValueError for nonsense."""
        given = _mapping(content)
        held_as = given.get("held_as")
        deadline = given.get("deadline", 0.0)
        parcel = cls(
            kind=read(given, "kind", ""),
            id=read(given, "id", 0),
            terms=read(given, "terms", 0),
            client=read_address(given.get("client")),
            state=read(given, "state", ""),
            offset=read(given, "offset", 0),
            family=read(given, "family", 0),
            target=read_address(given["target"]) if "target" in given else None,
            started_at=read(given, "started_at", 0.0),
            connected_at=read(given, "connected_at", 0.0),
            active_at=read(given, "active_at", 0.0),
            deadline=math.inf if deadline is None else read(given, "deadline", 0.0),
            held_as=None if held_as is None else read(given, "held_as", 0),
            server=_server(given.get("server")),
            cut_at=read(given, "cut_at", 0.0),
            due_at=read(given, "due_at", 0.0),
            adoptions=read(given, "adoptions", 0),
            ending=_ending(given.get("ending")),
            unsent=read(given, "unsent", 0),
            c2u=Way.from_json(given.get("c2u", {})),
            u2c=Way.from_json(given.get("u2c", {})),
            more=_mapping(given.get("more", {})),
        )
        whole = (parcel.id, parcel.terms, parcel.offset, parcel.unsent, parcel.held_as or 0)
        if min(whole) < 0 or max(whole) >= 2**64:
            raise ValueError("not a session")
        return parcel


_PLAIN: Final[dict[str, object]] = {
    "offset": 0,
    "family": 0,
    "started_at": 0.0,
    "connected_at": 0.0,
    "active_at": 0.0,
    "deadline": 0.0,
    "cut_at": 0.0,
    "due_at": 0.0,
    "adoptions": 0,
    "unsent": 0,
}


def read(content: Json, key: str, default: _Value) -> _Value:
    """One value, of the kind of its default. Raises ValueError for another kind."""
    value = content.get(key, default)
    if type(default) is float and type(value) is int:
        value = float(value)
    if type(value) is not type(default) or (type(value) is float and not math.isfinite(value)):
        raise ValueError(f"{key} is not what it should be")
    return value


def _mapping(content: object) -> Json:
    if not isinstance(content, dict):
        raise ValueError("not a session")  # noqa: TRY004 - as all nonsense
    return content


def read_address(content: object) -> SockAddr:
    """A socket address, of which JSON makes a list. Raises ValueError for nonsense."""
    match content:
        case str():
            return content
        case [str(host), int(port)]:
            return host, port
        case [str(host), int(port), int(flow), int(scope)]:
            return host, port, flow, scope
    raise ValueError("not an address")


def _server(content: object) -> ServerShare | None:
    match content:
        case None:
            return None
        case [str(name), int(row), bool(is_counted)]:
            return ServerShare(name=name, row=row, is_counted=is_counted)
    raise ValueError("not a server")


def _ending(content: object) -> tuple[str, str, str, bool] | None:
    match content:
        case None:
            return None
        case [str(who), str(phase), str(detail), bool(is_reset)]:
            return who, phase, detail, is_reset
    raise ValueError("not a reason")
