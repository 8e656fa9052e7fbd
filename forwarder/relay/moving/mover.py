"""Giving sessions up and taking them in: a worker's side of ``ipc.consignment``.

Works between two batches of events, in one go: nothing that is taken out of the relay is touched
there again, and what was taken in has been answered for before it handles an event.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from forwarder.ipc import claim
from forwarder.ipc.channel import ChannelClosed
from forwarder.ipc.claim import Claimant
from forwarder.ipc.consignment import VERSION, Consignment, Refusal, answer_taken
from forwarder.ipc.messages import Op
from forwarder.relay.listing import Choice
from forwarder.relay.moving.packing import Packing
from forwarder.relay.moving.unpacking import Unpacker
from forwarder.relay.session import SessionState
from forwarder.relay.tcp.stream import Stream
from forwarder.stats.rows import OWN_SESSIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from forwarder.ipc.channel import Channel, Message, Received
    from forwarder.relay.cuts import Cuts
    from forwarder.relay.moving.kinds import Kind
    from forwarder.relay.moving.parcel import Json
    from forwarder.relay.moving.unpacking import Unpacked
    from forwarder.relay.pools import Pools
    from forwarder.relay.relay import Relay
    from forwarder.relay.session import Session
    from forwarder.stats.rows import Row

log = logging.getLogger(__name__)


class Mover:
    """Gives sessions of a worker up, and takes others in.

    What it has given up it owns until that is settled: at most one consignment at a time.
    """

    def __init__(
        self, relay: Relay, pools: Pools, cuts: Cuts, row_of: Callable[[int], Row]
    ) -> None:
        """``row_of`` gives the row of a number on the worker's board."""
        self._relay = relay
        self._pools = pools
        self._cuts = cuts
        self._unpacker = Unpacker(relay, pools, cuts, row_of)
        self._own_row = row_of(0)
        self._out: Consignment | None = None
        self._out_over: Channel | None = None

    @property
    def is_out(self) -> bool:
        """Whether sessions are on their way that may come back: the worker must not leave."""
        return self._out is not None

    def on_message(self, received: Received, channel: Channel) -> None:
        """Handle MOVE, PARCELS or MOVED, and answer over the channel that it came by.

        Takes over the descriptors. Raises KeyError, TypeError or ValueError for nonsense, but for
        that in parcels, which are refused.
        """
        self._relay.poller.read_clock()
        op = received.message["op"]
        try:
            if op == Op.MOVE:
                self._give(received.message, channel)
            elif op == Op.PARCELS:
                self._take(received, channel)
            elif op == Op.MOVED:
                self._settle(received.message, channel)
        except ChannelClosed:  # who reads it will notice
            log.debug("moves: nobody hears the answer to %s", op)
        finally:
            received.close()
            self._own_row[OWN_SESSIONS] = len(self._relay.sessions)  # who gets the next ones

    def on_hang_up(self, channel: Channel) -> None:
        """Who has asked over a channel is gone: take back what is out and nobody has claimed."""
        if self._out_over is channel:
            self._take_back()

    def close(self) -> None:
        """The worker ends its sessions: those that are out and nobody has claimed as well."""
        self._take_back()

    # -- giving

    def _give(self, question: Message, channel: Channel) -> None:
        """Give sessions up, as many as are asked for and fit. Raises ChannelClosed."""
        number, limit = question["number"], question["limit"]
        if not (isinstance(number, int) and isinstance(limit, int)):
            raise TypeError("not a question for sessions")
        if self._out is not None:  # who asks has not settled that yet
            Consignment(number, busy=1).send(channel)
            return
        packing = Packing(self._pools, self._cuts, limit)
        for session in Choice.read(question).of(self._relay.sessions):
            packing.add(session)
            if packing.left:  # the next question is about the others: thousands, perhaps
                break
        out = packing.seal(number)
        if out.sessions:
            self._out, self._out_over = out, channel
        for session, _ in packing.packed:
            if isinstance(session, Stream):
                self._relay.deposits.withdraw(session)
        try:
            out.send(channel)  # at once: if we are killed before that, nobody has them
        finally:
            for session, kind in packing.packed:
                self._let_go(session, kind)

    def _let_go(self, session: Session, kind: Kind[Any]) -> None:
        """A session is on its way: from here on nothing in this worker touches it."""
        relay = self._relay
        relay.books.on_moved_out(session)
        kind.let_go(session)
        relay.bench.wheel.discard(session)
        relay.sessions.pop(session, None)
        session.state = SessionState.CLOSED  # for who has it in a list
        relay.restrictions.pass_on(session)
        if session.server is not None:
            relay.servers.pass_on(session.server)
            session.server = None
        session.unlink()

    def _settle(self, message: Message, channel: Channel) -> None:
        """What is out is another's now, or comes back, all or in part."""
        refused = message.get("refused")
        if self._out is None or message["number"] != self._out.number:
            return
        if message.get("is_back"):
            self._take_back()
            return
        out, self._out, self._out_over = self._out, None, None
        try:
            if isinstance(refused, list) and refused:
                self._go_on_with(out, [one for one in refused if one in range(len(out))], channel)
        finally:
            out.close()

    def _take_back(self) -> None:
        """Go on with what is out, unless somebody has claimed it."""
        out, self._out, self._out_over = self._out, None, None
        if out is not None:
            if out.claim(Claimant.GIVER):
                self._go_on_with(out, range(len(out)))
            out.close()

    def _go_on_with(
        self, out: Consignment, indices: Iterable[int], channel: Channel | None = None
    ) -> None:
        """They are ours again; say so over ``channel``. Raises ChannelClosed, when that is done."""
        came, lost = self._unpack(out, out.read_content(), indices, is_foreign=False)
        try:
            if channel is not None:
                answer_taken(channel, out.number)
        finally:
            self._count(came)  # not before, as in _take
            if lost:
                log.error("moves.lost: %d sessions that came back cannot go on", len(lost))
                Consignment(out.number, sessions=[out.sessions[index] for index in lost]).abort()

    # -- taking

    def _take(self, received: Received, channel: Channel) -> None:
        """Take sessions in, and say which. Raises ChannelClosed."""
        number, shares = received.message["number"], received.message["sessions"]
        if not (isinstance(number, int) and isinstance(shares, list)):
            raise TypeError("not a consignment")
        everything = range(len(shares))
        is_truncated = received.is_truncated
        try:
            given = Consignment.read(received)
        except ValueError:
            why = Refusal.DESCRIPTORS if is_truncated else Refusal.NONSENSE
            answer_taken(channel, number, everything, why)
            return
        came: list[Unpacked] = []
        try:
            came, refused, why = self._take_in(given)
            answer_taken(channel, number, refused, why)
        finally:
            # Not before: what was counted, or deposited, and not said to be taken goes to others.
            self._count(came)
            given.close()
        self._relay.deposits.flush()

    def _take_in(self, given: Consignment) -> tuple[list[Unpacked], Sequence[int], Refusal]:
        """Returns what is taken, the indices of what is not, and why."""
        everything = range(len(given))
        if not everything:
            return [], (), Refusal.NONE
        if given.version != VERSION:
            return [], everything, Refusal.VERSION
        try:
            content = given.read_content()
        except ValueError:
            return [], everything, Refusal.NONSENSE
        if not given.claim():
            return [], (), Refusal.CLAIMED
        came, refused = self._unpack(given, content, everything, is_foreign=given.is_foreign)
        if not came:
            claim.give_up(given.token)
        return came, refused, Refusal.NONSENSE if refused else Refusal.NONE

    def _count(self, came: Iterable[Unpacked]) -> None:
        for one in came:
            self._unpacker.count(one)

    def _unpack(
        self, given: Consignment, content: Json, indices: Iterable[int], *, is_foreign: bool
    ) -> tuple[list[Unpacked], list[int]]:
        """Make these of a consignment sessions of this relay, and count none.

        Returns them, and the indices of what cannot be made one.
        """
        came, refused = [], []
        for index in indices:
            place, fds = given.sessions[index]
            try:
                came.append(self._unpacker.unpack(content, place, fds, is_foreign=is_foreign))
            except Exception as err:  # a bug must cost one session, not the worker
                is_bug = not isinstance(err, OSError | ValueError)
                log.warning("moves: cannot go on with a session: %s", err, exc_info=is_bug)
                refused.append(index)
        return came, refused
