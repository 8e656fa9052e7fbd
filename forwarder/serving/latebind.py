"""Trying again to listen where it was not possible, while everything else is served.

Names have the addresses known by now; no look-up is waited for. ``retries`` decides when to try,
and the service binds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from forwarder.errors import ConfigError
from forwarder.serving.loader import Candidate, Rejected, as_known

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from forwarder.config.model import Config
    from forwarder.serving.retries import Retries
    from forwarder.upstream.answers import Answer


class Waits(Protocol):
    """The service, as far as rules wait for their address. ``config`` is in force."""

    config: Config
    retries: Retries

    @property
    def awaited(self) -> Collection[str]:
        """Rules without whose address the start fails, as long as that is open."""

    def due(self, now: float) -> Config:
        """The configuration in force, with no other rules than those to try now."""

    def bind_late(self, found: Candidate | Rejected, tried: Config, slots: int) -> bool:
        """Bind what is possible. Returns whether something was bound. Raises StartupError."""


class LateBinds:
    """Attempts, one after the other."""

    def __init__(
        self,
        service: Waits,
        known: Callable[[], Mapping[str, Answer]],
        slots: Callable[[], int],
        may_bind: Callable[[], bool],
        on_bound: Callable[[], None],
    ) -> None:
        """``known`` gives the answers for names, ``slots`` the number of workers to bind for.

        ``may_bind``: whether nothing else is changing what is served, nor ending it.
        ``on_bound`` is called when something new is listened on.
        """
        self._service = service
        self._known = known
        self._slots = slots
        self._may_bind = may_bind
        self._on_bound = on_bound

    @property
    def deadline(self) -> float | None:
        """When :meth:`turn` has something to do; None for never."""
        return self._service.retries.deadline if self._may_bind() else None

    def turn(self, now: float) -> None:
        """Make an attempt if it is time. Raises StartupError where a start has to fail."""
        service = self._service
        if not self._may_bind():
            return
        due = service.due(now)
        if not due.rules:
            return
        patient = {rule.name for rule in due.rules} - set(service.awaited)
        found: Candidate | Rejected
        try:
            found = as_known(due, self._known(), service.config, patient=patient)
        except ConfigError as err:
            found = Rejected(tuple(map(str, err.issues)))
        if service.bind_late(found, due, self._slots()):
            self._on_bound()

    def cancel(self) -> None:
        """Nothing is under way between two turns; ``may_bind`` ends it."""

    def close(self) -> None:
        """Nothing is open: what was bound is the service's."""
