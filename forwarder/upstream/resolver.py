"""Host names to addresses without ever blocking the loop.

Answers are kept for NAME_TTL_S (getaddrinfo tells no TTL) and then refreshed in the background
while the old ones still serve; so after the first look-up no session waits for a name server, and a
name server that is down changes nothing for names that were resolved once.
"""

from __future__ import annotations

import logging
import socket
from typing import TYPE_CHECKING, Final

from forwarder.net.sockets import Target

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

log = logging.getLogger(__name__)

# How old an answer may be before it is refreshed. Arbitrary; dynamic DNS names use 30 to 300 s.
NAME_TTL_S: Final = 30.0
# How long a failed look-up is remembered, so that a dead name server is not asked per session.
RETRY_S: Final = 1.0


class _Name:
    """What is known of one host and port."""

    __slots__ = ("expires_at", "targets", "task")

    def __init__(self) -> None:
        self.targets: tuple[Target, ...] = ()
        self.expires_at = 0.0
        self.task: asyncio.Task[None] | None = None


class Resolver:
    """The names of one worker. Look-ups run in the loop's threads."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._names: dict[tuple[str, int], _Name] = {}
        self._waiters: list[tuple[set[tuple[str, int]], Callable[[], None]]] = []

    def lookup(self, host: str, port: int) -> tuple[Target, ...] | None:
        """Known addresses, at once; empty if the name failed just now, None if never asked.

        A stale answer is given and refreshed in the background.
        """
        name = self._names.get((host, port))
        if name is None:
            return None
        if self._loop.time() >= name.expires_at:
            self.refresh(host, port)
            if not name.targets:
                return None
        return name.targets

    def refresh(self, host: str, port: int) -> None:
        """Look a name up again, unless that is under way."""
        name = self._names.setdefault((host, port), _Name())
        if name.task is None:
            name.task = self._loop.create_task(self._resolve(host, port, name))

    def when_resolved(
        self, names: tuple[tuple[str, int], ...], callback: Callable[[], None]
    ) -> None:
        """Call back when no look-up of ``names`` is outstanding. Starts those that are missing."""
        missing = set()
        for host, port in names:
            if self.lookup(host, port) is None:
                self.refresh(host, port)
                missing.add((host, port))
        if missing:
            self._waiters.append((missing, callback))
        else:
            callback()

    def close(self) -> None:
        """Give up look-ups under way."""
        self._waiters.clear()
        for name in self._names.values():
            if name.task is not None:
                name.task.cancel()

    async def _resolve(self, host: str, port: int, name: _Name) -> None:
        try:
            found = await self._loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as err:  # UnicodeError: a name that IDNA cannot encode
            name.expires_at = self._loop.time() + RETRY_S
            kept = "; the last known address stays in use" if name.targets else ""
            log.warning("resolve.failed host=%s: %s%s", host, err, kept)
        else:
            name.targets = tuple(
                Target(family, sockaddr)  # type: ignore[arg-type]  # TCP gives IP addresses only
                for family, _, _, _, sockaddr in found
            )
            name.expires_at = self._loop.time() + NAME_TTL_S
        finally:
            name.task = None
        self._wake(host, port)

    def _wake(self, host: str, port: int) -> None:
        waiters, self._waiters = self._waiters, []
        for missing, callback in waiters:
            missing.discard((host, port))
            if missing:
                self._waiters.append((missing, callback))
            else:
                callback()
