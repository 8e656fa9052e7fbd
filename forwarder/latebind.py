"""Trying again to listen where it was not possible, while everything else is served.

Names are looked up in a process of its own, so the master never waits for a name server. When it is
time is decided by ``retries``, what is bound by the service.
"""

from __future__ import annotations

import selectors
from typing import TYPE_CHECKING, Protocol

from forwarder.addr import UnixAddress
from forwarder.reload import Candidate, Loading, Rejected, look_up

if TYPE_CHECKING:
    from collections.abc import Callable

    from forwarder.config.model import Config
    from forwarder.retries import Retries


class Waits(Protocol):
    """The service, as far as rules wait for their address."""

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
        self._selector = selector
        self._release = release
        self._slots = slots
        self._on_bound = on_bound
        self._tried: Config | None = None
        self._lookup: Loading | None = None

    @property
    def deadline(self) -> float | None:
        """When :meth:`turn` has something to do; None for never."""
        return self._service.retries.deadline if self._lookup is None else self._lookup.deadline

    def turn(self, now: float) -> None:
        """Begin an attempt if it is time, or give one up that takes too long."""
        if self._lookup is not None:
            if now >= self._lookup.deadline:
                self._lookup.cancel()
                self._end(Rejected(("looking the name up took too long",)))
            return
        due = self._service.due(now)
        if not due.rules:
            return
        self._tried = due
        if all(isinstance(r.listen, UnixAddress) or r.listen.is_literal for r in due.rules):
            self._end(look_up(due))
            return
        try:
            self._lookup = Loading(lambda: due, self._release, now, names_only=True)
        except OSError as err:
            self._end(Rejected((f"cannot start a process to look names up: {err.strerror}",)))
            return
        self._selector.register(self._lookup, selectors.EVENT_READ, self._hear)

    def cancel(self) -> None:
        """Give up an attempt under way: another configuration is in force, or it is over."""
        if self._lookup is not None:
            self._lookup.cancel()
            self._selector.unregister(self._lookup)
            self.close()

    def close(self) -> None:
        """Close the pipe of an attempt under way, in a forked child too."""
        if self._lookup is not None:
            self._lookup.close()
            self._lookup = None

    def _hear(self) -> None:
        found = self._lookup.result() if self._lookup is not None else None
        if found is not None:
            self._end(found)

    def _end(self, found: Candidate | Rejected) -> None:
        if self._lookup is not None:
            self._selector.unregister(self._lookup)
            self.close()
        if self._tried is not None and self._service.bind_late(found, self._tried, self._slots()):
            self._on_bound()
