"""Reports to a service manager: sd_notify(3) without a library.

Sends nothing unless ``NOTIFY_SOCKET`` is set. Never raises and never blocks: a service manager that
does not listen must not cost anything.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import MutableMapping


def notify(*assignments: str) -> None:
    """Send assignments such as ``READY=1`` in one datagram."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path[:1] not in ("/", "@"):
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.sendto("\n".join(assignments).encode(), address)


class Watchdog:
    """When to send a service manager a sign of life; sd_watchdog_enabled(3).

    ``deadline`` is when the next one is due; None if none watches.
    """

    def __init__(self, environment: MutableMapping[str, str], pid: int, now: float) -> None:
        """Read what ``environment`` asks of the process ``pid``.

        What stays there is for the heir of an upgrade: the interval if the service manager watches
        this process, because it then watches the heir as well; nothing if it watches another
        process.
        """
        interval = environment.get("WATCHDOG_USEC", "")
        watched = environment.pop("WATCHDOG_PID", "") or str(pid)
        is_asked = interval.isascii() and interval.isdigit() and int(interval) > 0
        self.deadline: float | None = now if is_asked and watched == str(pid) else None
        # Less than half of the interval, so that a slightly late turn is still in time.
        self._every_s = int(interval) / 1e6 / 3 if is_asked else 0.0
        if self.deadline is None:
            environment.pop("WATCHDOG_USEC", None)

    def turn(self, now: float) -> None:
        """Give a sign of life if one is due."""
        if self.falls_due(now):
            notify("WATCHDOG=1")

    def cancel(self) -> None:
        """Go on: a service manager watches a master that stops, too."""

    def close(self) -> None:
        """Nothing is open."""

    def falls_due(self, now: float) -> bool:
        """Whether a sign of life is due now. If so, sets the next deadline."""
        if self.deadline is None or now < self.deadline:
            return False
        self.deadline = now + self._every_s
        return True
