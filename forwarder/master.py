"""Room 1: bind, fork, supervise, stop. Never touches client data and never blocks.

A plain ``selectors`` wait over signals and worker channels: no asyncio loop and no thread, because
a process that forks must have neither.
"""

from __future__ import annotations

import gc
import logging
import os
import resource
import selectors
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

import setproctitle

from forwarder import listeners, messages, notify, supervision, worker
from forwarder.errors import ExitCode
from forwarder.net import pipes
from forwarder.net.channel import Channel, ChannelClosed
from forwarder.pidfile import PidFile
from forwarder.signals import SignalQueue
from forwarder.slot import Slot, WorkerProcess, WorkerState, fork_worker

if TYPE_CHECKING:
    from forwarder.config.model import Config, Rule
    from forwarder.listeners import BindAddress

log = logging.getLogger(__name__)

STOP_TIMEOUT_S: Final = 30.0  # a graceful stop waits this long for sessions, then resets them
KILL_AFTER_S: Final = 2.0  # a worker that was told to stop and does not leave is killed

_SIGNALS: Final = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGCHLD,
)


class State(Enum):
    """BOOTING -> RUNNING -> DRAINING -> STOPPING -> STOPPED; a fast stop skips DRAINING."""

    BOOTING = "booting"
    RUNNING = "running"
    DRAINING = "draining"
    STOPPING = "stopping"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class MasterSpec:
    """What the command line decided. ``title`` names the configuration in the process list."""

    config: Config
    workers: int
    title: str


