"""Room 1: bind, start the workers, supervise, reload, stop. Never touches client data nor blocks.

A plain ``selectors`` wait over signals and worker channels: no asyncio loop and no thread, because
a process that forks must have neither. How workers are run is the fleet's.
"""

from __future__ import annotations

import dataclasses
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

from forwarder import notify
from forwarder.config.plan import diff
from forwarder.errors import ExitCode, StartupError
from forwarder.fleet import Fleet, Serving
from forwarder.heartbeat import MAX_SLOTS
from forwarder.listeners import ListenerTable, bind_addresses
from forwarder.messages import Op
from forwarder.pidfile import PidFile
from forwarder.reload import Candidate, Loading, Rejected
from forwarder.signals import SignalQueue
from forwarder.slot import WorkerProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from forwarder.config.model import Config, Rule
    from forwarder.listeners import BindAddress

log = logging.getLogger(__name__)

STOP_TIMEOUT_S: Final = 30.0  # a graceful stop waits this long for sessions, then resets them
KILL_AFTER_S: Final = 2.0  # a worker that was told to stop and does not leave is killed
# How long the sockets of a removed rule are still served after new handshakes are turned away:
# time for those under way to finish, one retransmission included.
CLOSE_GRACE_S: Final = 1.5

_SIGNALS: Final = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGTTIN,
    signal.SIGTTOU,
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
    """What the command line decided.

    ``config`` is the first configuration; its ``settings.workers`` is not 0.
    ``title`` names it in the process list. ``load`` reads it anew for a reload, under the same
    command line; it runs in a process of its own and may block and raise. None: nothing to reload.
    """

    config: Config
    title: str
    load: Callable[[], Config] | None = None


