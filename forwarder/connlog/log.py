"""The connection log of one worker: from sessions to records to lines in every place."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, TypeAlias

from forwarder.connlog import drains
from forwarder.connlog.formats import FORMATS
from forwarder.connlog.sinks import Sink

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from forwarder.config.model import LogFormat
    from forwarder.connlog.record import Record

Later: TypeAlias = "Callable[[], Record]"
"""Makes a record when it is about to be written."""

# How long a line may wait for others. A crash loses this much.
FLUSH_S: Final = 0.5
# Records that are made and formatted in one go: see ``reporting``. Many would hold up the loop.
BATCH: Final = 64
# At a stop: how long to wait for the last lines. Less than the master waits for a worker.
LAST_WORDS_S: Final = 1.0


class ConnectionLog:
    """Writes nothing until :meth:`set_places` says where to."""

    def __init__(self) -> None:
        self.is_on = False
        """Whether a record has to be made at all."""
        self.tells_opened = False
        """Whether a record has to be made when a session begins."""
        self.tells_refused = False
        """Whether a record has to be made for a client that gets no session."""
        self._waiting: list[Later] = []
        self._sinks: list[tuple[Callable[[Record], str | None], Sink]] = []
        self._ended: list[Sink] = []  # those that may still write
        self._dropped = 0  # of sinks that are gone

    @property
    def dropped(self) -> int:
        """Lines that could not be written, ever."""
        living = [*self._ended, *(sink for _, sink in self._sinks)]
        return self._dropped + sum(sink.dropped for sink in living)

    def set_places(self, places: Sequence[tuple[LogFormat, str, int | None]]) -> None:
        """Write here from now on: format, name, and a descriptor that becomes ours.

        Without a descriptor the name is ``syslog`` or ``journal``.
        """
        self._format()
        for _, old in self._sinks:
            old.end()
            self._ended.append(old)
        self._forget_finished()
        self._sinks = [(FORMATS[how].line, Sink(_drain(name, fd))) for how, name, fd in places]
        self.is_on = bool(self._sinks)
        self.tells_opened = any(FORMATS[how].wants_opened for how, _, _ in places)
        self.tells_refused = any(FORMATS[how].wants_refused for how, _, _ in places)

    def write(self, record: Later) -> None:
        """Write a record to every place soon, in its format."""
        waiting = self._waiting
        waiting.append(record)
        if len(waiting) >= BATCH:
            self._format()

    def flush(self) -> None:
        """Hand over the collected lines; call it every FLUSH_S."""
        self._format()
        for _, sink in self._sinks:
            sink.flush()

    def _format(self) -> None:
        waiting, self._waiting = self._waiting, []
        records = [make() for make in waiting]
        for format_record, sink in self._sinks:
            sink.add(*filter(None, map(format_record, records)))

    def close(self) -> None:
        """Write what is left, as far as it can be done within LAST_WORDS_S."""
        self.set_places([])
        deadline = time.monotonic() + LAST_WORDS_S
        for sink in self._ended:
            sink.join(deadline - time.monotonic())

    def _forget_finished(self) -> None:
        finished = [sink for sink in self._ended if sink.is_finished]
        self._dropped += sum(sink.dropped for sink in finished)
        self._ended = [sink for sink in self._ended if sink not in finished]


def _drain(name: str, fd: int | None) -> drains.Drain:
    if fd is not None:
        return drains.for_descriptor(name, fd)
    if name == "syslog":
        return drains.DatagramDrain(name, drains.SYSLOG_SOCKET, drains.to_syslog)
    return drains.DatagramDrain(name, drains.JOURNAL_SOCKET, drains.to_journal)
