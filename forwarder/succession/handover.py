"""From one master to the next: starting a successor, leaving the place to it, and taking it.

The place is the pid file and the control socket's path; the old master keeps it until the new one
serves. Serves no client and stops nothing itself; the master does.
"""

from __future__ import annotations

import logging
import os
import selectors
import time
from typing import TYPE_CHECKING, Protocol

from forwarder.control.requests import STOPPING
from forwarder.errors import StartupError
from forwarder.ipc.messages import access_file
from forwarder.serving.listeners import CLOSE_GRACE_S
from forwarder.succession import inherit, lineage, orphans, upgrade
from forwarder.succession.foreign import Foreigners
from forwarder.succession.lineage import Elder, Heir, Predecessor
from forwarder.succession.upgrade import Successor
from forwarder.system import notify
from forwarder.system.pidfile import PidFile, UnwritableError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable

    from forwarder.config.model import Config, Settings
    from forwarder.ipc.channel import Received
    from forwarder.ipc.questions import Questions
    from forwarder.serving.service import Service
    from forwarder.succession.foreign import Taking
    from forwarder.succession.upgrade import Estate
    from forwarder.system.privileges import Identity

log = logging.getLogger(__name__)


class Incumbent(Protocol):
    """The master, as far as a handover asks something of it."""

    @property
    def is_running(self) -> bool:
        """Whether it serves and is not about to stop."""

    @property
    def is_reloading(self) -> bool:
        """Whether a configuration is being read."""

    def reload(self) -> str:
        """Begin a reload. Returns why not, or ""."""

    def stop(self) -> None:
        """The successor serves: let our sessions end."""

    @property
    def elder(self) -> Elder:
        """What a successor may ask of us."""


class Askers(Protocol):
    """Those who have asked for an upgrade, and the control socket through which they did."""

    def take_back(self) -> None:
        """Listen there again if a successor, which has failed, has taken it."""

    def on_upgraded(self, report: str, *, is_done: bool) -> None:
        """The successor serves, or has failed, as ``report`` says."""


