"""The search for a server of a group that answers: a server is chosen, then its addresses tried.

Lives only while a session or a flow connects, as the dialer does that it is.

Theory of operation
-------------------
A server is *taken* when it is chosen, and *given back* when all its addresses have failed, or when
another one was faster; the one that is connected is the session's. If a server fails, another one
is chosen, as often as ``retries`` says. If the group has only one, that is tried again, after a
pause.

A server none of whose addresses has been answered within ``attempt_delay`` goes on, but another one
is tried beside it: a host that is dead must not cost a session ``connect_timeout``. It is of the
same tier, and never of another: a backup is for when the others fail. Where the choice is more than
a matter of chance (``hash``, ``first``) there is no race between servers.

Servers whose names have no answer yet, and those whose addresses have all failed just now, are
chosen only if there is no other one.

If all that are usable have as many sessions as they may, the session waits in the queue of the
group, if that has one, without a descriptor towards any of them. It waits as well for the outcome
of the first check. A client that goes meanwhile ends its session.
"""

from __future__ import annotations

import errno
import math
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol

from forwarder.limits.gate import Busy
from forwarder.net import sockets
from forwarder.relay.dialer import Caller, Dialer
from forwarder.relay.wheel import TICK_S
from forwarder.stats.reasons import Phase, Who
from forwarder.stats.rows import connect_bucket

if TYPE_CHECKING:
    import socket

    from forwarder.balancing.balancer import Balancer
    from forwarder.balancing.server import Server
    from forwarder.relay.dialer import Attempt
    from forwarder.relay.outages import Outages
    from forwarder.relay.poller import Poller
    from forwarder.relay.servers import Queue, Servers
    from forwarder.upstream.pool import Pool

# How long until the only server of a group is tried again, unless ``connect_timeout`` is less.
AGAIN_S: Final = 1.0
# What this host lacks, or has been told to use and does not have. It says nothing of a server.
_OURS: Final = sockets.OUT_OF_RESOURCES | {
    sockets.NO_PORT,
    errno.EADDRNOTAVAIL,
    errno.EAFNOSUPPORT,
    errno.ENODEV,
}
_STARVED: Final = sockets.OUT_OF_RESOURCES
_FULL: Final = "max_sessions of every server"


class GroupCaller(Caller, Protocol):
    """The session that is connected. ``server`` is set to the one that it gets."""

    server: Server | None
    is_answered: bool

    def turn_away(self, why: str, phase: Phase) -> None:
        """There is no server for it, though none has failed."""


