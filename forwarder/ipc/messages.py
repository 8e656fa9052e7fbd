"""The messages between the master and its workers.

Master to worker: SOCKETS (listening sockets, by id), APPLY (which of them serve which rule, from
now on), LOGS (where the connection log goes), NAMES (their addresses, see ``upstream.messages``),
DRAIN, STOP, LIST and KILL (some of its sessions), ACCESS (the access rules of an heir). Worker to
master: APPLIED, LEAVING, REFRESH (look a name up soon), FAILING (addresses of upstreams that do),
and ANSWER to LIST or KILL; TERMS (of a rule), for ``deposit``. How sessions go from one worker to
another (MOVE, PARCELS, TAKEN, MOVED): ``consignment``. A worker that starts, one that gets a new
configuration and one that takes over another's sockets do the same: apply an assignment. One that
cannot answers with a ``refusal`` in APPLIED, and goes on as before. For messages between masters
see ``lineage``.

The assignment travels pickled, from the master to its own forked child, never the other way: a
worker may run with fewer rights than the master and must not be able to make it run anything.
"""

from __future__ import annotations

import json
import os
import pickle
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from forwarder.config.model import AccessRule, LogFormat, Verdict
from forwarder.errors import Place
from forwarder.ipc.channel import (
    MAX_FDS,
    MAX_MESSAGE_BYTES,
    from_memory_file,
    to_memory_file,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from forwarder.config.model import Config, LogPlace
    from forwarder.ipc.channel import Channel, Received

# About 300 bytes for each session of the longest list.
MAX_ANSWER_BYTES: Final = 16 * 1024 * 1024
# What fits into a message, with room for the rest of it.
MAX_SHORT_BYTES: Final = MAX_MESSAGE_BYTES // 2


class Op(StrEnum):
    """Kinds of message."""

    SOCKETS = "sockets"
    APPLY = "apply"
    DRAIN = "drain"
    STOP = "stop"
    APPLIED = "applied"
    LEAVING = "leaving"
    LOGS = "logs"
    LIST = "list"
    KILL = "kill"
    ANSWER = "answer"
    FAILING = "failing"
    NAMES = "names"
    REFRESH = "refresh"
    ACCESS = "access"
    DRAINS = "drains"
    MOVE = "move"
    PARCELS = "parcels"
    TAKEN = "taken"
    MOVED = "moved"
    TERMS = "terms"


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What a worker has to do: accept on these sockets for these rules, and on no others.

    ``routes`` maps the id of a listening socket to an index into ``config.rules``.
    ``rows`` are the rows of the board that count the rules, in the order of the rules.
    ``seats`` are, for each rule, the rows that count its upstreams, in their order, and last that
    of its group; nothing for a rule that has nothing to choose.
    ``workers`` is the number of workers, ``pipe_budget_pages`` this one's share of the kernel's
    pipe memory.
    ``serial`` grows with every assignment of a master; the worker acknowledges it.
    """

    serial: int
    generation: int
    config: Config
    routes: Mapping[int, int]
    rows: tuple[int, ...]
    seats: tuple[tuple[int, ...], ...]
    workers: int
    pipe_budget_pages: int


def send_sockets(channel: Channel, sockets: Mapping[int, int]) -> None:
    """Send listening sockets: id to descriptor. They stay the sender's, open until sent."""
    ids = list(sockets)
    for start in range(0, len(ids), MAX_FDS):
        part = ids[start : start + MAX_FDS]
        channel.send({"op": Op.SOCKETS, "ids": part}, [sockets[i] for i in part])


def send_assignment(channel: Channel, assignment: Assignment) -> None:
    """Send an assignment; the sockets it names were sent before."""
    channel.send({"op": Op.APPLY}, [to_memory_file(pickle.dumps(assignment))], gives=True)


def read_assignment(received: Received) -> Assignment:
    """The assignment of an APPLY message."""
    fd = received.fds.pop()
    assignment = pickle.loads(from_memory_file(fd))  # noqa: S301 - from our own master: see above
    if not isinstance(assignment, Assignment):
        raise TypeError("not an assignment")
    return assignment


def send_answer(channel: Channel, number: object, answer: object) -> None:
    """Answer a question of the master; a long answer travels in a memory file.

    If descriptors have run out, null is sent, which stands for no answer.
    """
    content = json.dumps(answer).encode()
    message: dict[str, object] = {"op": Op.ANSWER, "number": number, "answer": None}
    files = []
    if len(content) <= MAX_SHORT_BYTES:
        message["answer"] = answer
    else:
        with suppress(OSError):
            files.append(to_memory_file(content))
    channel.send(message, files, gives=True)


def read_answer(received: Received) -> object:
    """The answer in an ANSWER message; None if it is none. Raises ValueError for nonsense."""
    if not received.fds:  # short, or we had no descriptor for it
        return received.message["answer"]
    return json.loads(from_memory_file(received.fds.pop(0), MAX_ANSWER_BYTES))


def access_file(config: Config) -> int:
    """The access rules, as JSON in a memory file, whose descriptor becomes the caller's.

    Workers of older code read it, so it holds nothing but text. Raises OSError.
    """
    content = {
        "all": _access_texts(config.access),
        "rules": {rule.name: _access_texts(rule.access) for rule in config.rules},
    }
    return to_memory_file(json.dumps(content).encode())


def _access_texts(rules: Iterable[AccessRule]) -> list[tuple[str, str]]:
    return [(rule.verdict.value, rule.pattern) for rule in rules]


def send_access(channel: Channel, fd: int) -> None:
    """Send an access file; the descriptor stays the sender's. Raises OSError."""
    channel.send({"op": Op.ACCESS}, [os.dup(fd)], gives=True)


def read_access(fd: int) -> tuple[list[AccessRule], dict[str, list[AccessRule]]]:
    """The access rules for all rules and those of each, from an access file. Closes the file.

    Raises ValueError for nonsense.
    """
    content = json.loads(from_memory_file(fd, MAX_ANSWER_BYTES))
    return _access_rules(content["all"]), {
        name: _access_rules(texts) for name, texts in content["rules"].items()
    }


def _access_rules(texts: Iterable[tuple[str, str]]) -> list[AccessRule]:
    place = Place("upgrade")
    return [
        AccessRule(verdict=Verdict(verdict), pattern=pattern, place=place)
        for verdict, pattern in texts
    ]


def send_logs(channel: Channel, places: Sequence[tuple[LogPlace, int | None]]) -> None:
    """Send the places of the connection log; the descriptors stay the sender's. Raises OSError."""
    described = [[place.format.value, place.to, fd is not None] for place, fd in places]
    fds: list[int] = []
    try:
        for _, fd in places:
            if fd is not None:
                fds.append(os.dup(fd))
    except OSError:
        for fd in fds:
            os.close(fd)
        raise
    channel.send({"op": Op.LOGS, "places": described}, fds, gives=True)


def read_logs(received: Received) -> list[tuple[LogFormat, str, int | None]]:
    """The places in a LOGS message: format, name, and a descriptor that becomes the caller's."""
    fds = iter(received.fds)
    places = received.message["places"]
    assert isinstance(places, list)  # noqa: S101 - our own master wrote it
    return [(LogFormat(how), name, next(fds) if has_fd else None) for how, name, has_fd in places]
