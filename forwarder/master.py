"""Room 1: bind, start the workers, supervise, reload, stop. Never touches client data nor blocks.

A plain ``selectors`` wait over signals and worker channels: no asyncio loop and no thread, because
a process that forks must have neither. How workers are run is the fleet's.
"""

from __future__ import annotations

import gc
import logging
import math
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

from forwarder import __version__, inherit, notify, upgrade
from forwarder.config.model import STOP_TIMEOUT_S
from forwarder.errors import ExitCode, StartupError
from forwarder.fleet import Fleet
from forwarder.heartbeat import MAX_SLOTS
from forwarder.latebind import LateBinds
from forwarder.messages import Op
from forwarder.pidfile import PidFile
from forwarder.privileges import identity_of, keep_capabilities_of_a_master
from forwarder.reload import Candidate, Loading, Rejected
from forwarder.requests import Requests
from forwarder.service import Service
from forwarder.signals import SignalQueue
from forwarder.slot import WorkerProcess
from forwarder.upgrade import Successor

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable

    from forwarder.config.model import Config

log = logging.getLogger(__name__)

_UPGRADING: Final = "an upgrade is under way; ask the new one when it serves"
KILL_AFTER_S: Final = 2.0  # a worker that was told to stop and does not leave is killed

_SIGNALS: Final = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
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
    ``has_control``: whether there is a control socket, at ``settings.control`` or a default place.
    """

    config: Config
    title: str
    load: Callable[[], Config] | None = None
    has_control: bool = False


class Master:
    """The supervising process of one instance. Owns all listening sockets."""

    def __init__(self, spec: MasterSpec) -> None:
        self._spec = spec
        self._state = State.BOOTING
        self._deadline = 0.0
        self._is_announced = False
        self._has_heir = False  # after an upgrade
        self._service = Service(spec.config)
        self._selector = selectors.DefaultSelector()
        self._fleet = Fleet(self._service.table, self._selector, self._release_in_child)
        self._late = LateBinds(
            self._service,
            self._selector,
            self._release_in_child,
            slots=lambda: self._fleet.size,
            on_bound=self._serve_anew,
        )
        self._signals: SignalQueue | None = None
        self._pid_file: PidFile | None = None
        self._loading: Loading | None = None
        self._is_reload_wanted = False
        self._successor: Successor | None = None
        self._requests = Requests(self)
        self._started_at = time.monotonic()
        self._watchdog = notify.Watchdog(os.environ, os.getpid(), self._started_at)
        self._report: str | None = None  # of a reload that not all workers have acknowledged yet

    def run(self) -> ExitCode:
        """Bind, start the workers, supervise them until stopped. Raises StartupError."""
        try:
            self._boot()
            while self._state is not State.STOPPED:
                self._turn()
        except StartupError:
            # There are workers if we are a successor that cannot take over: none shall be left.
            for process in self._fleet.processes():
                process.signal(signal.SIGKILL)
            raise
        finally:
            self._service.table.release()
            self._service.table.remove_files()
            self._close()
            self._requests.remove_file()
            if self._pid_file is not None:
                self._pid_file.remove()
        return ExitCode.OK

    # -- start and end

    def _boot(self) -> None:
        _raise_descriptor_limit()
        config = self._service.config
        if config.settings.pid_file is not None:
            self._pid_file = PidFile(config.settings.pid_file)
        self._fleet.identity = identity_of(config.settings.user, config.settings.group)
        self._signals = SignalQueue(_SIGNALS)
        self._selector.register(self._signals.fileno(), selectors.EVENT_READ, self._hear_signals)
        self._service.open(self._inherited)
        if not upgrade.has_predecessor():
            self._open_control()
        self._fleet.serving = self._service.serving()
        self._fleet.resize(config.settings.workers)
        setproctitle.setproctitle(f"forwarder: master [{self._spec.title}]")
        # What exists now is shared with the workers: the collector must not write into it.
        gc.collect()
        gc.freeze()
        if self._fleet.identity is not None:
            keep_capabilities_of_a_master()
        self._state = State.RUNNING

    def _inherited(self, is_wanted: Callable[[socket.socket], bool]) -> list[socket.socket]:
        """Listening sockets that somebody hands to us: see ``inherit``."""
        given = inherit.from_environment()
        if not upgrade.has_predecessor():
            identity = self._fleet.identity
            uid = os.geteuid() if identity is None else identity.uid
            given += inherit.from_orphans(uid, is_wanted)
        return given

    def _open_control(self) -> None:
        if self._spec.has_control:
            path = self._service.config.settings.control
            replaces = upgrade.control_of_predecessor()
            self._requests.open(self._selector, path, replaces=replaces)

    def _close(self) -> None:
        """Give up what the master owns, but sockets and pid file; a forked child does the same."""
        self._late.close()
        if self._loading is not None:
            self._loading.close()
        if self._signals is not None:
            self._signals.close()
        if self._successor is not None:
            self._successor.close()
        self._requests.close()
        self._selector.close()

    def _release_in_child(self) -> None:
        self._service.table.release_in_child()
        self._fleet.hang_up()
        self._close()
        upgrade.release_predecessor()
        if self._pid_file is not None:
            self._pid_file.close_in_child()

    def _stop(self, *, is_fast: bool) -> None:
        """Begin to stop, or hurry a stop that has begun."""
        if is_fast or self._state is State.DRAINING:
            op, self._state, patience = Op.STOP, State.STOPPING, KILL_AFTER_S
        elif self._state is State.RUNNING:
            limit_s = self._service.config.settings.drain_timeout_s
            patience = STOP_TIMEOUT_S if limit_s is None else limit_s or math.inf
            op, self._state = Op.DRAIN, State.DRAINING
        else:
            return
        workers = self._fleet.processes()
        log.info("master.stopping how=%s workers=%d", op, len(workers))
        if not self._has_heir:
            notify.notify("STOPPING=1")
        if self._successor is not None:
            self._successor.give_up(time.monotonic())
        self._requests.on_stopping()
        if self._loading is not None:
            self._loading.cancel()
            self._end_loading(Rejected(("the forwarder is stopping",)))
        self._late.cancel()
        self._deadline = time.monotonic() + patience
        # Ours are the last copies once the workers, which serve what is queued first, have let go:
        # who comes now is refused at once instead of waiting in a queue that nobody serves.
        self._service.table.close()
        for process in workers:
            self._fleet.tell(process, op)

    # -- one turn

    def _turn(self) -> None:
        """Act, then wait and hear."""
        if self._watchdog.turn(time.monotonic()):
            notify.notify("WATCHDOG=1")
        if self._successor is not None and time.monotonic() >= self._successor.deadline:
            self._successor.give_up(time.monotonic())
        if self._state is State.RUNNING:
            self._fleet.supervise()
            self._settle()
        elif not self._fleet.processes() and self._successor is None:
            self._state = State.STOPPED
            self._requests.on_stopped()
            return
        elif time.monotonic() >= self._deadline:
            self._on_deadline()
        self._requests.turn()
        for key, _ in self._selector.select(self._patience()):
            if isinstance(key.data, WorkerProcess):
                self._fleet.hear(key.data)
            else:
                key.data()

    def _patience(self) -> float | None:
        """Seconds until something has to be done without being asked; None for never."""
        if self._state is State.RUNNING:
            deadlines = [self._fleet.next_deadline()]
            deadlines += self._service.deadlines()
            deadlines += [self._loading.deadline if self._loading is not None else None]
            deadlines += [self._late.deadline if self._may_bind_late else None]
        else:
            deadlines = [self._deadline]
        deadlines += [self._requests.deadline, self._watchdog.deadline]
        deadlines += [self._successor.deadline if self._successor is not None else None]
        known = [deadline for deadline in deadlines if deadline is not None]
        first = min(known, default=math.inf)
        return None if first == math.inf else max(0.0, first - time.monotonic())

    def _hear_signals(self) -> None:
        for number in self._signals.take() if self._signals is not None else ():
            if number is signal.SIGCHLD:
                self._reap()
            elif number is signal.SIGHUP:
                self._is_reload_wanted = self._successor is not None
                self.reload()
            elif number is signal.SIGUSR1:
                log.info("master: SIGUSR1: there is no log file to reopen")
            elif number is signal.SIGUSR2:
                self.upgrade()
            elif number is signal.SIGTTIN:
                self.resize(self._fleet.size + 1)
            elif number is signal.SIGTTOU:
                self.resize(self._fleet.size - 1)
            else:
                self._stop(is_fast=number is not signal.SIGTERM)

    def _on_deadline(self) -> None:
        if self._state is State.DRAINING:
            log.warning("master: sessions are left after drain_timeout, ending them")
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
                if self._successor is not None and pid == self._successor.pid:
                    self._on_failed_upgrade(self._successor, upgrade.describe_end(status))

    def _settle(self) -> None:
        """See what has become true since the last turn: time is over, or all have acknowledged."""
        now = time.monotonic()
        if self._loading is not None and now >= self._loading.deadline:
            self._loading.cancel()
            self._end_loading(Rejected(("reading the configuration took too long",)))
        if self._may_bind_late:
            self._late.turn(now)
        if self._service.expire(now):
            self._serve_anew()
        if not self._fleet.is_settled:
            return
        self._service.close_dropped()
        if self._report is not None:
            log.info("master.reloaded %s", self._report)
            notify.notify("READY=1", f"STATUS={self._report}")
            self._report = None
        self._requests.on_settled()
        if not self._is_announced:
            self._is_announced = True
            log.info(
                "master.ready pid=%d workers=%d rules=%d generation=%d",
                os.getpid(),
                self._fleet.size,
                len(self._service.config.rules),
                self._service.generation,
            )
            if upgrade.has_predecessor():
                # Only now, since a successor that fails must not take them.
                self._open_control()
                if self._pid_file is not None:
                    self._pid_file.claim()
            self._service.own()
            notify.notify(
                f"MAINPID={os.getpid()}",
                "READY=1",
                f"STATUS={len(self._service.config.rules)} rules",
            )
            upgrade.tell_predecessor()

    @property
    def _may_bind_late(self) -> bool:
        """A reload tries all rules itself, and a successor must not meet us where it tries."""
        return self._loading is None and self._successor is None

    def _serve_anew(self) -> None:
        """Tell the workers what the service has come to serve."""
        self._fleet.serving = self._service.serving()
        self._fleet.supervise()

    # -- what clients of the control socket may ask, see requests.Instance

    @property
    def size(self) -> int:
        """How many workers there shall be."""
        return self._fleet.size

    def stop(self) -> None:
        """Let sessions end, then stop; when called again, do not let them end."""
        self._stop(is_fast=False)

    def status(self) -> dict[str, object]:
        """Describe the instance: what it serves and what it has done."""
        now = time.monotonic()
        rules = self._service.config.rules
        counters = self._fleet.tally.rules(rule.name for rule in rules)
        return {
            "version": __version__,
            "pid": os.getpid(),
            "title": self._spec.title,
            "state": self._state.value,
            "generation": self._service.generation,
            "uptime_s": round(now - self._started_at, 1),
            "control": self._requests.path,
            "totals": self._fleet.tally.totals(),
            "workers": self._fleet.describe(now),
            "rules": self._service.describe_rules(counters, now),
        }

    def resize(self, size: int) -> str:
        """Begin to have ``size`` workers. Returns why not, or ""."""
        if self._state is not State.RUNNING or not 1 <= size <= MAX_SLOTS:
            problem = f"{size} workers are not possible; 1 to {MAX_SLOTS} are"
            log.warning("master: %s", problem)
            return problem
        if self._successor is not None:
            log.warning("master: %s", _UPGRADING)
            return _UPGRADING
        try:
            self._service.grow(size)
        except StartupError as err:
            log.error("master: cannot have %d workers: %s", size, err)
            return f"cannot have {size} workers: {err}"
        self._fleet.resize(size)
        self._is_announced = False
        return ""

    # -- reload

    def reload(self) -> str:
        """Begin to read the configuration anew; one reload at a time, a further one follows it.

        Returns why not, or "".
        """
        load = self._spec.load
        problem = ""
        if self._state is not State.RUNNING:
            return "the forwarder is stopping"
        if load is None:
            problem = "nothing to reload, the rules came from the command line"
        elif self._successor is not None:
            problem = _UPGRADING
        if problem:
            log.warning("master: %s", problem)
        elif self._loading is not None:
            self._is_reload_wanted = True
        elif load is not None:
            self._begin_loading(load)
        return problem

    def _begin_loading(self, load: Callable[[], Config]) -> None:
        self._requests.on_loading()
        now = time.monotonic()
        # systemd waits for ever for a reload that names no time (sd_notify(3), MONOTONIC_USEC).
        notify.notify("RELOADING=1", f"MONOTONIC_USEC={int(now * 1e6)}")
        try:
            self._loading = Loading(load, self._release_in_child, now)
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
        elif self._state is State.RUNNING:  # told to stop meanwhile: nothing to begin
            self._begin_generation(found)
        if self._is_reload_wanted:
            self._is_reload_wanted = False
            self.reload()

    def _reject(self, problems: Iterable[str]) -> None:
        """Keep everything as it is, and say why."""
        for problem in problems:
            log.error("reload.rejected %s", problem)
        log.error("master: generation %d stays in force", self._service.generation)
        self._requests.on_rejected(problems)
        notify.notify("READY=1", "STATUS=reload rejected, see the log")

    def _begin_generation(self, candidate: Candidate) -> None:
        """Put it in force and tell the workers, or refuse it whole."""
        # A size that was set by signal stays, unless the configuration itself asks for another.
        wanted = candidate.config.settings.workers
        is_resized = wanted != self._service.config.settings.workers
        size = wanted if is_resized else self._fleet.size
        try:
            self._late.cancel()  # this tries them all
            self._report = self._service.begin(candidate, size)
        except StartupError as err:
            self._reject((str(err),))
            return
        self._requests.on_accepted(self._report, self._service.generation)
        self._fleet.tally.forget_rules(rule.name for rule in candidate.config.rules)
        self._fleet.serving = self._service.serving()
        self._fleet.resize(size)

    # -- upgrade

    def upgrade(self) -> str:
        """Start the installed code beside this one; when it serves, let our sessions end.

        Does nothing more if that is under way. Returns why not, or "".
        """
        problem = ""
        if self._successor is not None:
            return ""
        if self._state is not State.RUNNING:
            problem = "the forwarder is stopping"
        elif self._loading is not None:
            problem = "a reload is under way; try again when it is over"
        elif os.getpid() == 1:
            problem = "not possible as process 1 of a container: start a new container"
        else:
            try:
                self._begin_upgrade()
            except OSError as err:
                problem = f"cannot execute the new code: {err}"
        if problem:
            log.error("upgrade: %s", problem)
        return problem

    def _begin_upgrade(self) -> None:
        self._late.cancel()
        sockets = self._service.table.all_sockets()
        path = self._requests.path
        self._successor = Successor(sockets, self._pid_file, path, time.monotonic())
        self._selector.register(self._successor, selectors.EVENT_READ, self._hear_successor)
        log.info("upgrade: started pid=%d", self._successor.pid)

    def _hear_successor(self) -> None:
        successor = self._successor
        is_ready = successor.is_ready() if successor is not None else None
        if successor is None or is_ready is None:
            return
        self._selector.unregister(successor)
        if is_ready and self._state is State.RUNNING:
            self._on_upgraded(successor)
        # Else it is ending, or was told to: SIGCHLD follows and says how.

    def _on_upgraded(self, successor: Successor) -> None:
        self._close_successor(successor)
        self._has_heir = True
        self._service.table.disown()
        log.info("upgrade: pid=%d serves; letting our sessions end", successor.pid)
        # It has said so itself, but a service manager may believe the process it knows only.
        notify.notify(f"MAINPID={successor.pid}")
        self._requests.on_upgraded(f"pid {successor.pid} serves, the old one drains", is_done=True)
        if self._pid_file is not None:
            self._pid_file.leave_to(successor.pid)
            self._pid_file = None
        if self._is_reload_wanted:  # it may have read the configuration before it was changed
            os.kill(successor.pid, signal.SIGHUP)
        self._stop(is_fast=False)
        if self._service.config.settings.drain_timeout_s is None:
            self._deadline = math.inf  # nobody waits for this process; a signal hurries it

    def _on_failed_upgrade(self, successor: Successor, how: str) -> None:
        """It has ended; we have reaped it."""
        self._close_successor(successor)
        problem = f"pid {successor.pid} did not come to serve ({how}); this one goes on"
        if self._pid_file is not None:
            self._pid_file.claim()
        if self._state is not State.RUNNING:
            return
        log.error("upgrade: %s", problem)
        self._requests.on_upgraded(problem, is_done=False)
        if self._is_reload_wanted:
            self._is_reload_wanted = False
            self.reload()

    def _close_successor(self, successor: Successor) -> None:
        with suppress(KeyError):  # it has said its last word
            self._selector.unregister(successor)
        successor.close()
        self._successor = None


def _raise_descriptor_limit() -> None:
    """Use all descriptors we may have; the soft limit is 1,024 on many systems, for select()."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS refuses "unlimited"; the soft limit then stays
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
