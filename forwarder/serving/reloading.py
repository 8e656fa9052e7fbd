"""One reload at a time: it lets the configuration be read, and handles the result.

Reads nothing itself, see ``loader``; the master applies the result.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final, Protocol

from forwarder.control.requests import STOPPING, UNDER_WAY
from forwarder.control.server import refusal
from forwarder.errors import StartupError
from forwarder.serving.loader import Candidate, Loader, Rejected
from forwarder.serving.preview import Preview
from forwarder.system import notify

if TYPE_CHECKING:
    import selectors
    from collections.abc import Callable, Collection, Iterable

    from forwarder.control.server import Message, Reply
    from forwarder.serving.service import Service

log = logging.getLogger(__name__)

NOTHING_TO_RELOAD: Final = "nothing to reload, the rules came from the command line"


class Reloadable(Protocol):
    """The master, as far as a reload asks something of it."""

    @property
    def is_running(self) -> bool:
        """Whether it serves and is not about to stop."""

    @property
    def is_upgrading(self) -> bool:
        """Whether a successor was started and may take the place; then nothing may change."""

    def change_to(self, candidate: Candidate) -> str:
        """Put it in force. Returns what it changes, for people.

        Raises StartupError if that is not possible; then nothing changes.
        """


class Askers(Protocol):
    """Those who have asked for a reload, as far as they are told what becomes of it."""

    def on_loading(self) -> None:
        """The configuration is being read, for all that have asked so far."""

    def on_rejected(self, problems: Iterable[str]) -> None:
        """The configuration that was read is not applied."""

    def on_accepted(self, report: str, generation: int) -> None:
        """The configuration is in force; workers have still to acknowledge it."""

    def on_refused(self, problems: Iterable[str]) -> None:
        """The workers cannot serve the new configuration; the previous one is in force again."""

    def on_unserved(self, problem: str) -> None:
        """The workers cannot serve their last assignment, which no reload has brought."""

    def preview_by(self, handler: Callable[[Message, Reply], None]) -> None:
        """Let ``handler`` answer what a reload would change."""


class Reloading:
    """The reload under way, if there is one, and whether another one has to follow."""

    def __init__(
        self,
        master: Reloadable,
        service: Service,
        load: Callable[[], Candidate] | None,
        selector: selectors.BaseSelector,
        askers: Askers,
        kept: Collection[int],
    ) -> None:
        """``load`` reads the configuration in a forked child; None if there is nothing to read.

        ``kept``: descriptors that it may have to read from.
        """
        self._master = master
        self._service = service
        self._load = load
        self._askers = askers
        too_long = "reading the configuration took too long"
        self._loader = Loader(selector, kept, self._end, too_long)
        self._is_wanted_again = False
        self._before: Candidate | None = None  # until all workers serve what came after it
        self._preview: Preview | None = None
        if load is not None:
            self._preview = Preview(load, lambda: service.config, selector, kept)
        askers.preview_by(self.preview)

    @property
    def is_under_way(self) -> bool:
        """Whether a configuration is being read."""
        return self._loader.is_under_way

    @property
    def deadline(self) -> float | None:
        """When :meth:`turn` has something to do without an event; None for never."""
        found = [self._loader.deadline, self._preview.deadline if self._preview else None]
        return min((deadline for deadline in found if deadline is not None), default=None)

    def request(self) -> str:
        """Begin to read the configuration again; if that is under way, once more afterwards.

        Returns why not, or "".
        """
        problem = ""
        if not self._master.is_running:
            return STOPPING
        if self._load is None:
            problem = NOTHING_TO_RELOAD
        elif self._master.is_upgrading:
            problem = UNDER_WAY
        if problem:
            log.warning("master: %s", problem)
            _tell_reloading(time.monotonic())
            notify.notify("READY=1", f"STATUS=no reload: {problem}")
        elif self._loader.is_under_way:
            self._is_wanted_again = True
        elif self._load is not None:
            self._start(self._load)
        return problem

    def preview(self, message: Message, reply: Reply) -> None:
        """Find out what a reload would change; ``reply`` is called once."""
        if self._preview is None:
            reply(refusal(NOTHING_TO_RELOAD))
        elif not self._master.is_running:
            reply(refusal(STOPPING))
        else:
            self._preview.ask(message, reply)

    def turn(self, now: float) -> None:
        """Give up a configuration that takes too long to read."""
        self._loader.turn(now)
        if self._preview is not None:
            self._preview.turn(now)

    def cancel(self) -> None:
        """The master is stopping: give up what is being read."""
        if self._preview is not None:
            self._preview.cancel()
        if self._loader.is_under_way:
            self._loader.cancel()
            self._end(Rejected((STOPPING,)))

    def close(self) -> None:
        """Close the pipes."""
        self._loader.close()
        if self._preview is not None:
            self._preview.close()

    def _start(self, load: Callable[[], Candidate]) -> None:
        self._askers.on_loading()
        now = time.monotonic()
        _tell_reloading(now)
        try:
            self._loader.start(load, now)
        except OSError as err:
            self._reject((f"cannot start a process to read the configuration: {err.strerror}",))

    def _end(self, found: Candidate | Rejected) -> None:
        if isinstance(found, Rejected):
            self._reject(found.problems)
        elif self._master.is_running:  # stopping meanwhile: nothing to begin
            self._apply(found)
        if self._is_wanted_again:
            self._is_wanted_again = False
            self.request()

    def on_settled(self) -> None:
        """All workers serve the last generation."""
        self._before = None

    def on_refused(self, why: str) -> None:
        """The workers cannot serve their last assignment: return to the state before the reload.

        An assignment that no reload caused is sent again, see ``WorkerProcess``.
        """
        before, self._before = self._before, None
        problem = f"the workers cannot serve it: {why}; please report it"
        if before is None:
            log.error("worker.refuses %s; it is tried again", problem)
            self._askers.on_unserved(f"{problem}; it is tried again")
            return
        log.error("reload.rejected %s", problem)
        self._askers.on_refused((problem,))
        try:
            self._master.change_to(before)
        except StartupError as err:
            log.error("master: cannot serve again what was served before: %s", err)
        notify.notify("READY=1", "STATUS=reload rejected, see the log")

    def _apply(self, candidate: Candidate) -> None:
        before = self._service.candidate()
        try:
            report = self._master.change_to(candidate)
        except StartupError as err:
            self._reject((str(err),))
        except Exception:  # the client that asked, and the service manager, must hear of an end
            log.exception("master.bug while a configuration is put in force")
            self._reject(("internal error, see the log",))
        else:
            self._before = self._before or before  # what all workers have served
            self._askers.on_accepted(report, self._service.generation)

    def _reject(self, problems: Iterable[str]) -> None:
        """Keep everything as it is, and report why."""
        for problem in problems:
            log.error("reload.rejected %s", problem)
        log.error("master: generation %d stays in force", self._service.generation)
        self._askers.on_rejected(problems)
        notify.notify("READY=1", "STATUS=reload rejected, see the log")


def _tell_reloading(now: float) -> None:
    """Notify a service manager that a reload begins; ``READY=1`` ends it, whatever came of it.

    systemd waits forever for a reload that names no time (sd_notify(3), MONOTONIC_USEC), and with
    Type=notify-reload for one that it has asked for and that never begins.
    """
    notify.notify("RELOADING=1", f"MONOTONIC_USEC={int(now * 1e6)}")
