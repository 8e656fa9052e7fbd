"""All servers that are checked: begins their checks, and writes what comes of it into the table.

Theory of operation
-------------------
``plan`` says whose check is due, a kind of ``probes`` makes it, ``standing`` says what its outcome
means; here these meet. A check of a server with several addresses tries one after the other, the
one that was good the last time first: the server is well if one of them is.

Servers are told apart by group and name. Those that are as before keep everything when the groups
change; so a reload disturbs no check. A new checker finds what the last one has written.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final

from forwarder.balancing.table import (
    CHECKS_FAILED,
    CHECKS_PASSED,
    DISABLED,
    EJECTIONS,
    ORDER,
    ORDERS,
    SINCE_NS,
    Standing,
)
from forwarder.checker import passive, standing
from forwarder.checker.aims import MOST_ADDRESSES, Unknown, aims_at, is_fixed
from forwarder.checker.messages import News
from forwarder.checker.outcome import Outcome
from forwarder.checker.plan import Plan
from forwarder.checker.probes import agent, command, http, tcp, tls, udp
from forwarder.config.model import CheckKind
from forwarder.system.daemonlog import warn_rarely
from forwarder.system.printable import field

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from forwarder.balancing.table import ServerTable
    from forwarder.checker.loop import Loop, Timer
    from forwarder.checker.messages import Checked
    from forwarder.checker.outcome import Aim, Begin, Probe
    from forwarder.checker.passive import Row
    from forwarder.checker.standing import Change, Event, State
    from forwarder.config.model import Check, Group, Upstream
    from forwarder.upstream.answers import Answer

log = logging.getLogger(__name__)

KINDS: Final[Mapping[CheckKind, Begin]] = {
    CheckKind.TCP: tcp.begin,
    CheckKind.TLS: tls.begin,
    CheckKind.HTTP: http.begin,
    CheckKind.UDP: udp.begin,
    CheckKind.COMMAND: command.begin,
    CheckKind.AGENT: agent.begin,
}
# A check that has not ended so long after its timeout never will: a bug. A kind may wait for its
# timeout once more, after the process was stopped.
_LOST_S: Final = 60.0
# What waits for the master; the older half is dropped then. Arbitrary.
MOST_NEWS: Final = 10_000
# What is due within this part of the shortest interval, and this time, is begun together: for
# each check alone the process would wake up, with cold caches. With 1,000 servers every 2 s 50 ms
# cost 2.5 % of a processor, and 10 ms 4.
_GRAINS: Final = 20
_MOST_GRAIN_S: Final = 0.05
_NS: Final = 1_000_000_000


class Server:
    """What the checker knows of one server."""

    __slots__ = (
        "aims",
        "began_at",
        "checked",
        "is_disabled",
        "is_fixed",
        "left",
        "name",
        "probe",
        "row",
        "seat",
        "state",
        "timer",
        "upstream",
        "written",
    )

    def __init__(self, upstream: Upstream, seat: int, checked: Checked, state: State) -> None:
        self.name = str(upstream)
        self.upstream = upstream
        self.seat = seat
        self.checked = checked
        self.state = state
        self.is_disabled = False
        self.row: Row = ()  # failed connects
        self.aims: list[Aim] = []
        self.is_fixed = is_fixed(upstream, checked)  # its addresses stay as they are
        self.left: list[Aim] = []  # to be tried by the check that is under way
        self.probe: Probe | None = None
        self.began_at = 0.0
        self.timer: Timer | None = None  # for what comes of itself
        self.written: tuple[Standing, int, float, int] | None = None

    @property
    def group(self) -> Group:
        """How its group is configured."""
        return self.checked.group

    @property
    def check(self) -> Check | None:
        """How it is checked: an address that its name has is asked by that name."""
        check, origin = self.checked.group.check, self.upstream.origin
        if check is None or check.host or origin is None or not origin.expands:
            return check
        return replace(check, host=str(origin.end).rpartition(":")[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What checks need of the process.

    ``answer`` says what is known of a name now. ``draw`` gives random numbers from 0 up to 1.
    """

    loop: Loop
    table: ServerTable
    answer: Callable[[str], Answer | None]
    draw: Callable[[], float]
    kinds: Mapping[CheckKind, Begin]


