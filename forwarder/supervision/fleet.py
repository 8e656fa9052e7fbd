"""The workers of one master: forking them, sharing sockets out, noticing how they fare.

Decides nothing about configurations or the life of the instance; the master does. Never blocks.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

from forwarder import worker
from forwarder.connlog.files import LogFiles
from forwarder.ipc import messages
from forwarder.ipc.channel import Channel, ChannelClosed
from forwarder.ipc.heartbeat import Heartbeats, Vigil
from forwarder.ipc.questions import Questions
from forwarder.ipc.workerspec import WorkerSpec
from forwarder.limits.gate import STUCK_S, Busy, Gate, Holdings
from forwarder.stats.ledger import Ledger
from forwarder.stats.reasons import Phase
from forwarder.supervision import policy
from forwarder.supervision.keeper import Keeper
from forwarder.supervision.servers import Servers
from forwarder.supervision.slot import (
    Slot,
    WorkerProcess,
    WorkerState,
    WorkerTables,
    describe_unserved,
    fork_worker,
)
from forwarder.supervision.telling import Telling
from forwarder.system.children import keep_only
from forwarder.system.signals import describe_end
from forwarder.upstream import failing
from forwarder.upstream.known import KnownNames
from forwarder.upstream.messages import read_hosts

if TYPE_CHECKING:
    from collections.abc import Callable

    from forwarder.ipc.channel import Message, Received
    from forwarder.ipc.consignment import Consignment
    from forwarder.serving.generation import Serving
    from forwarder.serving.listeners import ListenerTable
    from forwarder.stats.board import Board
    from forwarder.system.privileges import Identity

log = logging.getLogger(__name__)

SHORT_S: Final = 0.1  # what waits for memory of the kernel is sent again after this time


class Fleet:
    """All workers, by slot. Owns their channels; the sockets are the table's."""

    def __init__(self, table: ListenerTable, selector: selectors.BaseSelector) -> None:
        """``serving`` must be set before the first :meth:`turn`."""
        self.serving: Serving
        self.identity: Identity | None = None  # the user that workers run as, if not ours
        self.capabilities = 0  # kept by workers all the same
        self.logs = LogFiles()
        self.ledger = Ledger()
        self.servers = Servers(self.ledger)
        self.questions = Questions()
        self.names = KnownNames()
        self.keeper = Keeper(self.ledger.server_name)
        self.telling = Telling(selector, table, self.names, self.logs, self.ledger, self.servers)
        self.refusal = ""  # why a worker cannot serve its last assignment
        # Of ``Moves``: whether sessions are on their way, or those of a worker that has died; what
        # a worker says about them; and who finds workers for sessions of the dead.
        self.is_amid_moves: Callable[[], bool] = lambda: False
        self.is_adopting: Callable[[], bool] = lambda: False
        self.adopt: Callable[[str, list[Consignment]], None] = lambda _name, _found: None
        self.on_moving: Callable[[int, Received], None] = lambda _pid, _received: None
        self._table = table
        self._selector = selector
        self._slots: list[Slot] = []
        self._socket_slots = 0  # slots that have sockets; never shrinks while the master lives
        self._retiring: list[WorkerProcess] = []
        self._heartbeats = Heartbeats()
        self._gate = Gate()
        self._must_recount = False
        self._has_counted_amid_moves = False
        self._is_ending = False
        self._vigil = Vigil(time.monotonic())

    # -- its state

    @property
    def size(self) -> int:
        """How many workers are wanted."""
        return len(self._slots)

    def processes(self) -> list[WorkerProcess]:
        """All worker processes that live, retiring ones too."""
        return [*self._in_slots(), *self._retiring]

    def serving_processes(self) -> list[WorkerProcess]:
        """Those in a slot."""
        return self._in_slots()

    def retiring_processes(self) -> list[WorkerProcess]:
        """Those whose slot is another one's, or has gone."""
        return [*self._retiring]

    def last_beat(self, process: WorkerProcess) -> float:
        """When a worker has last given a sign of life."""
        return self._heartbeats.last(process.cell)

    @property
    def must_recount(self) -> bool:
        """Whether what workers hold has to be counted while no session is on its way."""
        return self._must_recount or self._has_counted_amid_moves

    @property
    def is_settled(self) -> bool:
        """Whether every worker that lives serves exactly its last assignment."""
        return all(
            process.state is WorkerState.READY
            and process.applied_serial == process.sent_serial
            and not process.refusal
            for process in self._in_slots()
        ) and not any(process.channel.has_outbox for process in self._retiring)

    @property
    def is_complete(self) -> bool:
        """Whether no slot waits for its next worker."""
        return all(slot.process is not None for slot in self._slots)

    def describe(self, now: float) -> list[dict[str, object]]:
        """All worker processes, with what they have counted; as in the status."""
        return [
            {**process.describe(now), **self.ledger.worker(process.tables.board)}
            for process in self.processes()
        ]

    def describe_rules(self, rules: list[dict[str, object]], now: float) -> list[dict[str, object]]:
        """Rules as in the status, each with what no worker accepts on, and upstreams that fail."""
        sockets = {name: self._table.ids(at) for name, at in self.serving.binds.items()}
        rules = describe_unserved(rules, sockets, self.processes())
        return failing.describe(rules, (it.failing for it in self.processes()), now)

    def waiting(self, group: str) -> int:
        """How many sessions wait for a server of a group."""
        row = self.ledger.find_server(group, "")
        return 0 if row is None else self._gate.sessions(row)

    @property
    def deadline(self) -> float | None:
        """When :meth:`turn` has something to do without an event."""
        waiting = [self.next_look()]
        if self.questions.deadline is not None:
            waiting.append(self.questions.deadline)
        if not self._is_ending:
            waiting += [it.backoff.not_before for it in self._slots if it.process is None]
            if self.must_recount:
                waiting.append(time.monotonic() + STUCK_S)
        return min(waiting)

    def next_look(self) -> float:
        """When to look for hung workers again, or to send to one again, at the latest."""
        now = time.monotonic()
        told = [at for it in self.processes() for at in (it.deaf_until, it.retry_at)]
        deaf = [at for at in told if at > now]
        if any(it.channel.is_short for it in self.processes()):
            deaf.append(now + SHORT_S)
        return min([*deaf, now + self.serving.config.settings.hang_timeout_s / 4])

    # -- what it does

    def resize(self, size: int) -> None:
        """Change to ``size`` workers, for which the table must have sockets.

        The sockets of slots that go are adopted by those that stay, so that nothing queued is lost.
        """
        self._socket_slots = max(self._socket_slots, size, self._table.most_slots())
        while len(self._slots) < size:
            self._slots.append(Slot(len(self._slots)))
        while len(self._slots) > size:
            process = self._slots.pop().process
            if process is not None:
                self._retiring.append(process)

    def turn(self, now: float) -> None:
        """Keep the workers as wanted; those of a master that ends are only watched."""
        if self._is_ending:
            self._end_hung(now)
            self._tell_news()  # SIGUSR1 is for those that drain, too
        else:
            self._supervise(now)
        self.questions.expire(now)

    def cancel(self) -> None:
        """Start no worker any more, and share no sockets out."""
        self._is_ending = True

    def _supervise(self, now: float) -> None:
        """Replace the dead and the hung, let the retiring go, share the sockets out."""
        for slot in self._slots:
            if slot.process is None and now >= slot.backoff.not_before:
                self._start(slot, now)
        self._end_hung(now)
        self.ledger.sample(now)
        self._recount()
        self._tell_news()
        self._assign()
        if self._retiring and self.is_settled:
            for process in self._retiring:
                self.tell(process, messages.Op.DRAIN)

    def tell(
        self,
        process: WorkerProcess,
        op: messages.Op,
        *,
        is_last: bool = False,
        phase: Phase = Phase.SHUTDOWN,
    ) -> None:
        """Make a worker leave, now (STOP) or when its sessions have ended (DRAIN); once.

        ``is_last``: no worker serves in its place, so waiting for silent UDP flows is pointless.
        ``phase`` is why sessions that are left at a STOP end.
        """
        state = WorkerState.DRAINING if op is messages.Op.DRAIN else WorkerState.STOPPING
        if process.state is WorkerState.STOPPING or (process.state is state and not is_last):
            return
        process.state = state
        process.is_leaving = True
        # The master bounds its own stop; nothing else would bound that of one worker.
        is_alone = process in self._retiring and op is messages.Op.DRAIN
        limit_s = self.serving.config.settings.drain_timeout_s if is_alone else None
        self.telling.leave(process, op, limit_s, phase, is_last=is_last)

    def forget_rules(self, *, with_servers: bool) -> None:
        """Drop what was counted for rules that are served no more and have no session left.

        ``with_servers``: their servers, too, whose seats then are for others.
        """
        for row in self.ledger.forget(self.serving.counted_names()):
            self._gate.forget(row)
        if with_servers:
            self.servers.forget(self.serving.groups(), lambda row: not self._gate.sessions(row))

    def _recount(self) -> None:
        """What a dead worker held is free again.

        Not before others hold it instead that go on with its sessions. What others hold that are on
        their way is counted nowhere: once more when none are.
        """
        is_amid_moves = self.is_amid_moves()
        if self.is_adopting():
            return
        if self._must_recount or (self._has_counted_amid_moves and not is_amid_moves):
            living = [process.tables.holdings for process in self.processes()]
            with suppress(Busy):  # a turn soon tries again
                self._gate.recount(living, self.ledger.rows_in_use())
                self._must_recount = False
                self._has_counted_amid_moves = is_amid_moves

    def _tell_news(self) -> None:
        """Send each worker, those that leave too, news of names and log."""
        for process in self.processes():
            self.telling.news(process)

    def _end_hung(self, now: float) -> None:
        """Kill workers that give no sign of life, those that are leaving, too."""
        limit_s = self.serving.config.settings.hang_timeout_s
        self._vigil.look(now, limit_s)
        for process in self.processes():
            if process.channel.is_short:
                self.hear(process)
            self._check_alive(process, now, limit_s)

    def kill(self, why: str) -> None:
        """Kill all that are left."""
        for process in self.processes():
            log.error("master: worker %d pid=%d %s", process.slot, process.pid, why)
            process.signal(signal.SIGKILL)

    def hear(self, process: WorkerProcess) -> bool:
        """Read the messages of a worker, and send what waited for it; whether there were any."""
        found: list[Received] = []
        try:
            with suppress(ChannelClosed):  # its last words are read first
                process.channel.flush()
            found = process.channel.receive()
            for received in found:
                try:
                    self._handle(process, received)
                finally:
                    received.close()  # what was not asked for
        except ChannelClosed:
            self._hang_up(process)  # its death is reported by SIGCHLD
            return False
        except (KeyError, TypeError, ValueError, RecursionError):
            # No message of a worker may end the master.
            log.exception("worker.nonsense slot=%d pid=%d", process.slot, process.pid)
            process.signal(signal.SIGKILL)
            return True
        self.telling.watch(process)
        return bool(found)

    def close(self) -> None:
        """Give up what is not the workers', at the end."""
        self.logs.close()
        self._gate.close()
        self.servers.close()
        self.ledger.end()

    def on_exit(self, pid: int, status: int) -> None:
        """Note that a child has ended; one that is no worker is ignored."""
        for process in self.processes():
            if process.pid == pid:
                self._on_death(process, status)

    # -- birth and death

    def _in_slots(self) -> list[WorkerProcess]:
        return [slot.process for slot in self._slots if slot.process is not None]

    def _start(self, slot: Slot, now: float) -> None:
        cell = self._heartbeats.new_cell(now)
        board: Board | None = None
        try:
            holdings, board = Holdings(), self.ledger.open()
            tables = WorkerTables(board, holdings, self.keeper.open())
            become = partial(self._become, slot, cell, tables)
            process = fork_worker(slot.index, tables, now, become)
        except OSError as err:
            if board is not None:
                self.ledger.close(board)
            delay = slot.backoff.on_death(now, now)
            what = f"slot={slot.index}: cannot fork: {err.strerror}"
            log.error("worker.failed %s; next try in %.1f s", what, delay)
            return
        process.cell = cell
        slot.process = process
        try:
            hear = partial(self.hear, process)
            self._selector.register(process.channel, selectors.EVENT_READ, hear)
        except OSError as err:  # ENOMEM, ENOSPC: epoll_ctl(2)
            log.error("worker.failed slot=%d: cannot watch it: %s", slot.index, err.strerror)
            process.channel.close()
            process.signal(signal.SIGKILL)

    def _become(self, slot: Slot, cell: int, tables: WorkerTables, channel: Channel) -> None:
        """In the forked child: give up everything of the master, then be a worker."""
        spec = WorkerSpec(
            slot=slot.index,
            cell=cell,
            channel=channel,
            heartbeats=self._heartbeats,
            board=tables.board,
            gate=self._gate,
            holdings=tables.holdings,
            table=self.servers.table,
            deposit=tables.deposit.memory,
            relay=self.serving.config.settings.relay,
            identity=self.identity,
            capabilities=self.capabilities,
        )
        keep_only(spec.descriptors())
        worker.run_and_exit(spec)

    def _check_alive(self, process: WorkerProcess, now: float, limit_s: float) -> None:
        heard_at = process.cut_off_at or self._heartbeats.last(process.cell)
        silent_s = self._vigil.silent_s(heard_at, now)
        if silent_s > limit_s and process.state is not WorkerState.HUNG:
            what = f"slot={process.slot} pid={process.pid}: no sign of life for {silent_s:.0f} s"
            log.error("worker.hung %s; killing it", what)
            process.state = WorkerState.HUNG
            process.signal(signal.SIGKILL)

    def _on_death(self, process: WorkerProcess, status: int) -> None:
        while self.hear(process):
            pass  # its last words
        self._hang_up(process)
        # One that others have killed has not died of a session.
        is_killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        is_suspect = process.state is WorkerState.HUNG or not is_killed
        estate = self.keeper.give_up(process.tables.deposit, is_suspect=is_suspect)
        self.ledger.close(process.tables.board, estate.by_row)
        self._must_recount = True
        self.questions.on_exit(process.pid)
        self.adopt(f"worker slot={process.slot} pid={process.pid}", estate.consignments)
        if process in self._retiring:
            self._retiring.remove(process)
            return
        slot = self._slots[process.slot]
        slot.process = None
        if process.is_leaving:
            return
        if process.sent_serial and not process.applied_serial and slot.backoff.quick_deaths:
            self.refusal = f"worker {process.slot} died again before it served"
        delay = slot.backoff.on_death(process.started_at, time.monotonic())
        log.error(
            "worker.died slot=%d pid=%d: %s; its sockets stay open, next start in %.1f s%s",
            process.slot,
            process.pid,
            describe_end(status),
            delay,
            " (crash loop)" if slot.backoff.is_crash_loop else "",
        )

    def _on_leaving(self, process: WorkerProcess) -> None:
        """A worker drains, perhaps because it got a SIGTERM: its slot is free now."""
        if not process.is_leaving:
            process.is_leaving = True
            log.warning("worker.leaving slot=%d pid=%d: not asked to", process.slot, process.pid)
            process.state = WorkerState.DRAINING
            if process not in self._retiring:
                self._slots[process.slot].process = None
                self._retiring.append(process)

    def _hang_up(self, process: WorkerProcess) -> None:
        if process.channel.fileno() >= 0:
            self._selector.unregister(process.channel)
            process.channel.close()
            process.cut_off_at = time.monotonic()

    # -- messages

    def _on_applied(self, process: WorkerProcess, message: Message) -> None:
        process.on_applied(message, time.monotonic())
        if process.applied_serial == process.sent_serial and process.refusal:
            self.refusal = process.refusal
        elif process.applied_serial == process.sent_serial:
            process.generation = self.serving.generation
        if process.state is WorkerState.STARTING:
            process.state = WorkerState.READY
            log.info("worker.ready slot=%d pid=%d", process.slot, process.pid)

    def _handle(self, process: WorkerProcess, received: Received) -> None:
        message = received.message
        if received.raw or message["op"] == messages.Op.TERMS:
            self.keeper.on_message(process.tables.deposit, received)
        elif message["op"] == messages.Op.APPLIED:
            self._on_applied(process, message)
        elif message["op"] == messages.Op.LEAVING:
            self._on_leaving(process)
        elif message["op"] == messages.Op.ANSWER:
            number = message["number"]
            if self.questions.is_awaited(number, process.pid):
                answer = messages.read_answer(received)
                self.questions.on_answer(number, process.pid, answer)
        elif message["op"] in (messages.Op.PARCELS, messages.Op.TAKEN):
            self.on_moving(process.pid, received)
        elif message["op"] == messages.Op.FAILING:
            process.failing = failing.read(message)
        elif message["op"] == messages.Op.REFRESH:
            self.names.hurry(read_hosts(message))
        elif message["op"] == messages.Op.LOGS:  # it had no descriptors for them
            process.logs_revision = 0
            self.telling.again(process)

    # -- sockets

    def _assign(self) -> None:
        """Send each worker whose share has changed its new assignment."""
        ready, starting = [], []
        for process in self._in_slots():
            if process.state is WorkerState.READY:
                ready.append(process.slot)
            elif process.state is WorkerState.STARTING:
                starting.append(process.slot)
        shares = policy.share_sockets(self._socket_slots, ready, starting)
        for process in self._in_slots():
            if process.slot in shares:
                self.telling.serve(
                    process, self.serving, len(self._slots), tuple(shares[process.slot])
                )
