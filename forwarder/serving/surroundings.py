"""Noticing that the world around has changed: interfaces and addresses, files of unix sockets.

The kernel reports interfaces and addresses; where it does not (no netlink), and for files, we look
every LOOK_S. Decides nothing: what waits is tried by ``latebind``, what has gone is given up by the
service.
"""

from __future__ import annotations

import logging
import selectors
from typing import TYPE_CHECKING, Final, Protocol

from forwarder.net.netlink import Changes

if TYPE_CHECKING:
    from collections.abc import Callable

    from forwarder.serving.retries import Retries

log = logging.getLogger(__name__)

# A look costs a system call for each address that may have gone. Arbitrary.
LOOK_S: Final = 2.0


class Affected(Protocol):
    """The service, as far as what is around concerns it."""

    retries: Retries

    @property
    def can_go_deaf(self) -> bool:
        """Whether there are addresses that can go without our doing."""

    def look_around(self, now: float) -> bool:
        """Give up what no client can reach any more. Returns whether the workers have to know."""


class Surroundings:
    """What is around a service. Owns a netlink socket, which the selector watches."""

    def __init__(
        self,
        service: Affected,
        selector: selectors.BaseSelector,
        may_change: Callable[[], bool],
        on_changed: Callable[[], None],
    ) -> None:
        """The selector's data is a function to call when there is something to read.

        ``may_change``: whether nothing else is changing what is served, nor ending it;
        ``on_changed`` is called when something has been given up.
        """
        self._service = service
        self._may_change = may_change
        self._on_changed = on_changed
        self._changes: Changes | None = None
        self._has_changed = False
        self._look_at = 0.0
        try:
            self._changes = Changes()
            selector.register(self._changes, selectors.EVENT_READ, self._hear)
        except (OSError, AttributeError) as err:
            log.info("surroundings: the kernel does not report interfaces: %s", err)

    @property
    def deadline(self) -> float | None:
        """When :meth:`turn` has something to do without an event; None for never."""
        return self._look_at if self._service.can_go_deaf and self._may_change() else None

    def turn(self, now: float) -> None:
        """Act on what has changed."""
        if not (self._has_changed or now >= self._look_at) or not self._may_change():
            return
        if self._has_changed:
            self._service.retries.hasten_all(now)
        self._has_changed = False
        self._look_at = now + LOOK_S
        if self._service.look_around(now):
            self._on_changed()

    def cancel(self) -> None:
        """Nothing is under way between two turns; ``may_change`` ends it."""

    def close(self) -> None:
        """Close the socket."""
        if self._changes is not None:
            self._changes.close()
            self._changes = None

    def _hear(self) -> None:
        if self._changes is not None:
            self._has_changed |= self._changes.read()
