"""The deposit of this worker: sessions of which the master keeps duplicates, to outlive us.

Ends no session and moves no bytes. What becomes of a deposit is the master's; how a session goes on
from one, ``moving.adopting``.

Theory of operation
-------------------
A session is offered when it has relayed for a while (``after_s``): short ones cost nothing. Offers
and withdrawals are sent many at a time, a moment later; the memory that we share with the master
says at once which of what it has is still true (``ipc.deposit``). So descriptors that are closed,
used again or not sent yet cannot be mistaken when we are killed.

From the offer on, closing a socket ends nothing, because another process may have it, too: see
``Poller.release_shared``.

Not deposited are sessions with a unix socket or MPTCP on a side, for which there are no counts by
which the adopter could see that nothing is lost, and those of which one side was reset.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from forwarder.config.model import Sides
from forwarder.ipc import deposit
from forwarder.ipc.channel import ChannelClosed
from forwarder.ipc.deposit import ROW, SESSIONS_AT_ONCE, Word, pack_server
from forwarder.relay.session import SessionState
from forwarder.relay.tcp.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from forwarder.balancing.server import Server
    from forwarder.ipc.channel import Channel
    from forwarder.ipc.deposit import DepositMemory
    from forwarder.net.pipes import Pipe
    from forwarder.relay.moving.parcel import Json
    from forwarder.relay.session import Session
    from forwarder.relay.workbench import Workbench
    from forwarder.system.loop import Loop
    from forwarder.upstream.pool import Pool

# How long offers and withdrawals are collected. Arbitrary.
_FLUSH_S: Final = 0.05
# Sessions are offered by this part of ``deposit_after``, so that the older ones are deposited
# whatever the wheel and the collecting add.
_PART: Final = 0.75
_MOST_TERMS: Final = 1 << 16
# Looking members up in their classes costs 100 ns each in Python 3.11.
_OFF: Final = Sides.OFF
_NEVER: Final = (0, 0.0)
_LAST_SERIAL: Final = (1 << 32) - 1
_RELAYING, _HALF_CLOSED = SessionState.RELAYING, SessionState.HALF_CLOSED


class Deposits:
    """``after_s``: how long a session relays before it is offered; 0: none is.

    There are none until :meth:`join`.
    """

    __slots__ = (
        "_adopted",
        "_bench",
        "_channel",
        "_due",
        "_free_terms",
        "_gone",
        "_had_room",
        "_is_armed",
        "_loop",
        "_memory",
        "_pipes",
        "_pipes_gone",
        "_serial",
        "_serials",
        "_terms",
        "_terms_of",
        "after_s",
    )

    def __init__(self, loop: Loop, bench: Workbench) -> None:
        self._loop = loop
        self._bench = bench
        self._channel: Channel | None = None
        self._memory: DepositMemory
        self._serials: memoryview[int]
        self.after_s = 0.0
        self._serial = 0
        self._is_armed = False
        self._had_room = False
        self._due: list[Stream] = []
        self._adopted: dict[Stream, tuple[int, float]] = {}  # of those that are due
        self._gone: list[int] = []
        self._pipes: list[Pipe] = []
        self._pipes_gone: list[int] = []
        self._terms_of: Callable[[Pool], Json]
        self._terms: dict[Pool, int] = {}
        self._free_terms: list[int] = []

    def join(
        self, channel: Channel, memory: DepositMemory, terms_of: Callable[[Pool], Json]
    ) -> None:
        """Deposit with the master at the other end of ``channel``, who shares ``memory``.

        ``terms_of``: what a session needs of its rule elsewhere.
        """
        self._channel, self._memory, self._terms_of = channel, memory, terms_of
        self._serials = memory.serials
        pipes = self._bench.pipes
        pipes.notes = memory.notes
        pipes.on_made, pipes.on_closed = self._on_pipe, self._on_pipe_closed

    def _leave(self) -> None:
        """The master is gone, and with it what it kept: there is no deposit any more."""
        self._channel = None
        self.after_s = 0.0
        self._bench.pipes.on_made = self._bench.pipes.on_closed = None
        for waiting in (self._due, self._gone, self._pipes, self._pipes_gone):
            waiting.clear()
        self._adopted.clear()

    def apply(
        self, deposit_after_s: float, pools: Iterable[Pool], sessions: Collection[Session]
    ) -> None:
        """A configuration is in force, with these pools. Walks over all sessions."""
        used = {*pools, *(session.pool.origin for session in sessions)}
        for pool in self._terms.keys() - used:
            self._free_terms.append(self._terms.pop(pool))
        after_s = deposit_after_s * _PART if self._channel is not None else 0.0
        was_on, self.after_s = bool(self.after_s), after_s
        if was_on != bool(after_s):
            self._had_room = was_on  # so that it looks different
            self.look(sessions)

    def look(self, sessions: Iterable[Session]) -> None:
        """Offer, or withdraw, all if the master has room again, or if that is a new wish."""
        has_room = bool(self.after_s) and self._memory.has_room
        if has_room == self._had_room:
            return
        self._had_room = has_room
        for session in sessions:
            if isinstance(session, Stream):
                if has_room:  # also those that it had no room for, or that were withdrawn
                    self.offer(session)
                elif not self.after_s:
                    self.withdraw(session)

    # -- sessions

    def offer(self, session: Stream, adoptions: int = 0, adopted_at: float = 0.0) -> None:
        """Deposit a session, if it can be, a moment later."""
        if not (self.after_s and self._had_room and _can_be_kept(session)):
            return
        session.is_shared = True
        self._due.append(session)
        if adoptions:
            self._adopted[session] = (adoptions, adopted_at)
        self._flush_soon()

    def withdraw(self, session: Stream) -> None:
        """It ends, or cannot go on elsewhere any more: it must not be adopted from now on."""
        if self.has(session):
            fd = session.client.fileno()
            self._serials[fd] = 0
            self._gone.append(fd)
            self._flush_soon()

    def has(self, session: Session) -> bool:
        """Whether a session outlives us as it is now."""
        fd = session.client.fileno() if isinstance(session, Stream) else -1
        return (
            self._channel is not None
            and 0 <= fd < self._memory.descriptors
            and self._serials[fd] != 0
        )

    def _flush_soon(self) -> None:
        if not self._is_armed:
            self._is_armed = True
            self._loop.call_later(_FLUSH_S, self.flush)

    def flush(self) -> None:
        """Send what waits, as far as the master takes it now."""
        self._is_armed = False
        self._send(self._send_all)

    def _send(self, send: Callable[[Channel], bool]) -> None:
        if self._channel is None:
            return
        try:
            is_all = send(self._channel)
        except ChannelClosed:
            self._leave()
            return
        if not is_all:
            self._flush_soon()

    def _send_all(self, channel: Channel) -> bool:
        return self._send_pipes(channel) and self._send_due(channel)

    def _write(self, session: Stream, upstream_fd: int, numbers: list[int]) -> bool:
        """Fill the row of a session, and add its number and serial; False if it cannot be kept."""
        fd, memory, state = session.client.fileno(), self._memory, session.state
        if not (0 <= fd < memory.descriptors and (state is _RELAYING or state is _HALF_CLOSED)):
            return False
        if session.ending is not None:
            return False
        pool, server = session.pool, session.server
        terms = self._terms.get(pool.origin)
        if terms is None:
            if len(self._terms) == _MOST_TERMS:
                return False
            terms = self._say_terms(pool.origin)
            if terms is None:
                return False
        self._serial = serial = self._serial % _LAST_SERIAL + 1
        adoptions, adopted_at = self._adopted.get(session, _NEVER) if self._adopted else _NEVER
        try:
            ROW.pack_into(
                memory.rows,
                fd * ROW.size,
                terms,
                pool.offset,
                session.id,
                session.started_at,
                session.connected_at - session.started_at,
                upstream_fd,
                _server_of(server, adoptions) if server is not None or adoptions else 0,
                adopted_at,
                serial,
            )
        except (struct.error, OverflowError):  # another process has said what cannot be of it
            return False
        numbers += (fd, serial)
        return True

    def _say_terms(self, pool: Pool) -> int | None:
        """Tell the master the terms of a rule. Returns their number; None: it cannot be told now.

        Raises ChannelClosed.
        """
        number = self._free_terms[-1] if self._free_terms else len(self._terms)
        if self._channel is not None:
            try:
                deposit.send_terms(self._channel, number, pool.row, self._terms_of(pool))
            except OSError:  # no descriptors
                return None
        self._terms[pool] = number
        if self._free_terms:
            self._free_terms.pop()
        return number

    # -- pipes

    def _on_pipe(self, pipe: Pipe) -> None:
        self._pipes.append(pipe)
        # Now, as what comes into it would have no other place. But no session that is just being
        # taken over: before it is said to be taken it would have two owners if we are killed.
        self._send(self._send_pipes)

    def _on_pipe_closed(self, pipe: Pipe) -> None:
        if pipe in self._pipes:
            self._pipes.remove(pipe)
        else:
            self._pipes_gone.append(pipe.number)
            self._flush_soon()

    def _send_pipes(self, channel: Channel) -> bool:
        """In this order: a number is used again only after it was said to be free."""
        if not (
            deposit.send_numbers(channel, Word.GONE, self._gone)
            and deposit.send_numbers(channel, Word.PIPES_GONE, self._pipes_gone)
        ):
            return False
        while self._pipes:
            part = self._pipes[:SESSIONS_AT_ONCE]
            numbers = [number for pipe in part for number in (pipe.number, pipe.mark >> 32)]
            fds = [fd for pipe in part for fd in (pipe.read_fd, pipe.write_fd)]
            if not deposit.send(channel, Word.PIPES, numbers, fds):
                return False
            del self._pipes[: len(part)]
        return True

    def _send_due(self, channel: Channel) -> bool:
        while self._due:
            part = self._due[:SESSIONS_AT_ONCE]
            numbers: list[int] = []
            fds: list[int] = []
            for session in part:
                upstream = session.upstream
                if upstream is not None and self._write(session, upstream.fileno(), numbers):
                    fds += (numbers[-2], upstream.fileno())
            if numbers and not deposit.send(channel, Word.KEEP, numbers, fds):
                for fd in numbers[::2]:
                    self._serials[fd] = 0
                return False
            del self._due[: len(part)]
        self._adopted.clear()
        return True


def _can_be_kept(session: Stream) -> bool:
    pool = session.pool
    return (
        (session.state is _RELAYING or session.state is _HALF_CLOSED)
        and session.ending is None
        and not pool.has_unix
        and pool.rule.options.mptcp is _OFF
    )


def _server_of(server: Server | None, adoptions: int) -> int:
    if server is None:
        return pack_server(0, adoptions, is_counted=False)
    return pack_server(server.row, adoptions, is_counted=server.is_counted)
