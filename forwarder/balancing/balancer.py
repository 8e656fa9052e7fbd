"""The servers of one group as a worker uses them: choosing one for a session, counting it there.

Theory of operation
-------------------
What the table of servers says is read again when its revision has moved; in between a choice looks
at nothing but what was worked out then. ``choose`` decides among servers, ``tiers`` which ones are
there to decide among; here it is put together with what all workers share.

Sessions are counted at the gate only where somebody has to know how many there are: in groups that
choose by sessions, or that limit them. The count is read, decided upon and raised under one lock,
so that no limit is ever exceeded, and two workers never choose the same gap. Giving back is owed,
and done at the end of a batch.

While another process keeps the lock nothing can be decided, and :class:`Busy` is raised: mostly
that process has only lost its processor. If it keeps the lock for longer, servers without a limit
are chosen by the counts as they are.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from forwarder.balancing.choose import First, Hash, Least, Random, Turn, indices, mask_of
from forwarder.balancing.server import Server
from forwarder.balancing.table import CUTS, FULL, ORDER, SINCE_NS, STATE, Standing
from forwarder.balancing.tiers import PRIMARIES, TIERS, State, rank
from forwarder.config.model import Balance, CheckKind, OnDown, OnUp
from forwarder.limits.gate import Busy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from forwarder.balancing.choose import Chooser
    from forwarder.balancing.table import ServerTable
    from forwarder.config.model import Group, Upstream
    from forwarder.limits.gate import Gate, Holder
    from forwarder.stats.rows import Row

# Others that are tried, unless ``retries`` says how many. As in HAProxy.
MOST_OTHERS: Final = 3
# The lock is kept so long only by a process that is stopped; one that waits for its processor lets
# go of it before that. Without the wait, 70 sessions that came in such a moment went to one server.
GUESSES_AFTER_S: Final = 0.5
# How long sessions of backups are cut, some at a time, when a primary is back (on_up = "return").
RETURN_S: Final = 10.0
_NOT_USABLE: Final = frozenset({Standing.DOWN, Standing.EJECTED})
# Servers that are as good as each other, so that the faster one may be had.
_RACED: Final = frozenset({Balance.TURN, Balance.LEAST, Balance.RANDOM})
_BY_SESSIONS: Final = frozenset({Balance.LEAST, Balance.RANDOM})


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What all balancers of a worker share.

    ``row_of`` gives the row of a number on the worker's board. ``settle_soon`` makes the gate count
    what the ``holder`` owes when the batch of events is over. ``part`` is the worker's slot divided
    by how many there are: workers do not all begin with the same server.
    """

    table: ServerTable
    row_of: Callable[[int], Row]
    holder: Holder
    settle_soon: Callable[[], None]
    part: float = 0.0
    draw: Callable[[], float] = random.random
    clock: Callable[[], float] = time.monotonic


