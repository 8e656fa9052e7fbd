"""The servers of groups as the sessions of one worker use them: taken, counted, waited for.

Chooses none: a balancer does. Connects to none: the dialer does.

A server is taken from the choice until its session has ended, or it has failed, or another one was
faster. It is given back when the batch of events at hand is over, after the sockets towards it are
closed: a server never has more sessions than it may have.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from forwarder.stats.rows import (
    CONNECTS_FAILED,
    MOVED_IN,
    MOVED_OUT,
    SESSIONS,
    SESSIONS_TOTAL,
    new_row,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from forwarder.balancing.balancer import Balancer
    from forwarder.balancing.server import Server
    from forwarder.limits.restrictions import Restrictions
    from forwarder.net.sockets import Target
    from forwarder.relay.poller import Poller
    from forwarder.stats.rows import Row
    from forwarder.system.loop import Clock
    from forwarder.upstream.pool import Pool

log = logging.getLogger(__name__)


# While sessions wait: how often a worker looks whether others have made room. Some 10 us each.
LOOK_S: Final = 0.02
# While some wait in other workers, too: how long a worker gives what becomes free in it to its own,
# and then leaves it to the others, until each of them has looked. The former is arbitrary.
SERVES_S: Final = 0.5
REST_S: Final = 1.2 * LOOK_S


class Waiting(Protocol):
    """A session's search for a server, while all have as many sessions as they may."""

    def on_room(self) -> bool:
        """There may be room. Returns whether this waits no longer."""

    def on_bug(self) -> None:
        """There was a bug: end."""


class Served(Protocol):
    """A session. ``server`` is the one that it has, if it has one; ``pool`` has chosen it."""

    server: Server | None

    @property
    def upstream(self) -> object | None:
        """What it is connected by."""

    @property
    def target(self) -> Target | None:
        """Where to."""

    @property
    def pool(self) -> Pool:
        """The upstreams of its rule."""


class Queue:
    """The sessions of one worker that wait for a server of a group, the longest first.

    They are let on when a session of the group ends in this worker, and every LOOK_S, as another
    worker may have made room. So that those who wait in other workers have their turn, this one now
    and then leaves what becomes free to them. ``row`` is that of the group: there the gate counts
    how many wait in all workers.
    """

    __slots__ = (
        "_is_armed",
        "_is_looking",
        "_loop",
        "_poller",
        "_restrictions",
        "_rests_at",
        "_rests_until",
        "_row",
        "_waiting",
    )

    def __init__(self, row: int, loop: Clock, poller: Poller, restrictions: Restrictions) -> None:
        self._row = row
        self._loop = loop
        self._poller = poller
        self._restrictions = restrictions
        self._waiting: dict[Waiting, None] = {}
        self._is_armed = self._is_looking = False
        self._rests_at = self._rests_until = 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, one: object) -> bool:
        return one in self._waiting

    @property
    def is_closed(self) -> bool:
        """Whether who comes now has to wait: behind others, or as this worker leaves its places."""
        return bool(self._waiting) or self._poller.now < self._rests_until

    def join(self, one: Waiting, most: int) -> bool:
        """Wait; False if ``most`` wait already, in all workers together. Raises Busy."""
        holder = self._restrictions.holder
        with holder as gate:
            if gate.sessions(self._row) >= most:
                return False
            gate.take_server(holder.mine, self._row)
        self._waiting[one] = None
        self._arm()
        return True

    def leave(self, one: Waiting) -> None:
        """Wait no longer; nothing happens if this does not wait."""
        if one in self._waiting:
            del self._waiting[one]
            self._restrictions.holder.leave_server(self._row)
            self._restrictions.settle_soon()

    def on_end(self) -> None:
        """A session of the group has ended in this worker."""
        now = self._poller.now
        if now >= self._rests_at and self._wait_elsewhere() > 0:
            self._rests_until = now + REST_S
            self._rests_at = self._rests_until + SERVES_S
        self._look()

    def _wait_elsewhere(self) -> int:
        """How many wait in other workers."""
        holder = self._restrictions.holder
        return holder.gate.sessions(self._row) - holder.mine.rows[self._row]

    def _look(self) -> None:
        """Let those go on for whom there is room, in order."""
        if self._is_looking or self._poller.now < self._rests_until:
            return  # the former: what goes on may end at once, and so come here
        self._is_looking = True
        try:
            for one in tuple(self._waiting):
                if one in self._waiting and not self._lets_on(one):
                    return
        finally:
            self._is_looking = False

    def _lets_on(self, one: Waiting) -> bool:
        try:
            return one.on_room()
        except Exception:  # as in Poller: a bug must cost one session, not those behind it
            log.exception("relay.bug while waiting for a server")
            one.on_bug()
            return True

    def _arm(self) -> None:
        if not self._is_armed:
            self._is_armed = True
            self._loop.call_later(LOOK_S, self._on_look)

    def _on_look(self) -> None:
        self._is_armed = False
        self._poller.read_clock()
        self._look()
        if self._waiting:
            self._arm()


