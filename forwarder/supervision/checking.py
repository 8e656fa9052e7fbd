"""The master's part in checks, and the helper that makes them and looks names up: the checker.

It is told the groups that are in force, the boards of the workers, and the names; all of it again
after it has died. What it knows is what was sent last, so nothing is sent twice.
"""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING

from forwarder.checker.messages import (
    BOARD,
    CHECKS,
    GONE,
    KNOWN,
    NEWS,
    Checked,
    checks_file,
    read_news,
)
from forwarder.checker.process import CheckerProcess
from forwarder.stats.board import ROWS
from forwarder.supervision.findings import Findings
from forwarder.supervision.helper import Helper
from forwarder.supervision.naming import Naming
from forwarder.supervision.slot import RETRY_S
from forwarder.system.daemonlog import warn_rarely
from forwarder.upstream.asking import FOUND
from forwarder.upstream.wanted import sought_names

if TYPE_CHECKING:
    import selectors
    from collections.abc import Callable, Collection

    from forwarder.ipc.channel import Channel, Received
    from forwarder.serving.generation import Serving
    from forwarder.stats.ledger import Server
    from forwarder.supervision.fleet import Fleet

log = logging.getLogger(__name__)


class Checking:
    """The checker, as long as there are names or groups; and what it is to know."""

    def __init__(
        self,
        fleet: Fleet,
        selector: selectors.BaseSelector,
        drop: Callable[[], None],
        on_answers: Callable[[Collection[str]], None],
        may_check: Callable[[], bool],
    ) -> None:
        """``drop`` as for Helper, ``on_answers`` as for Naming.

        ``may_check``: whether no other master of this instance checks the same servers.
        """
        self.helper = Helper("checker", self, selector, drop)
        self.naming = Naming(fleet.names, self.helper, on_answers)
        self.findings = Findings(fleet.servers, fleet.ledger)
        self._fleet = fleet
        self._may_check = may_check
        self._groups: tuple[Checked, ...] = ()
        self._serial = 0
        self._told: tuple[Checked, ...] | None = None  # None: nothing, and not even that
        self._watched: dict[int, frozenset[Server]] = {}  # by the serial with which they were sent
        self._boards: set[int] = set()  # the workers whose boards it has
        self._tell_at = 0.0  # not before that, after descriptors ran out

    def use(self, serving: Serving, now: float) -> None:
        """Let the checker check and look up what is served from now on, and nothing else."""
        self.helper.hang_s = serving.config.settings.hang_timeout_s
        self._groups = self._checked(serving)
        self.findings.use(self._groups)
        names = sought_names(serving.config.rules)
        self.helper.want(is_wanted=bool(names or self._groups))
        self.naming.use(names, now)
        self._tell()

    def turn(self, now: float) -> None:
        """Keep the checker alive, and tell it what is new."""
        self.helper.turn(now)
        self.naming.turn(now)
        self.findings.turn(now)
        self._tell()

    def cancel(self) -> None:
        """Go on: sessions that drain are cut when their server is down, and flows follow names."""

    def close(self) -> None:
        """End the checker. Blocks for a moment, until it has gone."""
        self.helper.end()

    @property
    def deadline(self) -> float | None:
        """When :meth:`turn` has something to do without an event; None for never."""
        is_untold = self.helper.is_started and self._told is not self._wanted
        tell_at = self._tell_at if is_untold else None
        parts = (self.helper, self.naming, self.findings)
        deadlines = (*(part.deadline for part in parts), tell_at)
        return min((one for one in deadlines if one is not None), default=None)

    # -- see helper.Job

    def run(self, channel: Channel, beat: Callable[[float], None]) -> None:
        """In the helper: check and look up until the master has gone."""
        CheckerProcess(channel, beat, self._fleet.servers.table).run()

    def on_started(self) -> None:
        """There is a new checker: tell it everything."""
        self._told = None
        self._watched.clear()
        self._boards.clear()
        self.naming.on_started()
        self._tell()

    def on_message(self, received: Received) -> None:
        """Take in what the checker has found. Raises KeyError, TypeError or ValueError."""
        message = received.message
        if message["op"] == FOUND:
            self.naming.on_found(message, time.monotonic())
        elif message["op"] == NEWS:
            self.findings.take(read_news(message), time.monotonic())
        elif message["op"] == KNOWN:
            serial = int(str(message["serial"]))
            for older in [one for one in self._watched if one < serial]:
                del self._watched[older]
            self._watch()
        else:
            raise ValueError(message["op"])

    # -- what it is told

    @property
    def _wanted(self) -> tuple[Checked, ...]:
        """The groups that the checker has to check now."""
        return self._groups if self._may_check() else ()

    def _tell(self) -> None:
        if not self.helper.is_started:
            if self._watched:
                self._watched.clear()  # nobody is left who would write of them
                self._watch()
            return
        now = time.monotonic()
        if now < self._tell_at:
            return
        try:
            self._tell_boards()
            self._tell_groups()
        except OSError as err:  # EMFILE: both travel as descriptors
            what = f"checker.untold: {err.strerror}"
            warn_rarely(log, what, what, logging.ERROR)
            self._tell_at = now + RETRY_S

    def _tell_groups(self) -> None:
        groups = self._wanted
        if groups == self._told or (self._told is None and not groups):
            self._told = groups  # the next comparison is short
            return
        self._serial += 1
        self._watched[self._serial] = frozenset(
            (group.name, str(upstream)) for group in groups for upstream, _ in group.servers
        )
        self._watch()
        file = checks_file(groups)
        self.helper.send({"op": CHECKS, "serial": self._serial}, [file])
        self._told = groups

    def _tell_boards(self) -> None:
        """Hand it the boards of the workers that live, if there are groups."""
        workers = self._fleet.processes() if self._groups else []
        boards = {process.pid: process.tables.board for process in workers}
        for pid in self._boards - boards.keys():
            self._boards.discard(pid)
            self.helper.send({"op": GONE, "pid": pid})
        for pid in boards.keys() - self._boards:
            self.helper.send({"op": BOARD, "pid": pid}, [os.dup(boards[pid].fileno())])
            self._boards.add(pid)

    def _watch(self) -> None:
        """Keep the seats of servers of which the checker may still write."""
        self._fleet.servers.watched = frozenset().union(*self._watched.values())

    def _checked(self, serving: Serving) -> tuple[Checked, ...]:
        """The groups in force. Those that share a seat with others cannot be told apart."""
        found: dict[str, Checked] = {}
        servers = self._fleet.servers
        for rule, name in serving.groups():
            if not rule.is_balanced or name in found:
                continue
            rows = servers.rows(rule, name)
            seated = [
                (upstream, row - ROWS)
                for upstream, row in zip(rule.upstreams, rows, strict=False)
                if servers.seat(name, str(upstream)) is not None
            ]
            found[name] = Checked(
                name=name,
                group=rule.group,
                servers=tuple(seated),
                options=rule.options,
                source=rule.source,
                is_udp=rule.protocol.connects_by_udp,
            )
        return tuple(found.values())