class Balancer:
    """One for each group and worker, shared by the rules of the group.

    ``row`` is the group's own. ``needs_key``: choices depend on the client. ``tries``: how many
    servers a session may have until one answers. ``is_raced``: another one may be tried beside one
    that does not. ``is_retired``: a reload has put another balancer in its place, or none. ``cut``
    names the servers whose sessions were cut, see :meth:`expelled`, and since when they are down.
    About the last choice that was None: ``is_full`` if all usable servers have ``max_sessions``,
    ``is_unknown`` if none has been checked yet and the first check is awaited; then the session may
    wait and ask again.
    """

    __slots__ = (
        "_awaits",
        "_awaits_until",
        "_choosers",
        "_counts",
        "_has_primaries",
        "_holder",
        "_limits",
        "_open",
        "_returns_from",
        "_returns_until",
        "_revision",
        "_said",
        "_surroundings",
        "_table",
        "_tiers",
        "cut",
        "group",
        "is_full",
        "is_raced",
        "is_retired",
        "is_unknown",
        "needs_key",
        "row",
        "servers",
        "tries",
    )

    def __init__(
        self,
        group: Group,
        upstreams: Sequence[Upstream],
        rows: Sequence[int],
        surroundings: Surroundings,
        former: Balancer | None = None,
    ) -> None:
        """``rows`` are those of the upstreams, in order, and last that of the group.

        ``former`` is the balancer that the group had before a reload, and is not asked any more.
        """
        self.group = group
        *of_servers, self.row = rows
        self._surroundings = surroundings
        self._table = surroundings.table
        self._holder = surroundings.holder
        self._counts = _counts(group, upstreams)
        self.servers = tuple(
            self._server(upstream, index, row, former)
            for index, (upstream, row) in enumerate(zip(upstreams, of_servers, strict=True))
        )
        self.needs_key = group.balance is Balance.HASH
        count = len(self.servers)
        self.is_raced = count > 1 and group.balance in _RACED
        self.tries = 1 + (min(count - 1, MOST_OTHERS) if group.retries is None else group.retries)
        self.is_retired = False
        self.is_full = self.is_unknown = False
        self._choosers = tuple(self._chooser() for _ in range(2 * TIERS))
        # What may be chosen from, in order: sets of servers that are not empty. And what is left
        # for a session that none of these serves.
        self._tiers: tuple[tuple[int, Chooser], ...] = ()
        self._open: tuple[tuple[int, Chooser], ...] = ()
        self._limits: list[int] = []  # by server; 0 is none
        # Whether the first check of a server is awaited, and until when; 0: none has to come.
        self._awaits = False
        self._awaits_until = 0.0
        self._revision = -1
        self._said: list[tuple[int, ...]] = []
        self.cut: dict[str, int] = {}
        self._has_primaries = True
        self._returns_from = self._returns_until = 0.0
        if former is None:
            self.expelled()  # there are no sessions yet
        else:
            self._go_on_from(former)
        self._refresh()

    def _go_on_from(self, former: Balancer) -> None:
        former.is_retired = True
        if former.group.on_down is self.group.on_down:
            self.cut = former.cut
        self._has_primaries = former._has_primaries
        self._returns_from = former._returns_from
        self._returns_until = former._returns_until

    def _server(self, upstream: Upstream, index: int, row: int, former: Balancer | None) -> Server:
        server = Server(upstream, index, row, self._surroundings.row_of(row), self._counts)
        for old in () if former is None else former.servers:
            if old.is_like(server):
                return old
        return server

    def _chooser(self) -> Chooser:
        balance, part = self.group.balance, self._surroundings.part
        sessions = self._holder.gate.sessions_by_row
        rows = [server.row for server in self.servers]
        match balance:
            case Balance.TURN:
                return Turn(part)
            case Balance.LEAST:
                return Least(sessions, rows, part)
            case Balance.RANDOM:
                return Random(sessions, rows, self._surroundings.draw)
            case Balance.HASH:
                return Hash([server.name for server in self.servers], self.group.hash_prefix, part)
            case Balance.FIRST:
                return First()

    # -- choosing

    def choose(self, key: bytes, tried: int, avoid: int) -> Server | None:
        """Choose the server of a session, and count the session there. See :meth:`let_go`.

        ``key``: the client's address, packed, or empty; only looked at if :attr:`needs_key`.
        ``tried``: set of servers that the session has tried, ``avoid``: of those without a usable
        address now, which are chosen only if there is no other. If none is usable, or the session
        has tried all that are, it gets one that is not, unless the group does not fail open. None:
        none is left, see :attr:`is_full`. Raises Busy if the gate is, and only it can decide: ask
        again later. Blocks for PATIENCE_S at most.
        """
        if self._table.revision != self._revision:
            self._refresh()
        skip = tried | avoid
        for members, chooser in self._tiers:  # noqa: B007 - used behind it
            allowed = members & ~skip
            if allowed:
                break
        else:
            left = self._left(tried, avoid)
            if left is None:
                return self._choose_later(key, tried, avoid)
            allowed, chooser = left
        if self._counts:
            return self._take(chooser, allowed, key)
        return self.servers[chooser.pick(allowed, key)]

    def _left(self, tried: int, avoid: int) -> tuple[int, Chooser] | None:
        """Those to be avoided; if there are none, those that are not usable."""
        for tiers, skip in (
            (self._tiers, tried),
            (self._open, tried | avoid),
            (self._open, tried),
        ):
            for members, chooser in tiers:
                allowed = members & ~skip
                if allowed:
                    return allowed, chooser
        return None

    def _choose_later(self, key: bytes, tried: int, avoid: int) -> Server | None:
        """None is left, or not yet; unless the first check has been awaited for long enough."""
        if self._awaits and self._surroundings.clock() >= self._awaits_until:
            self._refresh()
            return self.choose(key, tried, avoid)
        self.is_full, self.is_unknown = False, self._awaits
        return None

    def others_than(self, server: Server) -> int:
        """Those that must not be tried beside ``server``, which is silent, as a set of bits.

        All that are not of its tier. If it has just been taken out, none: the session must not wait
        for it.
        """
        own, choosable = 1 << server.index, self.choosable
        tiers = self._tiers or self._open
        return ~next((members for members, _ in tiers if members & own), choosable)

    def _take(self, chooser: Chooser, allowed: int, key: bytes) -> Server | None:
        """Choose one that has room, and count the session there."""
        holder = self._holder
        try:
            with holder as gate:
                index = chooser.pick(allowed, key)
                if self._limits[index] and self._is_full(gate, index):
                    for one in indices(allowed):
                        if self._is_full(gate, one):
                            allowed ^= 1 << one
                    if not allowed:
                        self.is_full, self.is_unknown = True, False
                        return None
                    index = chooser.pick(allowed, key)
                server = self.servers[index]
                gate.take_server(holder.mine, server.row)
                return server
        except Busy:
            if holder.gate.stuck_s < GUESSES_AFTER_S:
                raise
            return self._take_uncertain(chooser, allowed, key)

    def _is_full(self, gate: Gate, index: int) -> bool:
        limit = self._limits[index]
        return limit > 0 and gate.sessions(self.servers[index].row) >= limit

    def _take_uncertain(self, chooser: Chooser, allowed: int, key: bytes) -> Server:
        """The same while the lock is stuck: a server without a limit, by counts that may change."""
        for index in indices(allowed):
            if self._limits[index]:
                allowed ^= 1 << index
        if not allowed:
            raise Busy
        server = self.servers[chooser.pick(allowed, key)]
        self._holder.take_server(server.row)
        self._surroundings.settle_soon()
        return server

    def let_go(self, server: Server) -> None:
        """A session of a server has ended, or goes to another one. Never blocks."""
        if server.is_counted:
            self._holder.leave_server(server.row)
            self._surroundings.settle_soon()

    def adopt(self, server: Server) -> None:
        """Count a session that has this server from before there was a choice.

        See :meth:`let_go`. If the server is down already, such sessions are cut, too.
        """
        self.cut.pop(server.name, None)
        if server.is_counted:
            self._holder.take_server(server.row)
            self._surroundings.settle_soon()

    def take_over(self, server: Server) -> Server:
        """What a session from before a reload has to refer to: the server of the same name, if any.

        Counts the session there if the group counts, and no longer where it was counted before:
        what has another row now, as the group has another name, is another server.
        """
        for new in self.servers:
            if new is server:
                return new
            if new.name == server.name:
                is_moved = new.row != server.row
                if new.is_counted and (is_moved or not server.is_counted):
                    self._holder.take_server(new.row)
                    self._surroundings.settle_soon()
                if is_moved or not new.is_counted:
                    self.let_go(server)
                return new
        return server

    # -- what the table says

    def _refresh(self) -> None:
        """Work out what may be chosen now."""
        table, group = self._table, self.group
        self._revision = table.revision
        said = [table.said(server.seat) for server in self.servers]
        if said == self._said and not self._awaits:
            return  # it was about others
        self._said = said
        states, self._limits = [], []
        self._await_checks()
        for server in self.servers:
            seat, share = server.seat, table.share(server.seat)
            weight, is_out = table.orders(seat, server.weight)
            standing = table.standing(seat)
            is_out |= self._awaits and standing is Standing.UNKNOWN
            states.append(State(weight, share, server.is_backup, is_out))
            limit = table.limit(seat, server.max_sessions)
            if limit and standing is Standing.SLOW:
                limit = max(limit * share // FULL, 1)
            self._limits.append(limit)
            server.is_limited = limit > 0
        ranks = rank(states, group.panic, fails_open=group.fails_open)
        self._tiers = self._ranked(ranks.usable, self._choosers[:TIERS])
        self._open = self._ranked(ranks.open, self._choosers[TIERS:])
        if self._awaits and not self._tiers:
            self._open = ()
        self._watch_returns(is_up=any(ranks.usable[PRIMARIES]))

    @staticmethod
    def _ranked(
        tiers: Sequence[Sequence[int]], choosers: Sequence[Chooser]
    ) -> tuple[tuple[int, Chooser], ...]:
        found = []
        for weights, chooser in zip(tiers, choosers, strict=True):
            if any(weights):
                chooser.reweigh(weights)
                found.append((mask_of(weights), chooser))
        return tuple(found)

    def _await_checks(self) -> None:
        """See whether the first check of a server is awaited, and until when."""
        table = self._table
        is_unknown = any(
            table.standing(server.seat) is Standing.UNKNOWN and not table.orders(server.seat, 0)[1]
            for server in self.servers
        )
        if not is_unknown:
            self._awaits, self._awaits_until = False, 0.0
            return
        now = self._surroundings.clock()
        if not self._awaits_until:
            check = self.group.check
            self._awaits_until = now + (check.timeout_s if check is not None else 0.0)
        self._awaits = now < self._awaits_until

    @property
    def usable(self) -> int:
        """The servers that are up and not taken out of use, as a set of bits."""
        if self._table.revision != self._revision:
            self._refresh()
        return _union(self._tiers)

    @property
    def choosable(self) -> int:
        """The servers that a session may get now: those that are usable, or what is left."""
        return self.usable or _union(self._open)

    def is_down(self, server: Server) -> bool:
        """Whether a check, or failed connects, have found a server unusable."""
        return self._table.word(server.seat, STATE) in _NOT_USABLE

    # -- sessions that have to go

    def expelled(self) -> list[Server]:
        """The servers whose sessions have to be cut now. Ask when the table has changed.

        By an order, each time; because a check has found it down, once: sessions that come to it
        later know that it is down.
        """
        table, found = self._table, []
        for server in self.servers:
            seat = server.seat
            if self.group.on_down is OnDown.RESET:
                since = table.word(seat, SINCE_NS)
                if table.word(seat, STATE) != Standing.DOWN:
                    self.cut.pop(server.name, None)
                elif self.cut.get(server.name) != since:
                    self.cut[server.name] = since
                    found.append(server)
                    continue
            if table.word(seat, ORDER) & CUTS:
                found.append(server)
        return found

    def returning(self, now: float) -> float:
        """What part of the sessions of backups has to be cut now, as a primary is back. 0 to 1.

        ``now`` is that of the clock. Ask at each beat: all are cut within RETURN_S.
        """
        if self._table.revision != self._revision:
            self._refresh()
        if not self._returns_until:
            return 0.0
        passed, left = now - self._returns_from, self._returns_until - self._returns_from
        self._returns_from = now
        if now >= self._returns_until:
            self._returns_until = 0.0
            return 1.0
        return max(passed, 0.0) / left

    def _watch_returns(self, *, is_up: bool) -> None:
        if self.group.on_up is OnUp.RETURN and is_up and not self._has_primaries:
            self._returns_from = self._surroundings.clock()
            self._returns_until = self._returns_from + RETURN_S
        elif not is_up:
            self._returns_until = 0.0
        self._has_primaries = is_up


def _union(tiers: Sequence[tuple[int, Chooser]]) -> int:
    found = 0
    for members, _ in tiers:
        found |= members
    return found


def _counts(group: Group, upstreams: Sequence[Upstream]) -> bool:
    """Whether somebody has to know how many sessions the servers of a group have."""
    has_agents = group.check is not None and group.check.kind is CheckKind.AGENT
    is_limited = has_agents or any(one.max_sessions for one in upstreams)
    return is_limited or group.balance in _BY_SESSIONS