class Checks:
    """The servers of all groups. ``news`` is what has become of them, for whoever takes it."""

    def __init__(self, needs: Needs) -> None:
        self.news: list[News] = []
        self._loop = needs.loop
        self._table = needs.table
        self._answer = needs.answer
        self._kinds = needs.kinds
        self._plan = Plan(needs.draw)
        self._servers: dict[int, Server] = {}  # by seat
        self._groups: dict[str, list[Server]] = {}
        self._orders = -1
        self.grain_s = 0.0  # what is due within this time may be begun together

    # -- which servers there are

    def use(self, groups: Sequence[Checked]) -> None:
        """Check the servers of these groups from now on, and no others."""
        known = {(it.checked.name, it.name): it for it in self._servers.values()}
        servers: dict[int, Server] = {}
        self._groups = {}
        new: list[Server] = []
        for checked in groups:
            members = self._groups[checked.name] = []
            for upstream, seat in checked.servers:
                server = known.get((checked.name, str(upstream)))
                if server is None or server.seat != seat:
                    server = self._first_seen(upstream, seat, checked)
                    new.append(server)
                else:
                    self._adapt(server, upstream, checked)
                servers[seat] = server
                members.append(server)
        for seat, server in self._servers.items():
            if servers.get(seat) is not server:
                self._stop(server)
                if server.timer is not None:
                    server.timer.cancel()
        self._servers = servers
        self._orders = -1
        checks = [checked.group.check for checked in groups if checked.group.check]
        shortest_s = min((min(it.every_s, it.fast_s, it.down_s) for it in checks), default=0.0)
        self.grain_s = min(_MOST_GRAIN_S, shortest_s / _GRAINS)
        self._begin_to_check(new)

    def _first_seen(self, upstream: Upstream, seat: int, checked: Checked) -> Server:
        """A server that this process knows nothing of; another one may have known it."""
        table, group, now = self._table, checked.group, self._loop.now
        since_ns = min(table.word(seat, SINCE_NS), int(now * _NS))
        if not since_ns:
            server = Server(upstream, seat, checked, standing.first(group, now))
            self._write(server)
            return server
        was_checked = table.word(seat, CHECKS_PASSED) + table.word(seat, CHECKS_FAILED) > 0
        found = table.standing(seat)
        state = standing.resumed(found, since_ns / _NS, group, now, is_checked=was_checked)
        server = Server(upstream, seat, checked, state)
        if state.standing is found:
            # What an agent has said is there, too; it stays until its next answer.
            self._await(server)
        else:
            self._write(server)
        return server

    def _adapt(self, server: Server, upstream: Upstream, checked: Checked) -> None:
        """The same server, perhaps configured in another way."""
        old, server.checked, server.upstream = server.checked, checked, upstream
        if old == checked:
            return
        server.aims, server.is_fixed = [], is_fixed(upstream, checked)
        self._change(server, standing.adapted(server.state, checked.group, self._loop.now))
        if old.group.check != checked.group.check:
            self._stop(server)
            self._check_at_once(server)

    def _check_at_once(self, server: Server) -> None:
        """Begin to check a server now, if it is to be checked at all."""
        if server.check is not None and not server.is_disabled:
            self._plan.spread([server.seat], 0.0, self._loop.now)

    def _begin_to_check(self, servers: Sequence[Server]) -> None:
        """Spread the first checks of servers over one interval."""
        by_interval: dict[float, list[int]] = {}
        for server in servers:
            if server.check is not None:
                by_interval.setdefault(server.check.every_s, []).append(server.seat)
        for every_s, seats in by_interval.items():
            self._plan.spread(seats, every_s, self._loop.now)

    def _stop(self, server: Server) -> None:
        """Check a server no longer."""
        self._plan.remove(server.seat)
        if server.probe is not None:
            server.probe.cancel()
            server.probe = None

    def close(self) -> None:
        """End all checks."""
        self.use(())

    # -- one turn

    def turn(self) -> None:
        """Begin the checks that are due."""
        now = self._loop.now
        if self._table.words[ORDERS] != self._orders:
            self._heed_orders()
        while (seat := self._plan.take(now)) is not None:
            self._begin(self._servers[seat])

    def deadline(self) -> float:
        """When :meth:`turn` has something to do, if nothing else happens."""
        return self._plan.deadline()

    def beat(self) -> None:
        """Look for checks that do not end. Now and then."""
        for server in self._servers.values():
            if server.seat in self._plan and server.probe is not None and server.check is not None:
                limit_s = server.check.timeout_s * MOST_ADDRESSES + _LOST_S
                if self._loop.now > server.began_at + limit_s:
                    log.error("checker.bug %s: a check does not end", _name(server))
                    server.probe.cancel()
                    self._end(server, Outcome(False, "", 0.0, is_ours=True))

    def _heed_orders(self) -> None:
        """Stop checking those that an operator has disabled, and begin with those not any more."""
        self._orders = self._table.words[ORDERS]
        for server in self._servers.values():
            is_disabled = bool(self._table.word(server.seat, ORDER) & DISABLED)
            if is_disabled == server.is_disabled:
                continue
            server.is_disabled = is_disabled
            if is_disabled:
                self._stop(server)
            else:
                self._check_at_once(server)
        for name in self._groups:
            self._release(name)

    # -- one check

    def _begin(self, server: Server) -> None:
        server.began_at = self._loop.now
        try:
            server.left = self._aims(server)
            self._try_next(server)
        except Unknown as err:
            self._end(server, Outcome(False, err.why, 0.0, is_ours=err.is_ours))
        except Exception:  # a bug must cost one check, not all of them
            log.exception("checker.bug %s", _name(server))
            self._end(server, Outcome(False, "", 0.0, is_ours=True))

    def _aims(self, server: Server) -> list[Aim]:
        """The addresses of a server, the last one first that was good. Raises Unknown."""
        check, aims = server.check, server.aims
        assert check is not None  # noqa: S101 - only those are planned
        if not (aims and server.is_fixed):
            good = aims[0].target if aims else None
            aims = aims_at(server.upstream, server.checked, check, self._answer)
            if len(aims) > 1:
                aims.sort(key=lambda aim: aim.target != good)
            server.aims = aims
        return aims[:]

    def _try_next(self, server: Server) -> None:
        check = server.check
        assert check is not None  # noqa: S101 - see above
        aim = server.left.pop(0)
        done = partial(self._on_outcome, server, aim)
        server.probe = self._kinds[check.kind](check, aim, self._loop, done)

    def _on_outcome(self, server: Server, aim: Aim, outcome: Outcome) -> None:
        if outcome.is_good:
            if server.aims and server.aims[0] is not aim:  # none: they may be others by now
                server.aims.sort(key=lambda one: one is not aim)
        elif server.left and not outcome.is_ours:
            self._try_next(server)
            return
        self._end(server, outcome)

    def _end(self, server: Server, outcome: Outcome) -> None:
        """A check has ended."""
        server.probe = None
        check, now = server.check, self._loop.now
        assert check is not None  # noqa: S101 - see above
        if outcome.is_ours:
            if outcome.why:
                text = f"upstream.unchecked {_name(server)}: {outcome.why}"
                warn_rarely(log, f"unchecked {outcome.why}", text)
            self._plan.done(server.seat, check.fast_s, check.jitter, now)
            return
        words = CHECKS_PASSED if outcome.is_good else CHECKS_FAILED
        self._table.count(server.seat, words)
        change = standing.checked(server.state, server.group, outcome, now)
        if change[0] is not server.state or server.written is None:
            self._change(server, change)
        interval_s = standing.interval_s(server.state, server.group)
        self._plan.done(server.seat, interval_s, check.jitter, now)

    # -- failed connects

    def watched(self) -> Iterator[Server]:
        """The servers whose failed connects count."""
        for members in self._groups.values():
            for server in members:
                if server.group.fail:
                    yield server

    def on_connects(self, server: Server, failed: int, worked: int, *, is_first: bool) -> bool:
        """So many connects have failed and worked. Returns whether to look again soon."""
        now, group = self._loop.now, server.group
        server.row = passive.after(server.row, failed, worked, group, now, is_first=is_first)
        if passive.is_enough(server.row, group):
            run, server.row = passive.length(server.row), ()
            if server.state.is_usable:
                members = self._groups[server.checked.name]
                usable = [self._is_usable(one) for one in members]
                if standing.may_eject(members.index(server), usable):
                    self._table.count(server.seat, EJECTIONS)
                    self._change(server, standing.ejected(server.state, group, run, now))
                self._plan.hurry(server.seat, now)
        return bool(server.row)

    def _is_usable(self, server: Server) -> bool:
        """Whether it gets sessions, by all that is known."""
        weight, is_out = self._table.orders(server.seat, server.upstream.weight)
        return server.state.is_usable and not is_out and weight > 0

    def _release(self, name: str) -> None:
        """Use ejected servers again if nothing else is left of a group."""
        members = self._groups.get(name, [])
        states = [server.state for server in members]
        usable = [self._is_usable(server) for server in members]
        for index in standing.to_release(states, usable):
            server = members[index]
            self._change(server, standing.released(server.state, self._loop.now))

    # -- what follows

    def _change(self, server: Server, change: Change) -> None:
        was_usable = server.state.is_usable
        server.state, events = change
        self._write(server)
        for event in events:
            self._tell(server, event)
        if was_usable and not server.state.is_usable:
            self._release(server.checked.name)

    def _on_time(self, server: Server) -> None:
        server.timer = None
        self._change(server, standing.later(server.state, server.group, self._loop.now))

    def _write(self, server: Server) -> None:
        """Let the workers know."""
        state, now = server.state, self._loop.now
        share = standing.share(state, server.group, server.upstream.weight, now)
        limit = state.advice.max_sessions or 0
        written = (state.standing, share, state.since, limit)
        if written != server.written:
            server.written = written
            # In microseconds, so that a number that was read comes out as it was.
            since_ns = round(state.since * 1e6) * 1000
            self._table.find(server.seat, state.standing, share, since_ns, limit=limit)
        self._await(server)

    def _await(self, server: Server) -> None:
        """Come again when time alone changes something."""
        if server.timer is not None:
            server.timer.cancel()
            server.timer = None
        due_at = standing.due(server.state, server.group, self._loop.now)
        if due_at < math.inf:
            server.timer = self._loop.call_at(due_at, partial(self._on_time, server))

    def _tell(self, server: Server, event: Event) -> None:
        what, why, after = event
        name = server.checked.name
        if len(self.news) >= MOST_NEWS:  # a master that is stopped takes none
            del self.news[: MOST_NEWS // 2]
        self.news.append(News(what, name, server.name, why, after, self._loop.now))


def _name(server: Server) -> str:
    """A server as a line of the log names it."""
    return f"group={field(server.checked.name)} server={field(server.name)}"
