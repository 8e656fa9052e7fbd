"""Two relays in this process that give each other sessions, through all that is between workers."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from forwarder.config.model import RelayMode
from forwarder.ipc.channel import channel_pair
from forwarder.ipc.consignment import Consignment, ask, confirm, read_taken
from forwarder.limits.gate import STUCK_S, Holder, Holdings
from forwarder.relay.cuts import Cuts
from forwarder.relay.moving.mover import Mover
from forwarder.relay.pools import Pools
from forwarder.relay.relay import Relay
from forwarder.stats.reasons import Phase
from forwarder.stats.rows import new_row
from support.by_hand import HandLoop, Shared, StubPool, accepted, no_names

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from forwarder.ipc.channel import Received
    from forwarder.relay.tcp.stream import Stream
    from forwarder.stats.rows import Row
    from forwarder.system.loop import Loop


class Side:
    """One worker, as far as sessions know it. ``channel`` is the master's end of its channel.

    Its rows are its own, as on a board; the gate is shared.
    """

    def __init__(self, loop: Loop, shared: Shared, mode: RelayMode, slot: int) -> None:
        self.rows: dict[int, Row] = {}
        self.holdings = Holdings()
        holder = Holder(shared.gate, self.holdings)
        self.relay = Relay(loop, mode, holder, 1024, slot=slot)
        # Two processes have two; here it is one, and an id must not be that of two sessions.
        self.relay.births += slot << 24
        self.pools = Pools(no_names(), self.row)
        self.cuts = Cuts(loop, lambda some: self.relay.abort_sessions(Phase.DRAIN, "cut", some))
        self.mover = Mover(self.relay, self.pools, self.cuts, self.row)
        self.channel, self.own = channel_pair()

    def row(self, number: int) -> Row:
        """A row of its board."""
        return self.rows.setdefault(number, new_row())

    def serve(self, *pools: StubPool) -> None:
        """Let these be the rules in force."""
        self.pools.in_force = {pool.rule.name: pool for pool in pools}
        for pool in pools:
            pool.counts = self.row(pool.row)
        self.relay.restrictions.apply(pools, 0, self.relay.sessions)
        self.relay.servers.apply(self.pools.in_force, self.relay.sessions)

    def hear(self) -> None:
        """Handle what the master has sent."""
        for received in self.own.receive():
            self.mover.on_message(received, self.own)

    def answers(self) -> list[Received]:
        """What it has sent."""
        return self.channel.receive()

    @property
    def session(self) -> Stream:
        """The only session that it has."""
        (session,) = self.relay.sessions
        return session  # type: ignore[return-value]

    def close(self) -> None:
        """End everything."""
        self.mover.close()
        self.relay.abort_sessions(Phase.SHUTDOWN, "the test is over")


class Pair:
    """Two of them, on one clock that the test turns by hand, and the master between them."""

    def __init__(self, *modes: RelayMode) -> None:
        self.loop = HandLoop()
        self.shared = Shared()
        one, other = modes or (RelayMode.AUTO, RelayMode.AUTO)
        self.one = Side(self.loop, self.shared, one, 0)
        self.other = Side(self.loop, self.shared, other, 1)
        self.sides = (self.one, self.other)
        self._number = 0
        self._stack = ExitStack()

    def open(self, pool: StubPool, side: Side | None = None) -> socket.socket:
        """Give a relay, the first one by default, a new client; returns the client's end."""
        client, sock, address = accepted()
        relay = (side or self.one).relay
        relay.poller.turn()
        relay.open_session(pool, sock, address)
        return self._stack.enter_context(client)

    def turn(self) -> None:
        """Let both handle what has happened."""
        for _ in range(3):
            for side in self.sides:
                side.relay.poller.turn()
            self.loop.pass_time(0)

    def pack(self, giver: Side, limit: int = 100, rule: str | None = None) -> Consignment:
        """Have sessions given up."""
        self._number += 1
        ask(giver.channel, self._number, limit, {"rule": rule})
        giver.hear()
        (received,) = giver.answers()
        return Consignment.read(received)

    def deliver(self, given: Consignment, taker: Side) -> tuple[list[int], str]:
        """Have them taken in; returns the indices of what was refused, and why."""
        given.send(taker.channel)
        taker.hear()
        (received,) = taker.answers()
        number, refused, why = read_taken(received.message)
        assert number == given.number
        return refused, why

    def settle(self, giver: Side, given: Consignment, **what: object) -> None:
        """Tell the giver that it is done, or what else there is to be told."""
        confirm(giver.channel, given.number, **what)  # type: ignore[arg-type]  # as there
        giver.hear()
        if what.get("refused"):
            (received,) = giver.answers()
            assert read_taken(received.message) == (given.number, [], "")

    def move(
        self,
        giver: Side,
        taker: Side,
        meanwhile: Callable[[], object] | None = None,
        rule: str | None = None,
    ) -> int:
        """Move all sessions that can be; ``meanwhile`` happens while they are nobody's."""
        given = self.pack(giver, rule=rule)
        count = len(given)
        if meanwhile is not None:
            meanwhile()
        if given.sessions:
            assert self.deliver(given, taker) == ([], "")
            self.settle(giver, given)
        given.close()
        assert not giver.mover.is_out
        self.turn()
        return count

    def close(self) -> None:
        """End everything; nothing may be left of it."""
        for side in self.sides:
            side.close()
        self.loop.pass_time(2 * STUCK_S)
        for side in self.sides:
            assert not side.relay.bench.wheel
            side.relay.close()
            side.channel.close()
            side.own.close()
        for number in {row for side in self.sides for row in side.rows if row}:
            self.shared.row(number)
            assert all(side.row(number)[0] == 0 for side in self.sides), number
        self.shared.close()
        self._stack.close()
