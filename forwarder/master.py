"""Room 1: bind, start the workers, supervise, reload, stop. Never touches client data nor blocks.

A plain ``selectors`` wait over signals and worker channels: no asyncio loop and no thread, because
a process that forks must have neither. The fleet runs the workers.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import selectors
import signal
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import setproctitle

from forwarder.config.model import MAX_WORKERS, STOP_TIMEOUT_S
from forwarder.connlog.files import discard
from forwarder.control.requests import STOPPING, UNDER_WAY, Requests
from forwarder.errors import ExitCode, StartupError
from forwarder.serving import probing
from forwarder.serving.latebind import LateBinds
from forwarder.serving.loader import look_up
from forwarder.serving.moving import Moving
from forwarder.serving.reloading import Reloading
from forwarder.serving.service import Service
from forwarder.serving.surroundings import Surroundings
from forwarder.stats.board import BOARD_BYTES
from forwarder.stats.reasons import Phase
from forwarder.succession import upgrade
from forwarder.succession.handover import Handover
from forwarder.succession.inherit import foreign_descriptors
from forwarder.supervision.checking import Checking
from forwarder.supervision.ending import Ending
from forwarder.supervision.fleet import Fleet
from forwarder.supervision.moves import Moves
from forwarder.supervision.spec import MasterSpec, MasterState
from forwarder.supervision.status import Status
from forwarder.supervision.upstreams import Upstreams
from forwarder.supervision.workforce import Workers
from forwarder.system import memfile, notify
from forwarder.system.privileges import (
    drop,
    identity_of,
    keep_capabilities_of_a_master,
    network_capabilities,
    raise_descriptor_limit,
)
from forwarder.system.signals import OF_A_MASTER, SignalQueue
from forwarder.system.surviving import survive

if TYPE_CHECKING:
    from collections.abc import Collection

    from forwarder.control.orders import Wanted
    from forwarder.control.server import Message, Reply
    from forwarder.ipc.messages import Op
    from forwarder.ipc.questions import Answered
    from forwarder.serving.loader import Candidate
    from forwarder.succession.lineage import Elder
    from forwarder.supervision.undertaking import Undertaking

log = logging.getLogger(__name__)


class Master:
    """The supervising process of one instance. Owns all listening sockets."""

    def __init__(self, spec: MasterSpec) -> None:
        """Raises StartupError where memory cannot be shared."""
        foreign = foreign_descriptors()  # before there are any of ours
        memfile.check_limit(BOARD_BYTES)
        self._spec = spec
        self._state = MasterState.BOOTING
        self._is_announced = False
        self._service = Service(
            spec.config,
            on_changed=self._take_serving,
            known=lambda: self._fleet.names.answers,
        )
        self._moving = Moving(
            self._service,
            # A successor gives seats itself, and must not meet us where it does.
            may_change=lambda: self.is_running and not self.is_upgrading,
            on_changed=self._take_members,
        )
        self._selector = selectors.DefaultSelector()
        self._fleet = Fleet(self._service.table, self._selector)
        self._moves = Moves(Workers(self._fleet))
        self._checking = Checking(
            self._fleet,
            self._selector,
            drop=self._drop,
            on_answers=self._take_answers,
            may_check=lambda: not (self._handover.has_heir or upgrade.has_predecessor()),
        )
        self._signals: SignalQueue | None = None
        self._requests = Requests(self)
        self._handover = Handover(
            self,
            self._service,
            self._estate,
            self._fleet.questions,
            self._selector,
            self._requests,
            self._moves,
        )
        self._moves.pass_on = self._handover.pass_on
        self._ending = Ending(self._fleet, self._handover, self)
        self._reloading = Reloading(
            self,
            self._service,
            self._load if spec.load else None,
            self._selector,
            self._requests,
            foreign,
        )
        self._upstreams = Upstreams(self._fleet, self._checking.findings, self._selector)
        self._status = Status(
            spec.title,
            self._service,
            self._fleet,
            self._checking,
            self._requests,
            self._handover,
            self._upstreams,
        )
        self._report: str | None = None  # of a reload that not all workers have acknowledged yet
        # In the order of a turn: parts that change what is served come before the fleet, which
        # passes it to the workers. Also that of a stop: clients get an answer before what they wait
        # for ends.
        self._undertakings: tuple[Undertaking, ...] = (
            notify.Watchdog(os.environ, os.getpid(), time.monotonic()),
            self._handover,
            self._requests,
            self._reloading,
            self._checking,
            self._moving,
            Surroundings(
                self._service,
                self._selector,
                may_change=self._is_quiet,
                on_changed=self._take_serving,
            ),
            LateBinds(
                self._service,
                known=lambda: self._fleet.names.answers,
                slots=lambda: self._fleet.size,
                may_bind=self._is_quiet,
                on_bound=self._take_serving,
            ),
            self._service,
            self._fleet,
            self._moves,
            self._upstreams,
            self._ending,
        )

    def run(self) -> ExitCode:
        """Bind, start the workers, supervise them until stopped. Raises StartupError."""
        try:
            self._boot()
            while self._state is not MasterState.STOPPED:
                survive(self.turn)
        except StartupError:
            # There are workers if we are a successor that cannot take over: none may stay.
            self._fleet.kill("is not to serve, killing it")
            raise
        finally:
            self._close()
        return ExitCode.OK

    # -- start and end

    def _boot(self) -> None:
        raise_descriptor_limit()
        config = self._service.config
        self._handover.lock(config.settings)
        identity = self._fleet.identity = identity_of(config.settings.user, config.settings.group)
        if identity is not None:
            self._service.table.owner = (identity.uid, identity.gid)
        self._fleet.capabilities = network_capabilities() if config.needs_rights else 0
        probing.check(config, self._drop)
        self._signals = SignalQueue(OF_A_MASTER)
        self._selector.register(self._signals.fileno(), selectors.EVENT_READ, self._hear_signals)
        self._checking.naming.inherit(upgrade.names_of_predecessor())
        self._fleet.servers.inherit(upgrade.servers_of_predecessor())
        has_predecessor = upgrade.has_predecessor()
        self._upstreams.begin(config.settings, has_predecessor=has_predecessor)
        inherited = partial(self._handover.inherited_sockets, identity)
        self._service.open(inherited, self._fleet.names.answers)
        if not has_predecessor:
            self._open_control()
        self._fleet.logs.use(self._fleet.logs.prepare(config.settings.logs))
        self._take_serving()
        self._fleet.resize(config.settings.workers)
        setproctitle.setproctitle(f"forwarder: master [{self._spec.title}]")
        # What exists now is shared with the workers: the collector must not write into it.
        gc.collect()
        gc.freeze()
        if identity is not None:
            is_used = config.needs_rights or config.binds_to_devices
            keep_capabilities_of_a_master(network_capabilities() if is_used else 0)
        self._state = MasterState.RUNNING

    def _load(self) -> Candidate:
        """Read the configuration again, and try its socket options; in a forked child."""
        assert self._spec.load is not None  # noqa: S101 - else there is no reload
        config = self._spec.load()
        waiting = self._service.waiting
        probing.check(config, self._drop, waiting)
        return look_up(config, self._fleet.names.answers, waiting)

    def _drop(self) -> None:
        """Keep no more rights than a worker."""
        drop(self._fleet.identity, self._fleet.capabilities)

    def _estate(self) -> upgrade.Estate:
        """What a successor needs to go on where we are."""
        servers = self._fleet.servers
        return upgrade.Estate(
            control=self._requests.path,
            names=self._fleet.names.as_text(),
            servers=servers.as_text(),
            table=servers.table.fileno(),
        )

    def _open_control(self) -> None:
        if self._spec.has_control:
            path = self._service.config.settings.control
            replaces = upgrade.control_of_predecessor()
            self._requests.open(self._selector, path, replaces=replaces)

    def _close(self) -> None:
        """Give up what the master owns; the pid file, which says that there is one, comes last."""
        for one in reversed(self._undertakings):
            one.close()
        if self._signals is not None:
            self._signals.close()
        self._selector.close()

    def _stop(self, *, is_fast: bool, phase: Phase = Phase.SHUTDOWN) -> None:
        """Begin to stop, or hurry a stop that has begun; ``phase`` is why sessions then end."""
        if self._state is MasterState.STOPPING:
            return  # it cannot be hurried more, and must not get its time again
        if is_fast or self._state is MasterState.DRAINING:
            self._state = MasterState.STOPPING
        elif self._state is MasterState.RUNNING:
            self._state = MasterState.DRAINING
        else:
            return
        # A successor that has to give up is not the instance: the one that goes on is.
        if not (self._handover.has_heir or upgrade.has_predecessor()):
            notify.notify("STOPPING=1")
        for one in self._undertakings:
            one.cancel()
        if self._handover.has_heir:
            self._service.table.disown()
        # Ours are the last copies once the workers, which serve what is queued first, have let go:
        # a client that comes now is refused at once instead of waiting in a queue that no worker
        # serves.
        self._service.table.close()
        if self._state is MasterState.STOPPING:
            self._ending.reset(phase, with_those_before=not self._handover.has_heir)
        else:
            limit_s = self._service.config.settings.drain_timeout_s
            if limit_s is None:  # nothing waits for one that has an heir; a signal hurries it
                limit_s = 0 if self._handover.has_heir else STOP_TIMEOUT_S
            self._ending.drain(limit_s or math.inf)

    # -- one turn

    def turn(self) -> None:
        """Act, then wait for events and handle them."""
        now = time.monotonic()
        for one in self._undertakings:
            survive(partial(one.turn, now))
        if self._state is MasterState.RUNNING:
            self._settle(now)
        elif self._ending.is_over:
            self._state = MasterState.STOPPED
            self._handover.say_last_words()
            self._requests.on_stopped(self._ending.sum_up())
            return
        for key, _ in self._selector.select(self._patience()):
            key.data()

    def _patience(self) -> float | None:
        """Seconds until something has to be done without being asked; None for never."""
        deadlines = [one.deadline for one in self._undertakings]
        first = min((at for at in deadlines if at is not None), default=math.inf)
        return None if first == math.inf else max(0.0, first - time.monotonic())

    def _hear_signals(self) -> None:
        for number in self._signals.take() if self._signals is not None else ():
            survive(partial(self._on_signal, number))

    def _on_signal(self, number: signal.Signals) -> None:
        if number is signal.SIGCHLD:
            self._reap()
        elif number is signal.SIGHUP:
            self._handover.note_reload()
            self.reload()
        elif number is signal.SIGUSR1:
            self._ending.sessions.reopen_logs()
        elif number is signal.SIGUSR2:
            self.upgrade()
        elif number is signal.SIGTTIN:
            self.resize(self._fleet.size + 1)
        elif number is signal.SIGTTOU:
            self.resize(self._fleet.size - 1)
        else:
            self._stop(is_fast=number is not signal.SIGTERM)

    def _reap(self) -> None:
        with suppress(ChildProcessError):  # no child is left
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                self._fleet.on_exit(pid, status)
                self._checking.helper.on_exit(pid, status)

    def _settle(self, now: float) -> None:
        """Check whether all workers have acknowledged their assignments, and what that ends."""
        if self._fleet.refusal:
            why, self._fleet.refusal = self._fleet.refusal, ""
            self._reloading.on_refused(why)
            self._fleet.turn(now)  # they get it at once
        if not self._fleet.is_settled:
            return
        self._reloading.on_settled()
        self._service.close_dropped()
        if self._report is not None:
            log.info("master.reloaded %s", self._report)
            notify.notify("READY=1", f"STATUS={self._report}")
            self._report = None
        self._requests.on_settled()
        # If all have died, there is none that has not acknowledged.
        is_served = self._fleet.is_complete and self._service.is_started
        if not self._is_announced and is_served:
            self._is_announced = True
            log.info(
                "master.ready pid=%d workers=%d rules=%d generation=%d",
                os.getpid(),
                self._fleet.size,
                len(self._service.config.rules),
                self._service.generation,
            )
            is_successor = upgrade.has_predecessor()
            self._handover.take_place(self._open_control)
            if is_successor:
                self._upstreams.take_place()

    def _is_quiet(self) -> bool:
        """Whether rules may begin to listen, or stop, by themselves.

        A reload tries all rules itself, and a successor must not meet us where it tries.
        """
        is_busy = self._reloading.is_under_way or self._handover.is_under_way
        return self.is_running and not is_busy

    def _take_serving(self) -> None:
        """Let the workers serve, and the checker check, what the service serves now."""
        self._fleet.serving = self._service.serving()
        self._checking.use(self._fleet.serving, time.monotonic())

    def _take_answers(self, hosts: Collection[str]) -> None:
        """Something new is known of these names."""
        self._service.on_answers(hosts)
        self._moving.note()

    def _take_members(self) -> None:
        """Serve other members of what stands for several servers, as a reload would."""
        is_settled = self._fleet.is_settled
        self._take_serving()
        if is_settled:  # nobody has those any more that were gone before
            self._fleet.forget_rules(with_servers=self._handover.is_alone)

    # -- what clients of the control socket may ask, see requests.Instance

    @property
    def size(self) -> int:
        """How many workers are wanted."""
        return self._fleet.size

    def _why_not(self) -> str:
        """Why nothing may be changed now, or ""."""
        if self._state is not MasterState.RUNNING:
            return STOPPING
        return UNDER_WAY if self.is_upgrading else ""

    def stop(self) -> None:
        """Let sessions end, then stop; when called again, do not let them end."""
        self._stop(is_fast=False)

    def status(self) -> dict[str, object]:
        """Describe the instance: what it serves and what it has done."""
        return self._status.describe(self._state)

    def ask_sessions(self, op: Op, choice: Message, callback: Answered) -> None:
        """Let the workers, and old masters that drain, list (LIST) or end (KILL) some sessions."""
        self._ending.sessions.ask(op, choice, callback)

    def move_sessions(self, choice: Message, slot: int, reply: Reply) -> str:
        """Move some sessions to the worker of a slot. Returns why not; "": it is answered."""
        return self._why_not() or self._moves.order(choice, slot, reply)

    def describe_upstreams(self, only: str | None) -> list[dict[str, object]]:
        """Describe the groups of upstreams with their servers, all or ``only`` this one."""
        return self._upstreams.describe(only)

    def order(self, wanted: Wanted, uid: int, reply: Reply) -> str:
        """Carry out an order of a user about some servers. Returns why not; "": it is answered."""
        # A successor has the orders of before.
        return self._why_not() or self._upstreams.order(wanted, uid, reply)

    def resize(self, size: int) -> str:
        """Begin to change to ``size`` workers. Returns why not, or ""."""
        problem = self._why_not()
        if not (problem or 1 <= size <= MAX_WORKERS):
            problem = f"{size} workers are not possible; 1 to {MAX_WORKERS} are"
        if problem:
            log.warning("master: %s", problem)
            return problem
        try:
            if size > self._fleet.size:  # fewer need nothing, whatever the limits are by now
                self._service.grow(size)
        except StartupError as err:
            log.error("master: cannot have %d workers: %s", size, err)
            return f"cannot have {size} workers: {err}"
        self._fleet.resize(size)
        self._is_announced = False
        return ""

    def reload(self) -> str:
        """Begin a reload, or let one follow that under way. Returns why not, or ""."""
        return self._reloading.request()

    def upgrade(self) -> str:
        """Begin an upgrade, unless one is under way. Returns why not, or ""."""
        return self._handover.start()

    # -- what a handover asks, see handover.Incumbent

    @property
    def is_running(self) -> bool:
        """Whether it serves and is not about to stop."""
        return self._state is MasterState.RUNNING

    @property
    def is_reloading(self) -> bool:
        """Whether a configuration is being read."""
        return self._reloading.is_under_way

    def end(self, phase: Phase) -> None:
        """The time of sessions is up, or the successor wants us gone."""
        self._stop(is_fast=True, phase=phase)

    @property
    def elder(self) -> Elder:
        """What a successor may ask of us."""
        return self._ending

    # -- what a reload asks, see reloading.Reloadable

    @property
    def is_upgrading(self) -> bool:
        """Whether a successor has been started, and has neither the place nor failed."""
        return self._handover.is_under_way

    def change_to(self, candidate: Candidate) -> str:
        """Put it in force, also in the workers. Returns what it changes, for people.

        Raises StartupError; then nothing has changed.
        """
        # A size that was set by signal stays, unless the configuration itself asks for another.
        wanted = candidate.config.settings.workers
        is_resized = wanted != self._service.config.settings.workers
        size = wanted if is_resized else self._fleet.size
        logs = self._fleet.logs.prepare(candidate.config.settings.logs)
        try:
            report = self._report = self._service.adopt(candidate, size)
        except BaseException:
            discard(logs)
            raise
        self._fleet.logs.use(logs)
        self._upstreams.use(candidate.config.settings)
        self._checking.naming.learn(candidate.answers)
        self._take_serving()
        # Rules that go now are still served for a moment; the next reload forgets them.
        self._fleet.forget_rules(with_servers=self._handover.is_alone)
        self._fleet.resize(size)
        self._handover.on_configuration(candidate.config)
        return report
