"""What clients of the control socket may ask for, and who still waits for an answer.

A reload and a change of the number of workers are answered when they are over: every worker has
acknowledged, or nothing was changed. An upgrade is answered when the successor serves or has
failed, a stop when all workers have gone.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Final, Protocol

from forwarder import control_path
from forwarder.control import ControlServer, refusal

if TYPE_CHECKING:
    import selectors
    from collections.abc import Iterable

    from forwarder.control import Message, Reply

log = logging.getLogger(__name__)

OPERATIONS: Final = ("reload", "status", "stop", "upgrade", "workers")
_STOPPING: Final = "the forwarder is stopping"
_COUNT: Final = re.compile(r"[+-]?[0-9]{1,4}")


class Instance(Protocol):
    """The master, as far as clients can ask something of it."""

    def status(self) -> Message:
        """Describe the instance."""

    def reload(self) -> str:
        """Begin a reload. Returns why not, or ""."""

    def resize(self, size: int) -> str:
        """Begin to have ``size`` workers. Returns why not, or ""."""

    def upgrade(self) -> str:
        """Begin an upgrade, unless one is under way. Returns why not, or ""."""

    def stop(self) -> None:
        """Begin to stop, or hurry a stop that has begun."""

    @property
    def size(self) -> int:
        """How many workers there shall be."""


def new_size(text: str, size: int) -> int | None:
    """The number of workers that ``+1``, ``-1`` or ``N`` asks for; None if it is none of these."""
    if not text.isascii() or not _COUNT.fullmatch(text):
        return None
    return size + int(text) if text[0] in "+-" else int(text)


class Requests:
    """Requests at work. The master says what has become of them by the ``on_`` methods.

    ::

        reload:  asked --> loading --> settling --> answered
        workers:                       settling --> answered
    """

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._asked: list[Reply] = []
        self._loading: list[Reply] = []
        self._settling: list[tuple[Reply, Message]] = []
        self._upgrading: list[Reply] = []
        self._stopping: list[Reply] = []
        self._server: ControlServer | None = None

    # -- the socket

    def open(
        self, selector: selectors.BaseSelector, path: str | None, *, replaces: str | None
    ) -> None:
        """Listen at ``path``, else at the default place if there is one. Raises StartupError.

        ``replaces`` is the path of a predecessor, whose place is taken.
        """
        listener = control_path.listen(path, replaces=replaces)
        if listener is not None:
            self._server = ControlServer(listener, selector, self.handle)
            log.info("control: listening at %s", listener.path)

    @property
    def path(self) -> str | None:
        """Where clients connect, if they can."""
        return None if self._server is None else self._server.path

    @property
    def deadline(self) -> float | None:
        """When :meth:`turn` has something to do without an event; None for never."""
        return None if self._server is None else self._server.deadline

    def turn(self) -> None:
        """Once per turn of the master: handle at most one request."""
        if self._server is not None:
            self._server.turn()

    def close(self) -> None:
        """Close all sockets, in a forked child too; the file stays."""
        if self._server is not None:
            self._server.close()

    def remove_file(self) -> None:
        """Remove the socket's file."""
        if self._server is not None:
            self._server.remove_file()

    # -- what is asked

    def handle(self, message: Message, reply: Reply) -> None:
        """Begin what ``message`` asks for; ``reply`` is called once, now or later."""
        op = message.get("op")
        if op == "status":
            reply({"ok": True, **self._instance.status()})
        elif op == "reload":
            self._asked.append(reply)
            problem = self._instance.reload()
            if problem:
                self._asked.remove(reply)
                reply(refusal(problem))
        elif op == "workers":
            self._resize(message.get("count"), reply)
        elif op == "upgrade":
            self._upgrade(reply)
        elif op == "stop":
            self._stopping.append(reply)
            self._instance.stop()
        else:
            reply(refusal(f"unknown operation; there are {', '.join(OPERATIONS)}"))

    def _upgrade(self, reply: Reply) -> None:
        self._upgrading.append(reply)
        problem = self._instance.upgrade()
        if problem and reply in self._upgrading:
            self._upgrading.remove(reply)
            reply(refusal(problem))

    def _resize(self, count: object, reply: Reply) -> None:
        size = new_size(count, self._instance.size) if isinstance(count, str) else None
        if size is None:
            reply(refusal('the count of workers is a text: "+1", "-1" or "4"'))
            return
        problem = self._instance.resize(size)
        if problem:
            reply(refusal(problem))
        else:
            self._settling.append((reply, {"ok": True, "workers": size}))

    # -- what has become of them

    def on_loading(self) -> None:
        """The configuration is being read, for all that have asked so far."""
        self._loading += self._asked
        self._asked.clear()

    def on_rejected(self, problems: Iterable[str]) -> None:
        """What was read is not applied."""
        answer = refusal("the configuration was rejected", problems=list(problems))
        replies, self._loading = self._loading, []
        for reply in replies:
            reply(answer)

    def on_accepted(self, report: str, generation: int) -> None:
        """What was read is in force; workers have still to acknowledge it."""
        answer: Message = {"ok": True, "report": report, "generation": generation}
        self._settling += [(reply, answer) for reply in self._loading]
        self._loading.clear()

    def on_settled(self) -> None:
        """Every worker has acknowledged all that it was told."""
        settled, self._settling = self._settling, []
        for reply, answer in settled:
            reply(answer)

    def on_upgraded(self, report: str, *, is_done: bool) -> None:
        """The successor serves, or has failed, as ``report`` says."""
        replies, self._upgrading = self._upgrading, []
        for reply in replies:
            reply({"ok": True, "report": report} if is_done else refusal(report))

    def on_stopping(self) -> None:
        """Nothing more will be loaded, settled or upgraded."""
        settling = [reply for reply, _ in self._settling]
        waiting = [*self._asked, *self._loading, *settling, *self._upgrading]
        for replies in (self._asked, self._loading, self._settling, self._upgrading):
            replies.clear()
        for reply in waiting:
            reply(refusal(_STOPPING))

    def on_stopped(self) -> None:
        """All workers have gone."""
        for reply in self._stopping:
            reply({"ok": True})
        self._stopping.clear()
