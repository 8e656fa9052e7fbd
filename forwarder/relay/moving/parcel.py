"""What one session is, beside its descriptors, when it leaves its worker: a value. Pure.

An old and a new version of this program exchange these. So what is missing has a default, and what
is not known is ignored; times are those of CLOCK_MONOTONIC, which all processes share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

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
        return _written(self, _WAY)

    @classmethod
    def from_json(cls, content: object) -> Way:
        """The same again. Raises ValueError for nonsense."""
        return cls(**_read(content, _WAY_READERS))


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
        content = _written(self, _PARCEL)
        if self.deadline == math.inf:
            content["deadline"] = None
        if self.server is not None:
            content["server"] = [self.server.name, self.server.row, self.server.is_counted]
        for key, way in (("c2u", self.c2u), ("u2c", self.u2c)):
            if key in content:
                content[key] = way.as_json()
        return content

    @classmethod
    def from_json(cls, content: object) -> Parcel:
        """The same again. Raises ValueError for nonsense."""
        given = _read(content, _PARCEL_READERS)
        if not given.keys() >= _NEEDED:
            raise ValueError("not a session")
        return cls(**given)


def _written(value: Parcel | Way, defaults: Mapping[str, object]) -> dict[str, object]:
    return {
        key: one for key, default in defaults.items() if (one := getattr(value, key)) != default
    }


def _defaults(kind: type) -> dict[str, object]:
    """The fields and their defaults; MISSING where there has to be a value."""
    return {
        one.name: {} if one.default_factory is dict else one.default  # the only one that there is
        for one in fields(kind)
    }


_WAY: Final = _defaults(Way)
_PARCEL: Final = _defaults(Parcel)
_NEEDED: Final = {key for key, default in _PARCEL.items() if default is MISSING}


# -- reading what another process has written

_Reader: TypeAlias = Callable[[object], Any]


def _read(content: object, readers: Mapping[str, _Reader]) -> dict[str, Any]:
    """What is there of what we know. Raises ValueError for nonsense."""
    given = _mapping(content)
    return {key: readers[key](value) for key, value in given.items() if key in readers}


def read(content: Json, key: str, default: _Value) -> _Value:
    """One value, of the kind of its default. Raises ValueError for another kind."""
    value = content.get(key, default)
    if type(default) is float:
        value = _time(value)
    if type(value) is not type(default):
        raise ValueError(f"{key} is not what it should be")
    return value


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**64:
        raise ValueError("not a number")
    return value


def _truth(value: object) -> bool:
    if type(value) is not bool:
        raise ValueError("neither true nor false")
    return value


def _text(value: object) -> str:
    if type(value) is not str:
        raise ValueError("not a text")
    return value


def _time(value: object) -> float:
    if type(value) is int and value.bit_length() < 64:
        return float(value)
    if type(value) is not float or not math.isfinite(value):
        raise ValueError("not a time")
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


def _server(content: object) -> ServerShare:
    match content:
        case [str(name), int(row), bool(is_counted)]:
            return ServerShare(name=name, row=row, is_counted=is_counted)
    raise ValueError("not a server")


def _ending(content: object) -> tuple[str, str, str, bool]:
    match content:
        case [str(who), str(phase), str(detail), bool(is_reset)]:
            return who, phase, detail, is_reset
    raise ValueError("not a reason")


def _or_none(reader: _Reader) -> _Reader:
    return lambda value: None if value is None else reader(value)


def _waiting(value: object) -> str:
    where = _text(value)
    if where not in _DESCRIPTORS:
        raise ValueError("not where data waits")
    return where


_WAY_READERS: Final[dict[str, _Reader]] = {
    "moved": _count,
    "is_done": _truth,
    "is_sink": _truth,
    "can_splice": _truth,
    "waiting": _waiting,
}
_PARCEL_READERS: Final[dict[str, _Reader]] = {
    "kind": _text,
    "id": _count,
    "terms": _count,
    "client": read_address,
    "state": _text,
    "offset": _count,
    "family": _count,
    "target": _or_none(read_address),
    "started_at": _time,
    "connected_at": _time,
    "active_at": _time,
    "deadline": lambda value: math.inf if value is None else _time(value),
    "held_as": _or_none(_count),
    "server": _or_none(_server),
    "cut_at": _time,
    "due_at": _time,
    "adoptions": _count,
    "ending": _or_none(_ending),
    "unsent": _count,
    "c2u": Way.from_json,
    "u2c": Way.from_json,
    "more": _mapping,
}
