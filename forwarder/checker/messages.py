"""The messages between the master and its checker, beside those about names.

Master to checker: CHECKS (all groups, from now on), BOARD (that of a worker, which it may read),
GONE (a worker is). Checker to master: KNOWN (it writes of no servers but those of that CHECKS),
NEWS (what has become of servers).

The groups travel pickled, from the master to its own forked child, never the other way: see
``ipc.messages``.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from forwarder.checker.standing import What
from forwarder.ipc.channel import MAX_MESSAGE_BYTES, from_memory_file, to_memory_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from forwarder.config.model import Group, SocketOptions, Upstream
    from forwarder.ipc.channel import Message, Received

CHECKS, BOARD, GONE, KNOWN, NEWS = "checks", "board", "gone", "known", "news"

# Of a reason, in a message. More than any line has room for.
_MOST_WHY: Final = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A group, as far as the checker has to know it.

    ``servers`` come with their seats. ``options`` and ``source`` are those of a rule of the group,
    so that checks take the way that its sessions take; ``is_udp``: these use UDP.
    """

    name: str
    group: Group
    servers: tuple[tuple[Upstream, int], ...]
    options: SocketOptions
    source: str | None
    is_udp: bool


class News(NamedTuple):
    """What has become of a server, and why; ``at`` in monotonic seconds, see ``standing.Event``."""

    what: What
    group: str
    server: str
    why: str
    after: int
    at: float


def checks_file(groups: tuple[Checked, ...]) -> int:
    """All groups, for a CHECKS message: a memory file, whose descriptor is the caller's.

    Raises OSError.
    """
    return to_memory_file(pickle.dumps(groups))


def read_checks(received: Received) -> tuple[Checked, ...]:
    """The groups of a CHECKS message."""
    content = pickle.loads(from_memory_file(received.fds.pop()))  # noqa: S301 - see above
    if not isinstance(content, tuple):
        raise TypeError("no groups")
    return content


def say_news(news: Iterable[News]) -> Iterator[Message]:
    """News in pieces that fit into the channel."""
    part: list[News] = []
    size = 0
    for one in news:
        short = one._replace(why=one.why[:_MOST_WHY])
        length = len(json.dumps(short))
        if part and size + length > MAX_MESSAGE_BYTES // 2:
            yield {"op": NEWS, "events": part}
            part, size = [], 0
        part.append(short)
        size += length
    if part:
        yield {"op": NEWS, "events": part}


def read_news(message: Message) -> list[News]:
    """The news in a message. Raises KeyError, TypeError or ValueError for nonsense."""
    events = message["events"]
    if not isinstance(events, list):
        raise TypeError("no news")
    return [_read(*event) for event in events]


def _read(what: object, group: object, server: object, why: object, *rest: object) -> News:
    after, at = rest
    if not (isinstance(why, str) and isinstance(after, int) and isinstance(at, int | float)):
        raise TypeError("no news of a server")
    return News(What(str(what)), str(group), str(server), why, after, at)
