"""Host names to addresses without ever blocking the loop.

Answers are kept for NAME_TTL_S (getaddrinfo tells no TTL) and then refreshed in the background
while the old ones still serve; so after the first look-up no session waits for a name server, and a
name server that is down changes nothing for names that were resolved once.
"""

from __future__ import annotations

import logging
import socket
from typing import TYPE_CHECKING, Final

from forwarder.net.sockets import Target, with_port

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable

log = logging.getLogger(__name__)

# How old an answer may be before it is refreshed. Arbitrary; dynamic DNS names use 30 to 300 s.
NAME_TTL_S: Final = 30.0
# How long a failed look-up is remembered, so that a dead name server is not asked per session.
RETRY_S: Final = 1.0


class _Name:
    """What is known of one host. ``targets`` has what was asked for, by port."""

    __slots__ = ("addresses", "expires_at", "targets", "task")

    def __init__(self) -> None:
        self.addresses: tuple[Target, ...] = ()  # with port 0
        self.targets: dict[int, tuple[Target, ...]] = {}
        self.expires_at = 0.0
        self.task: asyncio.Task[None] | None = None

    def at(self, port: int) -> tuple[Target, ...]:
        """The addresses with a port; made once, since sessions ask again and again."""
        found = self.targets.get(port)
        if found is None:
            found = self.targets[port] = tuple(
                Target(address.family, with_port(address.sockaddr, port))
                for address in self.addresses
            )
        return found


class Resolver:
    """The names of one worker, each asked once whatever its ports. The loop's threads do that."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._names: dict[str, _Name] = {}
        self._waiters: list[tuple[set[str], Callable[[], None]]] = []

    def lookup(self, host: str, port: int) -> tuple[Target, ...] | None:
        """Known addresses, at once; empty if the name failed just now, None if never asked.

        A stale answer is given and refreshed in the background.
        """
        name = self._names.get(host)
        if name is None:
            return None
        if self._loop.time() >= name.expires_at:
            self.refresh(host)
            if not name.addresses:
                return None
        return name.at(port)

    def refresh(self, host: str) -> None:
        """Look a name up again, unless that is under way."""
        name = self._names.setdefault(host, _Name())
        if name.task is None:
            name.task = self._loop.create_task(self._resolve(host, name))

    def when_resolved(self, hosts: Iterable[str], callback: Callable[[], None]) -> None:
        """Call back when no look-up of ``hosts`` is outstanding. Starts those that are missing."""
        missing = set()
        for host in hosts:
            if self.lookup(host, 0) is None:
                self.refresh(host)
                missing.add(host)
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

    async def _resolve(self, host: str, name: _Name) -> None:
        try:
            found = await self._loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as err:  # UnicodeError: a name that IDNA cannot encode
            name.expires_at = self._loop.time() + RETRY_S
            kept = "; the last known address stays in use" if name.addresses else ""
            log.warning("resolve.failed host=%s: %s%s", host, err, kept)
        else:
            name.addresses = tuple(
                Target(family, sockaddr)  # type: ignore[arg-type]  # TCP gives IP addresses only
                for family, _, _, _, sockaddr in found
            )
            name.targets.clear()
            name.expires_at = self._loop.time() + NAME_TTL_S
        finally:
            name.task = None
        self._wake(host)

    def _wake(self, host: str) -> None:
        waiters, self._waiters = self._waiters, []
        for missing, callback in waiters:
            missing.discard(host)
            if missing:
                self._waiters.append((missing, callback))
                continue
            try:
                callback()
            except Exception:  # a bug must cost one session, not all that wait for the name
                log.exception("resolve.bug host=%s", host)
