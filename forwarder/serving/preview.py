"""A reload that is only previewed: the configuration is read and compared, and nothing changes.

It is read as a reload would read it, in a process of its own; see ``loader``.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final

from forwarder.config.compare import as_lines, as_object, compare
from forwarder.control.protocol import REJECTED
from forwarder.control.requests import STOPPING
from forwarder.control.server import refusal
from forwarder.serving.loader import Candidate, Loader, Rejected

if TYPE_CHECKING:
    import selectors
    from collections.abc import Callable, Collection

    from forwarder.config.model import Config
    from forwarder.control.server import Message, Reply

log = logging.getLogger(__name__)

# Clients that wait for the next reading, while one is under way.
_MOST_WAITING: Final = 64


class Preview:
    """The clients that ask what a reload would change. Each gets the result of a later reading."""

    def __init__(
        self,
        load: Callable[[], Candidate],
        in_force: Callable[[], Config],
        selector: selectors.BaseSelector,
        kept: Collection[int],
    ) -> None:
        """``load`` and ``kept`` as for a reload; ``in_force`` is what is compared with."""
        self._load = load
        self._in_force = in_force
        self._loader = Loader(selector, kept, self._end, "reading the configuration took too long")
        self._asked: list[tuple[Message, Reply]] = []
        self._loading: list[tuple[Message, Reply]] = []

    @property
    def deadline(self) -> float | None:
        """When :meth:`turn` has something to do without an event; None for never."""
        return self._loader.deadline

    def ask(self, message: Message, reply: Reply) -> None:
        """Find out, by reading now or once more when that is over; ``reply`` is called once."""
        if len(self._asked) >= _MOST_WAITING:
            reply(refusal("too many ask what a reload would change"))
            return
        self._asked.append((message, reply))
        if not self._loader.is_under_way:
            self._start()

    def turn(self, now: float) -> None:
        """Give up a configuration that takes too long to read."""
        self._loader.turn(now)

    def cancel(self) -> None:
        """The master is stopping: give up what is being read."""
        self._loader.cancel()
        waiting, self._asked, self._loading = [*self._loading, *self._asked], [], []
        for _, reply in waiting:
            reply(refusal(STOPPING))

    def close(self) -> None:
        """Close the pipe."""
        self._loader.close()

    def _start(self) -> None:
        self._loading, self._asked = self._asked, []
        try:
            self._loader.start(self._load, time.monotonic())
        except OSError as err:
            why = f"cannot start a process to read the configuration: {err.strerror}"
            self._end(Rejected((why,)))

    def _end(self, found: Candidate | Rejected) -> None:
        replies, self._loading = self._loading, []
        for message, reply in replies:
            reply(self._answer(message, found))
        if self._asked:
            self._start()

    def _answer(self, message: Message, found: Candidate | Rejected) -> Message:
        if isinstance(found, Rejected):
            return refusal(REJECTED, problems=list(found.problems))
        compared = compare(self._in_force(), found.config)
        lines = as_lines(compared, found.config, shows_all=message.get("all") is True)
        return {"ok": True, **as_object(compared), "lines": lines}
