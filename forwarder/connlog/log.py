"""The connection log of one worker: from sessions to records to lines in every place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from forwarder.connlog import sinks
from forwarder.connlog.formats import FORMATTERS
from forwarder.connlog.sinks import DatagramDrain, FileDrain, Sink, Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from forwarder.config.model import LogFormat
    from forwarder.connlog.record import Record

# How long a line may wait for others. A crash loses as much.
FLUSH_S: Final = 0.5


class ConnectionLog:
    """Writes nothing until it is told where to, by :meth:`set_places`."""

    def __init__(self, worker: int) -> None:
        self.is_on = False
        """Whether a record has to be made at all."""
        self._worker = worker
        self._writer = Writer()
        self._sinks: list[tuple[Callable[[Record], str | None], Sink]] = []

    @property
    def dropped(self) -> int:
        """Lines that could not be written, ever."""
        return self._writer.dropped

    def set_places(self, places: Sequence[tuple[LogFormat, str, int | None]]) -> None:
        """Write here from now on: format, name, and a descriptor that becomes ours.

        Without a descriptor the name is ``syslog`` or ``journal``.
        """
        for _, old in self._sinks:
            self._writer.retire(old)
        self._sinks = [
            (FORMATTERS[how], Sink(_drain(name, fd), self._writer)) for how, name, fd in places
        ]
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
        self._writer.close()


def _drain(name: str, fd: int | None) -> sinks.Drain:
    if fd is not None:
        return FileDrain(name, fd)
    if name == "syslog":
        return DatagramDrain(name, sinks.SYSLOG_SOCKET, sinks.to_syslog)
    return DatagramDrain(name, sinks.JOURNAL_SOCKET, sinks.to_journal)