class Master:
    """The supervising process of one instance. Owns all listening sockets."""

    def __init__(self, spec: MasterSpec) -> None:
        self._spec = spec
        self._config = spec.config
        self._generation = 1
        self._serial = 0
        self._state = State.BOOTING
        self._deadline = 0.0
        self._is_announced = False
        self._table = listeners.ListenerTable()
        self._binds: dict[str, tuple[BindAddress, ...]] = {}
        self._slots = [Slot(index) for index in range(spec.workers)]
        self._pid_file: PidFile | None = None
        self._selector = selectors.DefaultSelector()
        self._signals: SignalQueue | None = None

    def run(self) -> ExitCode:
        """Bind, start the workers, supervise them until stopped. Raises StartupError."""
        try:
            self._boot()
            while self._state is not State.STOPPED:
                self._turn()
        finally:
            self._close()
            if self._pid_file is not None:
                self._pid_file.remove()
        return ExitCode.OK

    # -- start and end

    def _boot(self) -> None:
        _raise_descriptor_limit()
        if self._config.settings.pid_file is not None:
            self._pid_file = PidFile(self._config.settings.pid_file)
        self._signals = SignalQueue(_SIGNALS)
        self._selector.register(self._signals.fileno(), selectors.EVENT_READ, None)
        self._binds = listeners.bind_addresses(self._config)
        self._table.add(self._rules_by_address(), len(self._slots))
        setproctitle.setproctitle(f"forwarder: master [{self._spec.title}]")
        # What exists now is shared with the workers: the collector must not write into it.
        gc.collect()
        gc.freeze()
        self._state = State.RUNNING
        self._supervise()

    def _close(self) -> None:
        """Give up what the master owns, but the pid file; a forked child does the same."""
        self._table.close()
        if self._signals is not None:
            self._signals.close()
        self._selector.close()

    def _stop(self, *, is_fast: bool) -> None:
        """Begin to stop, or hurry a stop that has begun."""
        workers = self._processes()
        if is_fast or self._state is State.DRAINING:
            op, self._state, patience = messages.Op.STOP, State.STOPPING, KILL_AFTER_S
        elif self._state is State.RUNNING:
            op, self._state, patience = messages.Op.DRAIN, State.DRAINING, STOP_TIMEOUT_S
        else:
            return
        log.info("master.stopping how=%s workers=%d", op, len(workers))
        notify.notify("STOPPING=1")
        self._deadline = time.monotonic() + patience
        for process in workers:
            process.state = WorkerState.DRAINING
            self._send(process, {"op": op})

    # -- one turn

    def _turn(self) -> None:
        """Wait, hear, reap, decide, act."""
        for key, _ in self._selector.select(self._patience()):
            if key.data is None:
                self._hear_signals()
            else:
                self._hear_worker(key.data)
        if self._state is State.RUNNING:
            self._supervise()
        elif not self._processes():
            self._state = State.STOPPED
        elif time.monotonic() >= self._deadline:
            self._on_deadline()

    def _patience(self) -> float | None:
        """Seconds until something has to be done without being asked; None for never."""
        if self._state is not State.RUNNING:
            return max(0.0, self._deadline - time.monotonic())
        waiting = [slot.backoff.not_before for slot in self._slots if slot.process is None]
        return max(0.0, min(waiting) - time.monotonic()) if waiting else None

    def _hear_signals(self) -> None:
        if self._signals is None:
            return
        for number in self._signals.take():
            if number is signal.SIGCHLD:
                self._reap()
            elif number is signal.SIGTERM:
                self._stop(is_fast=False)
            elif number in (signal.SIGINT, signal.SIGQUIT):
                self._stop(is_fast=True)
            else:
                log.warning("master: %s is not supported yet and was ignored", number.name)

    def _on_deadline(self) -> None:
        if self._state is State.DRAINING:
            log.warning("master: sessions are left after %.0f s, ending them", STOP_TIMEOUT_S)
            self._stop(is_fast=True)
            return
        self._deadline = time.monotonic() + KILL_AFTER_S
        for process in self._processes():
            log.error("master: worker %d pid=%d does not stop, killing it", *_names(process))
            process.signal(signal.SIGKILL)

    # -- workers

    def _processes(self) -> list[WorkerProcess]:
        return [slot.process for slot in self._slots if slot.process is not None]

    def _supervise(self) -> None:
        """Start what is missing, and share the sockets out."""
        now = time.monotonic()
        for slot in self._slots:
            if slot.process is None and now >= slot.backoff.not_before:
                self._start_worker(slot, now)
        self._assign()

    def _start_worker(self, slot: Slot, now: float) -> None:
        try:
            process = fork_worker(slot.index, now, lambda channel: self._become(slot, channel))
        except OSError as err:
            slot.backoff.on_death(now, now)
            log.error("master: cannot start worker %d: %s", slot.index, err.strerror)
            return
        slot.process = process
        self._selector.register(process.channel, selectors.EVENT_READ, process)

    def _become(self, slot: Slot, channel: Channel) -> None:
        """In the forked child: give up everything of the master, then be a worker."""
        for process in self._processes():
            process.channel.close()
        self._close()
        if self._pid_file is not None:
            self._pid_file.close_in_child()
        settings = self._config.settings
        worker.run_and_exit(
            worker.WorkerSpec(
                slot=slot.index,
                channel=channel,
                relay=settings.relay,
                pipe_budget_pages=pipes.budget_pages(len(self._slots)),
            )
        )

    def _hear_worker(self, process: WorkerProcess) -> None:
        try:
            process.channel.flush()
            for received in process.channel.receive():
                self._handle(process, received.message)
        except ChannelClosed:
            self._selector.unregister(process.channel)
            process.channel.close()
            return  # its death is reported by SIGCHLD
        self._watch(process)

    def _handle(self, process: WorkerProcess, message: dict[str, object]) -> None:
        if message["op"] == messages.Op.APPLIED:
            serial = message["serial"]
            process.applied_serial = serial if isinstance(serial, int) else 0
            if process.state is WorkerState.STARTING:
                process.state = WorkerState.READY
                log.info("worker.ready slot=%d pid=%d", *_names(process))
                self._on_ready()

    def _on_ready(self) -> None:
        if self._is_announced or self._state is not State.RUNNING:
            return
        if all(process.state is WorkerState.READY for process in self._processes()):
            self._is_announced = True
            log.info(
                "master.ready pid=%d workers=%d rules=%d generation=%d",
                os.getpid(),
                len(self._slots),
                len(self._config.rules),
                self._generation,
            )
            notify.notify("READY=1", f"STATUS={len(self._config.rules)} rules")

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for slot in self._slots:
                if slot.process is not None and slot.process.pid == pid:
                    self._on_death(slot, slot.process, os.waitstatus_to_exitcode(status))

    def _on_death(self, slot: Slot, process: WorkerProcess, code: int) -> None:
        slot.process = None
        if process.channel.fileno() >= 0:
            self._selector.unregister(process.channel)
            process.channel.close()
        if process.state is WorkerState.DRAINING:
            return
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        delay = slot.backoff.on_death(process.started_at, time.monotonic())
        log.error(
            "worker.died slot=%d pid=%d: %s; its sockets stay open, next start in %.1f s%s",
            *_names(process),
            how,
            delay,
            " (crash loop)" if slot.backoff.is_crash_loop else "",
        )

    # -- sockets

    def _rules_by_address(self) -> dict[BindAddress, Rule]:
        return {address: rule for rule in self._config.rules for address in self._binds[rule.name]}

    def _assign(self) -> None:
        """Tell each worker whose share of the sockets has changed what it serves now."""
        by_state: dict[WorkerState, list[int]] = {state: [] for state in WorkerState}
        for process in self._processes():
            by_state[process.state].append(process.slot)
        shares = supervision.share_sockets(
            len(self._slots), by_state[WorkerState.READY], by_state[WorkerState.STARTING]
        )
        for process in self._processes():
            if process.slot in shares:
                self._give(process, shares[process.slot])

    def _give(self, process: WorkerProcess, socket_slots: list[int]) -> None:
        descriptors: dict[int, int] = {}
        routes: dict[int, int] = {}
        for index, rule in enumerate(self._config.rules):
            for address in self._binds[rule.name]:
                mine = self._table.descriptors(address, socket_slots)
                descriptors |= mine
                routes |= dict.fromkeys(mine, index)
        if routes == process.routes and process.sent_serial:
            return
        self._serial += 1
        new = {i: fd for i, fd in descriptors.items() if i not in process.known_sockets}
        try:
            messages.send_sockets(process.channel, new)
            messages.send_assignment(
                process.channel,
                messages.Assignment(
                    serial=self._serial,
                    generation=self._generation,
                    config=self._config,
                    routes=routes,
                ),
            )
        except ChannelClosed:
            return  # it has died; SIGCHLD follows
        process.known_sockets = set(routes)
        process.routes = routes
        process.sent_serial = self._serial
        self._watch(process)

    def _send(self, process: WorkerProcess, message: dict[str, object]) -> None:
        try:
            process.channel.send(message)
        except ChannelClosed:
            return
        self._watch(process)

    def _watch(self, process: WorkerProcess) -> None:
        """Ask for writability exactly while something waits for the worker."""
        events = selectors.EVENT_READ
        if process.channel.has_outbox:
            events |= selectors.EVENT_WRITE
        if self._selector.get_key(process.channel).events != events:
            self._selector.modify(process.channel, events, process)


def _raise_descriptor_limit() -> None:
    """Use all descriptors we may have; the soft limit is 1,024 on many systems, for select()."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS refuses "unlimited"; the soft limit then stays
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _names(process: WorkerProcess) -> tuple[int, int]:
    return process.slot, process.pid
