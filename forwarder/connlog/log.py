"""The connection log of one worker: from sessions to records to lines in every place."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from forwarder.connlog import drains
from forwarder.connlog.formats import FORMATTERS
from forwarder.connlog.sinks import Sink

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from forwarder.config.model import LogFormat
    from forwarder.connlog.record import Record

# How long a line may wait for others. A crash loses as much.
FLUSH_S: Final = 0.5
# At a stop: how long to wait for what is left to be written. Less than the master waits for us.
LAST_WORDS_S: Final = 1.0


class ConnectionLog:
    """Writes nothing until it is told where to, by :meth:`set_places`."""

    def __init__(self, worker: int) -> None:
        self.is_on = False
        """Whether a record has to be made at all."""
        self._worker = worker
        self._sinks: list[tuple[Callable[[Record], str | None], Sink]] = []
        self._ended: list[Sink] = []  # those that may still write
        self._dropped = 0  # of sinks that are no more

    @property
    def dropped(self) -> int:
        """Lines that could not be written, ever."""
        living = [*self._ended, *(sink for _, sink in self._sinks)]
        return self._dropped + sum(sink.dropped for sink in living)

    def set_places(self, places: Sequence[tuple[LogFormat, str, int | None]]) -> None:
        """Write here from now on: format, name, and a descriptor that becomes ours.

        Without a descriptor the name is ``syslog`` or ``journal``.
        """
        for _, old in self._sinks:
            old.end()
            self._ended.append(old)
        self._forget_finished()
        self._sinks = [(FORMATTERS[how], Sink(_drain(name, fd))) for how, name, fd in places]
        self.is_on = bool(self._sinks)

    def write(self, record: Record) -> None:
        """Put a record into every place, in its format."""
        record.worker = self._worker
        for format_record, sink in self._sinks:
            line = format_record(record)
            if line is not None:
                sink.add(line)

    def flush(self) -> None:
        """Hand over what has come together; to be called every FLUSH_S."""
        for _, sink in self._sinks:
            sink.flush()

    def close(self) -> None:
        """Write what is left, as far as that is possible in a moment."""
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