class Handover:
    """The pid file of this master and, during an upgrade, its successor. Owns both."""

    def __init__(  # noqa: PLR0913 - all that it is about
        self,
        master: Incumbent,
        service: Service,
        estate: Callable[[], Estate],
        questions: Questions,
        selector: selectors.BaseSelector,
        askers: Askers,
        taking: Taking,
    ) -> None:
        """``estate``: what a successor gets. ``questions``: where answers of a predecessor go.

        ``taking`` gets the sessions of a predecessor, and of orphans.
        """
        self._has_heir = False
        self._heir: Heir | None = None  # the master that serves after an upgrade
        self._master = master
        self._selector = selector
        self._askers = askers
        self._service = service
        self._estate = estate
        self.predecessor: Predecessor | None = None  # stays after its end
        self._questions = questions
        self._pid_file: PidFile | None = None
        self._successor: Successor | None = None
        self._is_reload_wanted = False
        self._leave_at: float | None = None
        self._taking = taking
        self._foreigners = Foreigners(selector, taking)

    # -- our own place

    def lock(self, settings: Settings) -> None:
        """Lock the pid file, if one is configured. Raises StartupError."""
        if settings.pid_file is None:
            return
        try:
            self._pid_file = PidFile(settings.pid_file)
        except UnwritableError as err:
            if not settings.is_pid_file_optional:
                raise
            log.warning("pidfile.failed %s; going on without", err)

    def take_place(self, open_control: Callable[[], None]) -> None:
        """All our workers serve: report it, and take a predecessor's place. Raises StartupError.

        ``open_control`` listens on the control socket, which is a predecessor's until now.
        """
        has_predecessor = upgrade.has_predecessor()
        if has_predecessor:
            # Only now, since a successor that fails must not take them.
            self._claim()
            open_control()
        config = self._service.config
        notify.notify(f"MAINPID={os.getpid()}", "READY=1", f"STATUS={len(config.rules)} rules")
        line = upgrade.tell_predecessor(has_dropped_some=self._service.has_dropped_some)
        if line is not None:
            self.predecessor = Predecessor(
                line, self._selector, self._questions, self._taking.on_message
            )
            self.on_configuration(config)
        # What the predecessor would need if we ended before it has heard of us comes last.
        self._service.own(has_predecessor=has_predecessor)

    def _claim(self) -> None:
        """Write our pid into the pid file, in place of another's. Raises StartupError."""
        if self._pid_file is not None:
            self._pid_file.claim()

    def on_configuration(self, config: Config) -> None:
        """End sessions of the predecessor that this denies, if ``cut_denied`` is set."""
        before = self.predecessor
        if before is None or not before.is_open or not config.settings.cut_denied:
            return
        try:
            fd = access_file(config)
        except OSError as err:
            log.error("upgrade: cannot send the access rules to the old one: %s", err)
            return
        try:
            before.cut_denied(fd)
        finally:
            os.close(fd)

    def describe(self) -> list[dict[str, object]]:
        """Old masters that drain, as in the status."""
        return [] if self.predecessor is None else self.predecessor.left.describe()

    def close(self) -> None:
        """Close the lines to other masters; remove the pid file if it is ours alone."""
        for one in (self._successor, self._heir, self.predecessor, self._foreigners):
            if one is not None:
                one.close()
        if self._pid_file is not None and not upgrade.has_predecessor():
            self._pid_file.remove()

    @property
    def is_alone(self) -> bool:
        """Whether no old master has workers that may read what we share with them."""
        is_before_us = self.predecessor is not None and self.predecessor.is_open
        return not (is_before_us or upgrade.has_predecessor())

    def inherited_sockets(
        self, identity: Identity | None, is_wanted: Callable[[Iterable[str]], bool]
    ) -> list[socket.socket]:
        """Listening sockets of other processes: see ``inherit``. Workers run as ``identity``.

        Orphans that give theirs keep a connection to us, by which their sessions follow.
        """
        if identity is not None:
            self._foreigners.uid = identity.uid
        self._foreigners.is_wanted = is_wanted
        given = inherit.from_environment()
        if not upgrade.has_predecessor():
            keep = self._foreigners.keep
            given += orphans.from_orphans(self._foreigners.uid, is_wanted, keep)
            self._foreigners.seek(time.monotonic())
        return given

    def pass_on(self, pid: int, received: Received) -> bool:
        """PARCELS of a worker, or one before us: returns whether the heir has asked for them."""
        return self._heir is not None and self._heir.pass_on(pid, received)

    # -- a successor

    @property
    def has_heir(self) -> bool:
        """Whether an upgrade has succeeded."""
        return self._has_heir

    @property
    def is_abandoned(self) -> bool:
        """Whether an upgrade has succeeded, and the master that serves since has ended."""
        return self._heir is not None and not self._heir.is_open

    @property
    def is_under_way(self) -> bool:
        """Whether there is a successor, and we are not leaving yet."""
        return self._successor is not None or self._leave_at is not None

    @property
    def deadline(self) -> float | None:
        """When :meth:`turn` has something to do without an event; None for never."""
        parts = (self._successor, self._heir, self.predecessor, self._foreigners)
        dates = [self._leave_at, *(part.deadline for part in parts if part is not None)]
        return min((at for at in dates if at is not None), default=None)

    def start(self) -> str:
        """Start the installed code beside this one, if that is not under way already.

        Returns why not, or "".
        """
        problem = ""
        if self.is_under_way:
            return ""
        if not self._master.is_running:
            problem = STOPPING
        elif self._master.is_reloading:
            problem = "a reload is under way; try again when it is over"
        elif os.getpid() == 1:
            problem = "not possible as process 1 of a container: start a new container"
        else:
            try:
                self._execute()
            except OSError as err:
                problem = f"cannot execute the new code: {err}"
        if problem:
            log.error("upgrade: %s", problem)
        return problem

    def turn(self, now: float) -> None:
        """Give up a successor whose time is up; leave when ours is."""
        if self.predecessor is not None:
            self.predecessor.turn(now)
        self._foreigners.turn(now, self.predecessor)
        if self._heir is not None:  # before we leave: it counts what ends from then on
            self._heir.turn(now)
        if self._leave_at is not None and now >= self._leave_at:
            self._leave_at = None
            self._master.stop()
            if self._heir is not None:
                self._heir.tell()  # whom it can ask for sessions now
        if self._successor is not None and now >= self._successor.deadline:
            self._successor.give_up(now)

    def cancel(self) -> None:
        """The master is stopping: make the successor end, if there is one."""
        self._leave_at = None
        if self._successor is not None:
            self._successor.give_up(time.monotonic())

    def note_reload(self) -> None:
        """A reload is requested: during an upgrade it is for the master that stays."""
        self._is_reload_wanted = self._successor is not None
        if self._heir is not None:
            self._heir.reload()

    def say_last_words(self) -> None:
        """Report to the heir how many sessions had to be cut."""
        if self._heir is not None:
            self._heir.tell()

    def _execute(self) -> None:
        sockets = self._service.table.all_sockets()
        successor = Successor(sockets, self._pid_file, self._estate(), time.monotonic())
        try:
            self._selector.register(successor, selectors.EVENT_READ, self._hear)
        except OSError:  # ENOMEM, ENOSPC: it would take the place of a master that does not hear it
            successor.kill()
            raise
        self._successor = successor
        log.info("upgrade: started pid=%d", successor.pid)

    def _hear(self) -> None:
        successor = self._successor
        if successor is None:
            return
        successor.hear()
        if successor.end is not None:
            self._on_failed(successor, successor.end)
        elif successor.is_ready and self._master.is_running:
            self._on_ready(successor)
        elif successor.is_ready:  # it was asked to end
            lineage.decline(successor.line)

    def _on_ready(self, successor: Successor) -> None:
        self._selector.unregister(successor)
        self._successor = None
        log.info("upgrade: pid=%d serves; letting our sessions end", successor.pid)
        # It has sent that itself, but a service manager may believe only the process it knows.
        notify.notify(f"MAINPID={successor.pid}")
        self._askers.on_upgraded(f"pid {successor.pid} serves, the old one drains", is_done=True)
        if self._pid_file is not None:
            self._pid_file.leave_to(successor.pid)
            self._pid_file = None
        self._has_heir = True
        self._heir = Heir(successor.pid, successor.line, self._selector, self._master.elder)
        if self._is_reload_wanted:  # it may have read the configuration before it was changed
            self._heir.reload()
        self._leave_at = time.monotonic()
        if successor.has_dropped_some:
            # Handshakes under way at sockets that the successor does not serve are still ours.
            log.info("upgrade: a rule has gone; serving it for %.1f s more", CLOSE_GRACE_S)
            self._leave_at += CLOSE_GRACE_S

    def _on_failed(self, successor: Successor, how: str) -> None:
        self._selector.unregister(successor)
        successor.close()
        self._successor = None
        problem = f"pid {successor.pid} did not come to serve ({how}); this one goes on"
        try:
            self._claim()
        except StartupError as err:
            log.error("upgrade: %s", err)
        if not self._master.is_running:
            return
        self._askers.take_back()
        log.error("upgrade: %s", problem)
        self._askers.on_upgraded(problem, is_done=False)
        if self._is_reload_wanted:
            self._is_reload_wanted = False
            self._master.reload()