class Servers:
    """All servers that the sessions of this worker have to do with.

    ``alarm`` is the row whose first word counts failed connects to servers of any group.
    """

    __slots__ = ("_loop", "_poller", "_pools", "_queues", "_restrictions", "alarm")

    def __init__(self, loop: Clock, poller: Poller, restrictions: Restrictions) -> None:
        self._loop = loop
        self._poller = poller
        self._restrictions = restrictions
        self._pools: Mapping[str, Pool] | None = None
        self._queues: dict[int, Queue] = {}
        self.alarm: Row = new_row()

    def apply(self, pools: Mapping[str, Pool], sessions: Iterable[Served]) -> None:
        """Choose servers as these pools do, by the names of their rules, from now on.

        Sessions that have a server keep it, and are counted as its group wants it now. Those of
        rules that had no choice before are counted for the server that they are connected to.
        """
        self._pools = pools
        for session in sessions:
            if session.server is not None:
                session.server = self.as_in_force(session.pool, session.server)
            elif session.upstream is not None:
                session.server = self._adopt(session)
        self._queues = {row: queue for row, queue in self._queues.items() if queue}

    def in_force(self, pool: Pool) -> Pool | None:
        """The pool that the rule of ``pool`` has now; None if it is not served so any more."""
        whole = self._whole(pool)
        if whole is pool.origin:
            return pool
        return None if whole is None else whole.at(pool.offset)

    def choosing(self, pool: Pool) -> Pool:
        """Where a session of ``pool`` finds its next upstream.

        The pool that its rule has now, if there is a choice; else its own.
        """
        now = self.in_force(pool)
        return pool if now is None or now.balancer is None else now

    def as_in_force(self, pool: Pool, server: Server) -> Server:
        """A server that a session of ``pool`` has, as its group knows it now."""
        whole = self._whole(pool)
        if whole is None or whole.balancer is None or whole.balancer is pool.balancer:
            return server
        new = whole.balancer.take_over(server)
        if new.row != server.row:
            server.counts[SESSIONS] -= 1
            new.counts[SESSIONS] += 1
        return new

    def group_of(self, session: Served) -> str | None:
        """The name of the group that a session counts for, or looks for a server in, by now.

        None where it has not had a choice.
        """
        if session.server is None:
            pool = self.choosing(session.pool)
            is_choosing = session.upstream is None and pool.balancer is not None
            return pool.rule.group_name if is_choosing else None
        pool, whole = session.pool, self._whole(session.pool)
        if (
            whole is not None
            and whole.balancer is not None
            and session.server in whole.balancer.servers
        ):
            pool = whole
        return pool.rule.group_name

    def _whole(self, pool: Pool) -> Pool | None:
        if self._pools is None:
            return pool.origin
        whole = self._pools.get(pool.rule.name)
        if whole is None or whole.rule.protocol is not pool.rule.protocol:
            return None
        return whole

    def _adopt(self, session: Served) -> Server | None:
        now = self.in_force(session.pool)
        if now is None or now.balancer is None or session.target is None:
            return None
        now.targets()  # what is known of names
        for server in now.balancer.servers:
            if session.target in (now.addresses[server.index] or ()):
                now.balancer.adopt(server)
                self.on_taken(server)
                return server
        return None

    def queue(self, balancer: Balancer) -> Queue:
        """Where sessions of a group wait."""
        queue = self._queues.get(balancer.row)
        if queue is None:
            queue = Queue(balancer.row, self._loop, self._poller, self._restrictions)
            self._queues[balancer.row] = queue
        return queue

    def has_in_queue(self, one: object) -> bool:
        """Whether the search of a session waits for room at a server."""
        return any(one in queue for queue in self._queues.values())

    # -- counting

    def on_taken(self, server: Server) -> None:
        """A session was given this server by its balancer."""
        counts = server.counts
        counts[SESSIONS_TOTAL] += 1
        counts[SESSIONS] += 1

    def on_failed(self, server: Server) -> None:
        """No address of a server could be connected to, or it refuses datagrams."""
        server.counts[CONNECTS_FAILED] += 1
        self.alarm[SESSIONS] += 1

    def give_back(self, pool: Pool, server: Server) -> None:
        """A session of ``pool`` has this no longer; it is free when the batch at hand is over."""
        self._poller.defer(partial(self.let_go, pool, server))

    def pass_on(self, server: Server) -> None:
        """A session of a server goes on in another worker, where it stays counted."""
        server.counts[SESSIONS] -= 1
        server.counts[MOVED_OUT] += 1
        if server.is_counted:
            self._restrictions.holder.pass_server_on(server.row)
            self._restrictions.settle_soon()

    def take_on(self, session: Served, server: Server | None, held_in: int | None) -> None:
        """A session that has come from another worker has this server, or is given one.

        ``held_in`` is the row in which it is held at the gate; None: it is not.
        """
        if server is None:
            if session.upstream is not None:
                session.server = self._adopt(session)
            return
        server.counts[SESSIONS] += 1
        server.counts[MOVED_IN] += 1
        wanted = server.row if server.is_counted else None
        if wanted is not None or held_in is not None:
            holder = self._restrictions.holder
            if held_in is not None:
                holder.take_server_on(held_in)
            if wanted != held_in:
                if wanted is not None:
                    holder.take_server(wanted)
                if held_in is not None:
                    holder.leave_server(held_in)
            self._restrictions.settle_soon()
        session.server = self.as_in_force(session.pool, server)

    def let_go(self, pool: Pool, server: Server) -> None:
        """A session of ``pool`` has this server no longer, and its sockets are closed."""
        server.counts[SESSIONS] -= 1
        if server.is_counted:
            self._restrictions.leave_server(server.row, is_awaited=server.is_limited)
        if self._queues:
            whole = self._whole(pool)
            if whole is not None and whole.balancer is not None:
                queue = self._queues.get(whole.balancer.row)
                if queue is not None:
                    queue.on_end()
