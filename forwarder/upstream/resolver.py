"""Host names to addresses without ever blocking the loop.

Answers are kept for NAME_TTL_S (getaddrinfo tells no TTL) and then refreshed in the background
while the old ones still serve.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from forwarder.upstream.lookup import look_up

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Mapping

    from forwarder.upstream.answers import Answer

log = logging.getLogger(__name__)

# How old an answer may be before it is refreshed. Arbitrary; dynamic DNS names use 30 to 300 s.
NAME_TTL_S: Final = 30.0


class Resolver:
    """Looks names up for one worker. The loop's threads do that."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.on_answer: Callable[[Mapping[str, Answer]], None] = lambda _: None
        self._loop = loop
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._known: dict[str, Answer] = {}

    def refresh(self, host: str) -> None:
        """Look a name up again, unless that is under way."""
        if host not in self._tasks:
            self._tasks[host] = self._loop.create_task(self._resolve(host))

    def close(self) -> None:
        """Give up look-ups under way."""
        for task in self._tasks.values():
            task.cancel()

    async def _resolve(self, host: str) -> None:
        try:
            answer = await self._loop.run_in_executor(None, look_up, host, self._loop.time())
        finally:
            del self._tasks[host]
        known = self._known.get(host)
        if answer.why:
            kept = "; the last known address stays in use" if known and known.addresses else ""
            log.warning("resolve.failed host=%s: %s%s", host, answer.why, kept)
            answer = answer.after(known)
        self._known[host] = answer
        self._loop.call_later(NAME_TTL_S, self.refresh, host)
        self.on_answer({host: answer})
