"""Trying again to listen where it was not possible, while everything else is served.

Names are looked up in a process of its own, so the master never waits for a name server. When it is
time is decided by ``retries``, what is bound by the service.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from forwarder.addr import UnixAddress
from forwarder.reload import Candidate, Loader, Rejected, look_up

if TYPE_CHECKING:
    import selectors
    from collections.abc import Callable

    from forwarder.config.model import Config
    from forwarder.retries import Retries


class Waits(Protocol):
    """The service, as far as rules wait for their address. ``config`` is in force."""

    config: Config
    retries: Retries

    def due(self, now: float) -> Config:
        """The configuration in force, with no other rules than those to try now."""

    def bind_late(self, found: Candidate | Rejected, tried: Config, slots: int) -> bool:
        """Bind what is possible. Returns whether something was bound."""


class LateBinds:
    """One attempt at a time. Owns the process that looks names up.

    ``on_bound`` is called when something new is listened on; ``slots`` says for how many workers.
    """

    def __init__(
        self,
        service: Waits,
        selector: selectors.BaseSelector,
        release: Callable[[], None],
        slots: Callable[[], int],
        on_bound: Callable[[], None],
    ) -> None:
        self._service = service
        self._slots = slots
        self._on_bound = on_bound
        self._tried: Config | None = None
        self._loader = Loader(selector, release, self._end, "looking the name up took too long")

    @property
    def deadline(self) -> float | None:
        """When :meth:`turn` has something to do; None for never."""
        loader = self._loader
        return loader.deadline if loader.is_under_way else self._service.retries.deadline

    def turn(self, now: float) -> None:
        """Begin an attempt if it is time, or give one up that takes too long."""
        if self._loader.is_under_way:
            self._loader.turn(now)
            return
        due = self._service.due(now)
        if not due.rules:
            return
        self._tried = due
        if all(isinstance(r.listen, UnixAddress) or r.listen.is_literal for r in due.rules):
            self._end(look_up(due, self._service.config))
            return
        try:
            self._loader.start(lambda: due, now, beside=self._service.config)
        except OSError as err:
            self._end(Rejected((f"cannot start a process to look names up: {err.strerror}",)))

    def cancel(self) -> None:
        """Give up an attempt under way: another configuration is in force, or it is over."""
        self._loader.cancel()

    def close(self) -> None:
        """Close the pipe of an attempt under way, in a forked child too."""
        self._loader.close()

    def _end(self, found: Candidate | Rejected) -> None:
        if self._tried is not None and self._service.bind_late(found, self._tried, self._slots()):
            self._on_bound()
