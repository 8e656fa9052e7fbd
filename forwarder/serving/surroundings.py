"""Noticing that the world around has changed: interfaces and addresses, files of unix sockets.

The kernel tells of interfaces and addresses; where it does not (no netlink), and for files, we
look every now and then. Decides nothing: what waits is tried by ``latebind``, what has gone is
given up by the service.
"""

from __future__ import annotations

import logging
import selectors
from typing import TYPE_CHECKING, Final, Protocol

from forwarder.net.netlink import Changes

if TYPE_CHECKING:
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
        """Give up what no client can reach any more. Returns whether the workers must be told."""


class Surroundings:
    """What is around a service. Owns a netlink socket, of which the selector tells."""

    def __init__(self, service: Affected, selector: selectors.BaseSelector) -> None:
        """The selector's data is a function to call when there is something to read."""
        self._service = service
        self._changes: Changes | None = None
        self._has_changed = False
        self._look_at = 0.0
        try:
            self._changes = Changes()
            selector.register(self._changes, selectors.EVENT_READ, self._hear)
        except (OSError, AttributeError) as err:
            log.info("surroundings: the kernel does not tell of interfaces: %s", err)

    @property
    def deadline(self) -> float | None:
        """When :meth:`turn` has something to do without an event; None for never."""
        return self._look_at if self._service.can_go_deaf else None

    def turn(self, now: float) -> bool:
        """See to what has changed. Returns whether the workers must be told."""
        if not (self._has_changed or now >= self._look_at):
            return False
        if self._has_changed:
            self._service.retries.hasten_all(now)
        self._has_changed = False
        self._look_at = now + LOOK_S
        return self._service.look_around(now)

    def close(self) -> None:
        """Hear no more."""
        if self._changes is not None:
            self._changes.close()
            self._changes = None

    def _hear(self) -> None:
        if self._changes is not None:
            self._has_changed |= self._changes.read()