class GroupDialer(Dialer):
    """Chooses servers for ``caller``, and tries their addresses."""

    __slots__ = (
        "_again_at",
        "_balancer",
        "_is_full",
        "_key",
        "_knew_cut",
        "_left",
        "_pool",
        "_queue",
        "_queued_until",
        "_servers",
        "_taken",
        "_tried",
    )

    caller: GroupCaller

    def __init__(
        self,
        caller: GroupCaller,
        servers: Servers,
        poller: Poller,
        outages: Outages,
        tried: int = 0,
        pool: Pool | None = None,
    ) -> None:
        """``tried``: servers not to choose, as bits.

        ``pool``: that of the rule of ``caller`` now, if not its own; it has a balancer.
        """
        super().__init__(caller, (), poller, outages)
        self._servers = servers
        self._pool = pool = pool or caller.pool
        self._balancer = balancer = pool.balancer
        assert balancer is not None  # noqa: S101 - see above
        self._key = self._key_for(balancer) if balancer.needs_key else b""
        self._left = balancer.tries  # how many may still be chosen
        self.adds_rivals = balancer.is_raced
        self._tried = tried
        self._taken: dict[Server, float] = {}  # and when
        self._knew_cut = 0  # those chosen though their sessions had been cut, as bits
        self._again_at = 0.0  # not to choose before
        self._is_full = False  # all that could be chosen are
        self._queue: Queue | None = None  # while it waits there

    @property
    def has_others(self) -> bool:
        """Whether there is another server, or the one that was chosen has other addresses."""
        balancer = self._balancer
        return (balancer is not None and len(balancer.servers) > 1) or super().has_others

    def _key_for(self, balancer: Balancer) -> bytes:
        return sockets.packed_host(self.caller.client_address) if balancer.needs_key else b""

    # -- choosing

    def _has_found_more(self) -> bool:
        """Choose the next server: if one is being tried, a rival; else whichever there is."""
        self._is_full = False
        if not self._left or self._poller.now < self._again_at:
            return False
        balancer = self._balancer
        if self._attempts:
            return balancer is not None and self._has_rival(balancer)
        if self._error in _STARVED:
            self._left = 0
            return False
        if balancer is None or balancer.is_retired:
            balancer = self._follow()
            if balancer is None:
                return self._has_plain_targets()
        if balancer.group.max_queue and self._queue is None and not self._tried:
            self._is_full = self._servers.queue(balancer).is_closed
            if self._is_full:
                return False
        return self._has_next(balancer, self._tried)

    def _has_rival(self, balancer: Balancer) -> bool:
        """Choose one as good as the server that was chosen, to be tried beside it."""
        beside = self.server
        if not self.adds_rivals or beside is None or balancer.is_retired:
            return False
        return self._has_next(balancer, self._tried | balancer.others_than(beside))

    def _has_next(self, balancer: Balancer, tried: int) -> bool:
        """Choose a server, none of ``tried``, and take it."""
        pool, now = self._pool, self._poller.now
        pool.targets()  # names may have moved
        if self._more_until and not pool.has_unanswered:
            self._more_until = 0.0
        tried |= pool.without_address
        has_failures = bool(pool.failures.known)
        avoid = pool.avoided(now) if has_failures else 0
        try:
            server = balancer.choose(self._key, tried, avoid)
            if server is None and balancer.is_full and avoid and not balancer.group.max_queue:
                server = balancer.choose(self._key, tried, 0)
        except Busy:
            self._again_at = now + TICK_S
            return False
        if server is None:
            self._on_none(balancer)
            return False
        self._servers.on_taken(server)
        self._taken[server] = now
        self.server = server
        self._left -= 1
        self._tried |= 1 << server.index
        if server.name in balancer.cut:
            self._knew_cut |= 1 << server.index
        if self._queue is not None:
            self._leave_queue()
        addresses = pool.addresses[server.index] or ()
        self._targets = pool.failures.order(addresses, now) if has_failures else addresses
        self._next = 0
        return True

    def _on_none(self, balancer: Balancer) -> None:
        """No server can be had now."""
        if balancer.is_unknown:
            self._again_at = self._poller.now + TICK_S
        self._is_full = balancer.is_full
        if not self._is_full:
            self._leave_queue()

    def _follow(self) -> Balancer | None:
        """Choose as the configuration in force says. None: it leaves nothing to choose."""
        before, pool = self._balancer, self._servers.in_force(self._pool)
        if pool is not None:
            self._pool = pool
        balancer = self._balancer = None if pool is None else pool.balancer
        self._tried = self._knew_cut = 0
        if balancer is not None:
            self._key = self._key_for(balancer)
            self.adds_rivals = balancer.is_raced
        if before is None or balancer is None or before.row != balancer.row:
            self._leave_queue()
        if pool is None:
            self._left = 0
            return None
        pool.targets()
        if pool.has_unanswered and not self._more_until:  # of servers that a name has stood for
            limit_s = pool.rule.connect_timeout_s
            self._more_until = self._poller.now + (limit_s or math.inf)
        return balancer

    def _has_plain_targets(self) -> bool:
        """Go on where a reload has left nothing to choose; not if it has removed the rule."""
        if not self._left:
            return False
        self._left = 0
        self._more_until = 0.0
        self.server = None
        self._targets, self._next = self._pool.targets() or (), 0
        return bool(self._targets)

    # -- how it goes on

    def _note_failed(self, attempt: Attempt, error: int) -> None:
        super()._note_failed(attempt, error)
        server = attempt.server
        if server is None or server not in self._taken:
            return
        if server is self.server and self._next < len(self._targets):
            return
        if any(one.server is server and one is not attempt for one in self._attempts):
            return
        self._give_back(server, has_failed=error not in _OURS)
        balancer = self._balancer
        if balancer is not None and len(balancer.servers) == 1:
            self._tried = 0
            limit_s = self.caller.pool.rule.connect_timeout_s
            self._again_at = self._poller.now + min(limit_s or AGAIN_S, AGAIN_S)

    def _give_back(self, server: Server, *, has_failed: bool) -> None:
        del self._taken[server]
        if has_failed:
            self._servers.on_failed(server)
            self._pool.on_failure()
        self._servers.give_back(self._pool, server)

    def win(self, attempt: Attempt, sock: socket.SocketType, mask: int) -> None:
        """The first that is connected; its server is the caller's from here on."""
        others, server, caller = self._attempts, attempt.server, self.caller
        if server is not None:
            balancer = self._balancer
            if (
                balancer is not None
                and server.name in balancer.cut
                and caller.is_answered
                and not self._knew_cut >> server.index & 1
            ):  # its sessions were cut since it was chosen, and this one would be missed
                sockets.set_abort_on_close(sock)
                self._give_up(attempt, errno.EHOSTDOWN)
                return
            taken_at = self._taken.pop(server)
            caller.server = server
            if balancer is None or balancer.is_retired:
                caller.server = self._servers.as_in_force(self._pool, server)
            if caller.is_answered:
                server.counts[connect_bucket(self._poller.now - taken_at)] += 1
        if not self._taken:  # as mostly: nothing else is being tried
            super().win(attempt, sock, mask)
            return
        try:
            super().win(attempt, sock, mask)
        finally:
            for one in tuple(self._taken):
                is_noted = [other.is_noted for other in others if other.server is one]
                self._give_back(one, has_failed=bool(is_noted) and all(is_noted))

    def close(self, *, is_abort: bool) -> None:
        """Give up everything."""
        self._leave_queue()
        super().close(is_abort=is_abort)
        for server in tuple(self._taken):
            self._give_back(server, has_failed=False)

    def _wait_for_more(self) -> None:
        now = self._poller.now
        if self._is_full and self._queue is None:
            self._wait_in_queue(now)
        elif self._queue is not None:
            pass  # it lets us on
        elif self._left and now < self._again_at:
            self._wait_until(self._again_at)
        elif self._left and now < self._more_until:
            self._wait_until(now + TICK_S)
        else:
            self._fail()

    def _wait_until(self, when: float) -> None:
        self._race_at = when
        self.caller.arm(when - self._poller.now)
        self._watch_client()

    def _watch_client(self) -> None:
        """Notice a client that goes while it waits, though nothing may be under way."""
        if not self._has_begun:
            with suppress(OSError):  # the poller takes no more for now
                self.caller.on_dialing()
                self._has_begun = True

    def _fail(self) -> None:
        """No server is left: all have failed, or none is usable."""
        if self._error:
            super()._fail()
            return
        self._is_over = True
        if self._more_until:
            self.caller.on_no_upstream("no name server answered in time", Who.US)
            return
        pool = self._pool
        about = f"no server of group {pool.rule.group_name} is usable"
        why = pool.why_no_target() if pool.without_address else ""
        self.caller.turn_away(f"{about}: {why}" if why else about, Phase.UPSTREAM_DOWN)

    # -- where all are full

    def _wait_in_queue(self, now: float) -> None:
        balancer = self._balancer
        if balancer is None or not balancer.group.max_queue:
            self._refuse(_FULL)
            return
        queue, group = self._servers.queue(balancer), balancer.group
        try:
            has_joined = queue.join(self, group.max_queue)
        except Busy:
            self._wait_until(now + TICK_S)
            return
        if not has_joined:
            self._refuse("max_queue")
            return
        self._queue = queue
        self._tried = 0
        self._race_at = math.inf
        limit_s = group.queue_timeout_s
        if limit_s is None:
            limit_s = self.caller.pool.rule.connect_timeout_s
        self._queued_until = now + (limit_s or math.inf)
        self.caller.arm(limit_s)
        self._watch_client()

    def _refuse(self, limit: str) -> None:
        if self._error:
            self._fail()
        else:
            self._is_over = True
            self.caller.turn_away(limit, Phase.LIMIT)

    def _leave_queue(self) -> None:
        if self._queue is not None:
            self._queue.leave(self)
            self._queue = None

    def on_room(self) -> bool:
        """There may be room. Returns whether this waits no longer."""
        self.start()
        return self._queue is None

    def on_bug(self) -> None:
        """There was a bug: end the session."""
        self.caller.on_bug()

    def on_timer(self, now: float) -> float:
        """As there; and wait in the queue no longer than one may."""
        if self._queue is None:
            return super().on_timer(now)
        if now < self._queued_until:
            return self._queued_until if self._queued_until < math.inf else 0.0
        self._leave_queue()
        self._is_over = True
        self.caller.turn_away("queue", Phase.LIMIT)
        return 0.0
