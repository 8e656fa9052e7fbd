"""How a stream goes to another worker, in any state from RELAYING on.

What has arrived and was not read yet stays in its sockets. The worker that gets it watches them
anew, and the kernel then reports all that is so, be it for the second time: data, room, FIN, reset,
urgent data. So only what was read and not sent has to travel, in the pipe that it waits in or in a
memory file, and what the session knows of itself.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Final

from forwarder.ipc.channel import read_memory_file, to_memory_file
from forwarder.net.pipes import Pipe
from forwarder.relay.moving.kinds import Load, restore, socket_of
from forwarder.relay.moving.parcel import FILE, PIPE, Way, read
from forwarder.relay.poller import ALWAYS, READABLE
from forwarder.relay.session import SessionState
from forwarder.relay.tcp.direction import ALWAYS_COPIES, SPLICES, Direction
from forwarder.relay.tcp.sink import Sink
from forwarder.relay.tcp.splice import SpliceDirection
from forwarder.relay.tcp.stream import Stream
from forwarder.stats.reasons import CloseReason, Phase, Who

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from forwarder.relay.moving.parcel import Parcel
    from forwarder.relay.poller import Poller
    from forwarder.relay.relay import Relay
    from forwarder.upstream.pool import Pool

_MOVABLE: Final = {
    SessionState.RELAYING,
    SessionState.HALF_CLOSED,
    SessionState.LINGERING,
    SessionState.ABORTING,
}
# What waited in a pipe (fs.pipe-max-size) is in memory where there are no pipes.
_MOST_BYTES: Final = 4 * 1024 * 1024


class Streams:
    """See :class:`forwarder.relay.moving.kinds.Kind`."""

    name = "stream"

    def may_move(self, session: Stream) -> bool:
        """One that is connected; another one will be, or ends, within ``connect_timeout``."""
        return session.state in _MOVABLE

    def describe(self, session: Stream) -> Load:
        """Its two sockets, and what waits in either direction."""
        assert session.upstream is not None  # noqa: S101 - it is connected
        fds = [session.client.fileno(), session.upstream.fileno()]
        made: list[int] = []
        fields: dict[str, object] = {"unsent": session.unsent}
        try:
            fields["c2u"] = _describe(session.c2u, fds, made)
            fields["u2c"] = _describe(session.u2c, fds, made)
        except OSError:
            for fd in made:
                os.close(fd)
            raise
        ending = session.ending
        if ending is not None:
            who, phase = ending.who.value, ending.phase.value
            fields["ending"] = (who, phase, ending.detail, ending.is_reset)
        return Load(fields, fds, made)

    def let_go(self, session: Stream) -> None:
        """Take it from poller, meters and pipes."""
        poller = session.relay.poller
        for direction in (session.c2u, session.u2c):
            if isinstance(direction, SpliceDirection) and direction.pipe is not None:
                direction.bench.pipes.pass_on(direction.pipe)
                direction.pipe = None
            direction.stop()
        for sock in (session.client, session.upstream):
            assert sock is not None  # noqa: S101 - as above
            poller.unregister(sock.fileno())
            sock.detach()

    def unpack(self, parcel: Parcel, fds: list[int], pool: Pool, relay: Relay) -> Stream:
        """Make it again, and watch its sockets. Raises OSError or ValueError."""
        if len(fds) != 2 + parcel.c2u.descriptors + parcel.u2c.descriptors:
            raise ValueError("not the descriptors of a stream")
        if SessionState(parcel.state) not in _MOVABLE:
            raise ValueError("not the state of a stream that moves")
        ending = None if parcel.ending is None else _reason(*parcel.ending)
        adopted_at = read(parcel.more, "adopted_at", 0.0)
        socks: list[socket.SocketType] = []
        spent: list[int] = []
        session = None
        try:
            rest = iter(fds[2:])
            waiting = [_waiting(way, rest, spent) for way in (parcel.c2u, parcel.u2c)]
            socks += (socket_of(fd, socket.SOCK_STREAM) for fd in fds[:2])
            session = Stream(relay, pool, socks[0], parcel.client)
            restore(session, parcel)
            session.upstream = session.c2u.dst = session.u2c.src = socks[1]
            session.ending, session.unsent = ending, parcel.unsent
            _set_out(session, parcel)
            _watch(session, relay.poller)
        except BaseException:
            if session is not None:
                relay.sessions.pop(session, None)
                session.unlink()
            for sock in socks:
                sock.detach()
            raise
        session.is_shared = True  # its giver and the master still have it
        relay.deposits.offer(session, parcel.adoptions, adopted_at)
        _go_on(session, waiting)
        for fd in spent:
            os.close(fd)
        return session


def _describe(direction: Direction, fds: list[int], made: list[int]) -> Way:
    """A direction; adds the descriptors of what waits in it. Raises OSError."""
    waiting = ""
    pipe = direction.pipe if isinstance(direction, SpliceDirection) else None
    if pipe is not None:
        waiting = PIPE
        fds += (pipe.read_fd, pipe.write_fd)
    elif direction.pending is not None:
        waiting = FILE
        made.append(to_memory_file(bytes(direction.pending)))
        fds.append(made[-1])
    return Way(
        moved=direction.moved,
        is_done=direction.is_done,
        is_sink=direction.is_sink,
        can_splice=bool(direction.read_on & SPLICES),
        waiting=waiting,
    )


def _reason(who: str, phase: str, detail: str, is_reset: bool) -> CloseReason:  # noqa: FBT001
    """Why it will end. Raises ValueError."""
    try:
        return CloseReason(Who(who), Phase(phase), detail, is_reset=is_reset)
    except KeyError as err:
        raise ValueError("not a reason for an end") from err


def _waiting(way: Way, fds: Iterator[int], spent: list[int]) -> Pipe | bytes | None:
    """What waits in a direction; the file that it is in is ``spent``.

    Raises OSError or ValueError.
    """
    if way.waiting == PIPE:
        return Pipe.with_data(next(fds), next(fds))
    if way.waiting == FILE:
        spent.append(next(fds))
        return read_memory_file(spent[-1], _MOST_BYTES)
    return None


def _set_out(session: Stream, parcel: Parcel) -> None:
    """Let the directions be what they were; those that can go on are open."""
    if _is_unix(session):  # its rule may have other upstreams by now, or none of these
        always = ALWAYS if session.relay.bench.splices else ALWAYS_COPIES
        session.c2u.read_on = session.u2c.read_on = always
    session.c2u = _direction(session.c2u, parcel.c2u)
    session.u2c = _direction(session.u2c, parcel.u2c)


def _is_unix(session: Stream) -> bool:
    socks = (session.client, session.upstream)
    return any(sock is not None and sock.family == socket.AF_UNIX for sock in socks)


def _direction(made: Direction, way: Way) -> Direction:
    """A direction as it was: the one that was made for the session, or a sink in its place."""
    direction = made
    if way.is_sink:
        direction = Sink(made.bench, made.session)
        direction.src, direction.dst, direction.reverse = made.src, made.dst, made.reverse
        direction.reverse.reverse = direction
    direction.moved = direction.counted = way.moved
    if not way.can_splice:
        direction.read_on &= ~SPLICES
    if way.is_done:
        direction.end()
    elif not way.is_sink:
        direction.is_blocked = False
    return direction


def _watch(session: Stream, poller: Poller) -> None:
    """Have the events of both sockets reported, the first of them with care. Raises OSError."""
    first, second = session.c2u, session.u2c
    poller.register(first.src.fileno(), _Arrival(first, poller))
    try:
        poller.register(second.src.fileno(), _Arrival(second, poller))
    except OSError:
        poller.unregister(first.src.fileno())
        raise


def _go_on(session: Stream, waiting: Sequence[Pipe | bytes | None]) -> None:
    """Put what waits into the directions, and let sinks begin. Does not fail."""
    for direction, what in zip((session.c2u, session.u2c), waiting, strict=True):
        if what is not None:
            _put(direction, what)
        if direction.is_sink and not direction.is_done:
            direction.yield_turn(READABLE)


def _put(direction: Direction, what: Pipe | bytes) -> None:
    """Let ``direction`` send this first, when its destination is reported to take it."""
    direction.block()
    if isinstance(what, bytes):
        direction.pending = memoryview(what)
    elif isinstance(direction, SpliceDirection):
        direction.pipe = what
        direction.bench.pipes.take_on(what)
        direction.bench.pipes.note(what, direction.src.fileno())
    else:
        data = bytearray()
        while part := os.read(what.read_fd, what.filled - len(data)):
            data += part
        direction.pending = memoryview(bytes(data))
        what.close()


class _Arrival:
    """Handles the first event of a socket that is watched anew, for its direction.

    The kernel reports again what it has reported before. That is no sign of life: a session does
    not become younger by a move.
    """

    __slots__ = ("_direction", "_poller")

    def __init__(self, direction: Direction, poller: Poller) -> None:
        self._direction = direction
        self._poller = poller

    def on_events(self, mask: int) -> None:
        """Handle them, and leave all further ones to the direction."""
        direction = self._direction
        session, reverse = direction.session, direction.reverse
        before = session.active_at, direction.moved, reverse.moved, reverse.holds_data
        self._poller.hand_over(direction.src.fileno(), direction)
        direction.on_events(mask)
        if before[1:] == (direction.moved, reverse.moved, reverse.holds_data):
            session.active_at = before[0]

    def on_bug(self) -> None:
        """End the session whose event handler failed."""
        self._direction.on_bug()