class Master:
    """The supervising process of one instance. Owns all listening sockets."""

    def __init__(self, spec: MasterSpec) -> None:
        self._spec = spec
        self._state = State.BOOTING
        self._deadline = 0.0
        self._is_announced = False
        self._table = ListenerTable()
        self._selector = selectors.DefaultSelector()
        self._fleet = Fleet(self._table, self._selector, self._release_in_child)
        self._config = spec.config
        self._binds: dict[str, tuple[BindAddress, ...]] = {}
        self._generation = 1
        self._revision = 0
        self._signals: SignalQueue | None = None
        self._pid_file: PidFile | None = None
        self._loading: Loading | None = None
        self._is_reload_wanted = False
        self._report: str | None = None  # of a reload that not all workers have acknowledged yet
        # Addresses of removed rules: first still served, until a time, then dropped by all workers.
        self._closing: dict[BindAddress, tuple[Rule, float]] = {}
        self._dropped: set[BindAddress] = set()

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
        config = self._config
        if config.settings.pid_file is not None:
            self._pid_file = PidFile(config.settings.pid_file)
        self._signals = SignalQueue(_SIGNALS)
        self._selector.register(self._signals.fileno(), selectors.EVENT_READ, self._hear_signals)
        self._binds = bind_addresses(config)
        self._table.add(_rules_by_address(config, self._binds), config.settings.workers)
        self._serve()
        self._fleet.resize(config.settings.workers)
        setproctitle.setproctitle(f"forwarder: master [{self._spec.title}]")
        # What exists now is shared with the workers: the collector must not write into it.
        gc.collect()
        gc.freeze()
        self._state = State.RUNNING

    def _close(self) -> None:
        """Give up what the master owns, but the pid file; a forked child does the same."""
        self._table.close()
        if self._loading is not None:
            self._loading.close()
        if self._signals is not None:
            self._signals.close()
        self._selector.close()

    def _release_in_child(self) -> None:
        self._close()
        if self._pid_file is not None:
            self._pid_file.close_in_child()

    def _stop(self, *, is_fast: bool) -> None:
        """Begin to stop, or hurry a stop that has begun."""
        if is_fast or self._state is State.DRAINING:
            op, self._state, patience = Op.STOP, State.STOPPING, KILL_AFTER_S
        elif self._state is State.RUNNING:
            op, self._state, patience = Op.DRAIN, State.DRAINING, STOP_TIMEOUT_S
        else:
            return
        workers = self._fleet.processes()
        log.info("master.stopping how=%s workers=%d", op, len(workers))
        notify.notify("STOPPING=1")
        self._deadline = time.monotonic() + patience
        for process in workers:
            self._fleet.tell(process, op)

    # -- one turn

    def _turn(self) -> None:
        """Act, then wait and hear."""
        if self._state is State.RUNNING:
            self._fleet.supervise()
            self._settle()
        elif not self._fleet.processes():
            self._state = State.STOPPED
            return
        elif time.monotonic() >= self._deadline:
            self._on_deadline()
        for key, _ in self._selector.select(self._patience()):
            if isinstance(key.data, WorkerProcess):
                self._fleet.hear(key.data)
            else:
                key.data()

    def _patience(self) -> float | None:
        """Seconds until something has to be done without being asked; None for never."""
        if self._state is State.RUNNING:
            deadlines = [self._fleet.next_deadline()]
            deadlines += [until for _, until in self._closing.values()]
            if self._loading is not None:
                deadlines.append(self._loading.deadline)
        else:
            deadlines = [self._deadline]
        known = [deadline for deadline in deadlines if deadline is not None]
        return max(0.0, min(known) - time.monotonic()) if known else None

    def _hear_signals(self) -> None:
        for number in self._signals.take() if self._signals is not None else ():
            if number is signal.SIGCHLD:
                self._reap()
            elif number is signal.SIGHUP:
                self.reload()
            elif number is signal.SIGTTIN:
                self._resize(self._fleet.size + 1)
            elif number is signal.SIGTTOU:
                self._resize(self._fleet.size - 1)
            else:
                self._stop(is_fast=number is not signal.SIGTERM)

    def _on_deadline(self) -> None:
        if self._state is State.DRAINING:
            log.warning("master: sessions are left after %.0f s, ending them", STOP_TIMEOUT_S)
            self._stop(is_fast=True)
            return
        self._deadline = time.monotonic() + KILL_AFTER_S
        for process in self._fleet.processes():
            log.error(
                "master: worker %d pid=%d does not stop, killing it", process.slot, process.pid
            )
            process.signal(signal.SIGKILL)

    def _reap(self) -> None:
        with suppress(ChildProcessError):  # no child is left
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                self._fleet.on_exit(pid, status)

    def _settle(self) -> None:
        """See what has become true since the last turn: time is over, or all have acknowledged."""
        now = time.monotonic()
        if self._loading is not None and now >= self._loading.deadline:
            self._loading.cancel()
            self._end_loading(Rejected(("reading the configuration took too long",)))
        over = [address for address, (_, until) in self._closing.items() if now >= until]
        if over:
            for address in over:
                del self._closing[address]
            self._dropped.update(over)
            self._serve()
            self._fleet.supervise()
        if not self._fleet.is_settled:
            return
        self._table.close(self._dropped)
        self._dropped.clear()
        if self._report is not None:
            log.info("master.reloaded %s", self._report)
            notify.notify("READY=1", f"STATUS={self._report}")
            self._report = None
        if not self._is_announced:
            self._is_announced = True
            log.info(
                "master.ready pid=%d workers=%d rules=%d generation=%d",
                os.getpid(),
                self._fleet.size,
                len(self._config.rules),
                self._generation,
            )
            notify.notify("READY=1", f"STATUS={len(self._config.rules)} rules")

    # -- what is served

    def _serve(self) -> None:
        """Hand the fleet what is to be served now: the configuration, and what is being closed."""
        binds = dict(self._binds)
        rules = list(self._config.rules)
        for address, (rule, _) in self._closing.items():
            name = f"{rule.name} at {address.target}, closing"
            rules.append(dataclasses.replace(rule, name=name))
            binds[name] = (address,)
        self._revision += 1
        self._fleet.serving = Serving(
            revision=self._revision,
            generation=self._generation,
            config=dataclasses.replace(self._config, rules=tuple(rules)),
            binds=binds,
        )

    def _resize(self, size: int) -> None:
        if self._state is not State.RUNNING or not 1 <= size <= MAX_SLOTS:
            log.warning("master: %d workers are not possible; 1 to %d are", size, MAX_SLOTS)
            return
        try:
            self._table.grow(_rules_by_address(self._config, self._binds), size)
        except StartupError as err:
            log.error("master: cannot have %d workers: %s", size, err)
            return
        self._fleet.resize(size)
        self._is_announced = False

    # -- reload

    def reload(self) -> None:
        """Begin to read the configuration anew; one reload at a time, a further one follows it."""
        if self._state is not State.RUNNING:
            return
        if self._spec.load is None:
            log.warning("master: nothing to reload, the rules came from the command line")
            return
        if self._loading is not None:
            self._is_reload_wanted = True
            return
        now = time.monotonic()
        # systemd waits for ever for a reload that names no time (sd_notify(3), MONOTONIC_USEC).
        notify.notify("RELOADING=1", f"MONOTONIC_USEC={int(now * 1e6)}")
        try:
            self._loading = Loading(self._spec.load, self._release_in_child, now)
        except OSError as err:
            self._reject((f"cannot start a process to read the configuration: {err.strerror}",))
            return
        self._selector.register(self._loading, selectors.EVENT_READ, self._hear_loading)

    def _hear_loading(self) -> None:
        found = self._loading.result() if self._loading is not None else None
        if found is not None:
            self._end_loading(found)

    def _end_loading(self, found: Candidate | Rejected) -> None:
        if self._loading is not None:
            self._selector.unregister(self._loading)
            self._loading.close()
            self._loading = None
        if isinstance(found, Rejected):
            self._reject(found.problems)
        else:
            self._begin_generation(found)
        if self._is_reload_wanted:
            self._is_reload_wanted = False
            self.reload()

    def _reject(self, problems: Iterable[str]) -> None:
        """Keep everything as it is, and say why."""
        for problem in problems:
            log.error("reload.rejected %s", problem)
        log.error("master: generation %d stays in force", self._generation)
        notify.notify("READY=1", "STATUS=reload rejected, see the log")

    def _begin_generation(self, candidate: Candidate) -> None:
        """Bind what is new; if that succeeds the candidate is in force, else nothing changed."""
        old, new = self._config, candidate.config
        wanted = _rules_by_address(new, candidate.binds)
        added = [address for address in wanted if address not in self._table]
        # A size that was set by signal stays, unless the configuration itself asks for another.
        is_resized = new.settings.workers != old.settings.workers
        size = new.settings.workers if is_resized else self._fleet.size
        try:
            self._table.add(wanted, size)
            self._table.grow(wanted, size)
        except StartupError as err:
            self._table.close(added)
            self._reject((str(err),))
            return
        before = _rules_by_address(old, self._binds)
        self._generation += 1
        self._report = f"{diff(old, new)}, generation {self._generation}"
        self._config, self._binds = new, candidate.binds
        for address in wanted:
            self._table.accept_handshakes(address)  # it may have been about to be closed
            self._closing.pop(address, None)
            self._dropped.discard(address)
        until = time.monotonic() + CLOSE_GRACE_S
        for address in before.keys() - wanted.keys():
            self._table.refuse_handshakes(address)
            self._closing[address] = (before[address], until)
        self._serve()
        self._fleet.resize(size)
        for setting in ("relay", "pid_file"):
            if getattr(old.settings, setting) != getattr(new.settings, setting):
                log.warning("reload: a change of %s takes effect at the next start", setting)


def _rules_by_address(
    config: Config, binds: Mapping[str, tuple[BindAddress, ...]]
) -> dict[BindAddress, Rule]:
    return {address: rule for rule in config.rules for address in binds[rule.name]}


def _raise_descriptor_limit() -> None:
    """Use all descriptors we may have; the soft limit is 1,024 on many systems, for select()."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS refuses "unlimited"; the soft limit then stays
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
