"""The messages to the workers: answers about names, places of the log, assignments, to leave.

Each is sent once, and again later if it did not arrive. Decides nothing; never blocks.
"""

from __future__ import annotations

import logging
import selectors
import signal
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from forwarder.ipc import messages
from forwarder.ipc.channel import ChannelClosed
from forwarder.net import pipes
from forwarder.supervision.slot import RETRY_S
from forwarder.system.daemonlog import warn_rarely
from forwarder.upstream.messages import say_answers

if TYPE_CHECKING:
    from forwarder.connlog.files import LogFiles
    from forwarder.serving.generation import Serving
    from forwarder.serving.listeners import ListenerTable
    from forwarder.stats.ledger import Ledger
    from forwarder.stats.reasons import Phase
    from forwarder.supervision.servers import Servers
    from forwarder.supervision.slot import WorkerProcess
    from forwarder.upstream.known import KnownNames

log = logging.getLogger(__name__)


class Telling:
    """The master's side of the channels to its workers, as far as it sends."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        table: ListenerTable,
        names: KnownNames,
        logs: LogFiles,
        ledger: Ledger,
        servers: Servers,
    ) -> None:
        """The selector watches the channels; their sockets come from ``table``."""
        self._selector = selector
        self._table = table
        self._names = names
        self._logs = logs
        self._ledger = ledger
        self._servers = servers
        self._serial = 0

    def watch(self, process: WorkerProcess) -> None:
        """Ask for writability exactly while something waits for the worker."""
        events = selectors.EVENT_READ
        if process.channel.has_outbox and not process.channel.is_short:
            events |= selectors.EVENT_WRITE
        key = self._selector.get_key(process.channel)
        if key.events != events:
            self._selector.modify(process.channel, events, key.data)

    def leave(
        self,
        process: WorkerProcess,
        op: messages.Op,
        limit_s: float | None,
        phase: Phase,
        *,
        is_last: bool,
    ) -> None:
        """Send DRAIN or STOP, see ``Fleet.tell``; None as a limit is none."""
        try:
            process.channel.send(
                {"op": op, "limit_s": limit_s or 0, "is_last": is_last, "phase": phase.value}
            )
        except ChannelClosed:  # it has died; or it lives, and gets this
            process.signal(signal.SIGTERM)
            return
        self.watch(process)

    def news(self, process: WorkerProcess) -> None:
        """Send the answers about names and the places of the log, if it does not know them."""
        self._names_to(process)
        if process.logs_revision == self._logs.revision or time.monotonic() < process.deaf_until:
            return
        try:
            messages.send_logs(process.channel, self._logs.places)
        except ChannelClosed:
            return  # it has died; SIGCHLD follows
        except OSError as err:
            what = f"log: cannot send worker {process.slot} its files: {err}"
            warn_rarely(log, what, what, logging.ERROR)
            self.again(process)
            return
        process.logs_revision = self._logs.revision
        self.watch(process)

    def again(self, process: WorkerProcess) -> None:
        """Send everything once more, when there may be descriptors for that."""
        self._serial += 1
        process.sent_serial = self._serial  # nothing is settled until it has acknowledged that
        process.told = None
        process.deaf_until = time.monotonic() + RETRY_S

    def serve(
        self, process: WorkerProcess, serving: Serving, workers: int, slots: tuple[int, ...]
    ) -> None:
        """Send what to serve from now on, at the sockets of ``slots``, as one of ``workers``."""
        wanted = (serving.revision, workers, slots)
        if not process.must_be_told(wanted, time.monotonic()):
            return
        self._names_to(process)  # first, so that the first client finds them
        descriptors, routes = serving.share(self._table, slots)
        self._serial += 1
        new = {i: fd for i, fd in descriptors.items() if i not in process.known_sockets}
        try:
            messages.send_sockets(process.channel, new)
            process.known_sockets = process.known_sockets | new.keys()
            messages.send_assignment(
                process.channel,
                messages.Assignment(
                    serial=self._serial,
                    generation=serving.generation,
                    config=serving.config,
                    routes=routes,
                    rows=tuple(map(self._ledger.row, serving.counted_names())),
                    seats=tuple(self._servers.rows(*one) for one in serving.groups()),
                    workers=workers,
                    pipe_budget_pages=pipes.budget_pages(workers),
                ),
            )
        except ChannelClosed:
            return  # it has died; SIGCHLD follows
        except OSError as err:  # EMFILE: an assignment travels in a file
            what = f"worker.untold slot={process.slot} pid={process.pid}: {err.strerror}"
            warn_rarely(log, what, what, logging.ERROR)
            self.again(process)
            return
        process.told = wanted
        process.known_sockets = set(routes)
        process.sent_serial = self._serial
        self.watch(process)

    def _names_to(self, process: WorkerProcess) -> None:
        """Send the answers that it does not know, unless others still wait."""
        if process.names_revision == self._names.revision or process.channel.has_outbox:
            return
        # Its servers are in the assignment that follows; the name has no address of its own.
        answers = {
            host: answer
            for host, answer in self._names.since(process.names_revision).items()
            if not answer.records
        }
        with suppress(ChannelClosed):  # it has died; SIGCHLD follows
            for part in say_answers(messages.Op.NAMES, answers):
                process.channel.send(part)
            process.names_revision = self._names.revision
            self.watch(process)
