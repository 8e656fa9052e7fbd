"""Where lines go: a descriptor, syslog, the journal. Writing never blocks the loop that logs.

Theory of operation
-------------------
A sink collects whole lines and hands them over in blocks: when BLOCK_BYTES have come together, or
when it is time. One thread of the worker writes them, because a write(2) to a regular file can
block for as long as its disk likes, and there is no other way to be spared that. What waits for the
thread is bounded by MAX_WAITING_BYTES; beyond it lines are dropped and counted. The first failure
is logged, and the end of a time of failures with the number of lines lost; never each.

A block to a file is one write to a descriptor with O_APPEND, so that blocks of several workers do
not mix (open(2)). When a write takes only a part (a full disk, a pipe), the rest follows; when that
cannot be, the next block begins with the end of the line that was cut.
"""

from __future__ import annotations

import logging
import os
import queue
import select
import socket
import threading
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

BLOCK_BYTES: Final = 64 * 1024
MAX_WAITING_BYTES: Final = 4 * 1024 * 1024
# A pipe that takes nothing for so long gets no more of this block.
PIPE_PATIENCE_MS: Final = 1000
# At a stop: how long to wait for the thread to write what is left.
LAST_WORDS_S: Final = 2.0

SYSLOG_SOCKET: Final = "/dev/log"
JOURNAL_SOCKET: Final = "/run/systemd/journal/socket"
_PRIORITY: Final = 3 * 8 + 6  # daemon.info, RFC 3164 section 4.1.1


class Drain(Protocol):
    """What takes blocks, in the thread that writes. May block; raises OSError."""

    name: str

    def write(self, lines: bytes) -> None:
        """Write whole lines. Raises OSError when some of them could not be written."""

    def close(self) -> None:
        """Give up the descriptor."""


class FileDrain:
    """A file, a pipe or a terminal by descriptor, which it owns."""

    def __init__(self, name: str, fd: int) -> None:
        self.name = name
        self._fd = fd
        self._is_cut = False

    def write(self, lines: bytes) -> None:
        """Write a block in one go, or in as few as it takes."""
        left = memoryview(b"\n" + lines if self._is_cut else lines)
        self._is_cut = False
        try:
            while left:
                left = left[self._write_some(left) :]
        except OSError:
            begun = len(lines) - len(left)
            self._is_cut = begun > 0 and lines[begun - 1 : begun] != b"\n"
            raise

    def _write_some(self, content: memoryview) -> int:
        try:
            return os.write(self._fd, content)
        except BlockingIOError:  # a pipe whose reader is slow
            poll = select.poll()
            poll.register(self._fd, select.POLLOUT)
            if not poll.poll(PIPE_PATIENCE_MS):
                raise
            return os.write(self._fd, content)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)


class DatagramDrain:
    """syslog or the journal: a datagram for each line."""

    def __init__(self, name: str, path: str, encode: Callable[[bytes], bytes]) -> None:
        self.name = name
        self._path = path
        self._encode = encode
        self._sock: socket.socket | None = None

    def write(self, lines: bytes) -> None:
        """Send each line; connects anew when the daemon was restarted."""
        for line in lines.splitlines():
            try:
                self._send(self._encode(line))
            except OSError:
                self.close()
                self._send(self._encode(line))

    def _send(self, content: bytes) -> None:
        if self._sock is None:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            sock.settimeout(1.0)
            try:
                sock.connect(self._path)
            except OSError:
                sock.close()
                raise
            self._sock = sock
        self._sock.send(content)

    def close(self) -> None:
        """Close the socket."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None


def to_syslog(line: bytes) -> bytes:
    """A line as the local syslog daemon takes it; it adds the time itself. syslog(3)."""
    return b"<%d>forwarder[%d]: %s" % (_PRIORITY, os.getpid(), line)


def to_journal(line: bytes) -> bytes:
    """A line in the journal's own protocol, systemd.journal-fields(7)."""
    return b"SYSLOG_IDENTIFIER=forwarder\nPRIORITY=6\nMESSAGE=" + line + b"\n"


class Sink:
    """Collects the lines of one place and hands them to the writer."""

    def __init__(self, drain: Drain, writer: Writer) -> None:
        self.drain = drain
        self._writer = writer
        self._lines: list[str] = []
        self._size = 0
        self.waiting_bytes = 0  # handed over and not written; the thread subtracts
        self.lost = 0  # lines, since the last time that all was well

    def add(self, line: str) -> None:
        """Take a whole line."""
        self._lines.append(line)
        self._size += len(line)
        if self._size >= BLOCK_BYTES:
            self.flush()

    def flush(self) -> None:
        """Hand over what there is."""
        if not self._lines:
            return
        lines, self._lines, self._size = self._lines, [], 0
        if self.waiting_bytes > MAX_WAITING_BYTES:
            self._writer.lose(self, len(lines), "it takes too long")
            return
        block = "".join(lines).encode(errors="backslashreplace")
        self.waiting_bytes += len(block)
        self._writer.put(self, block)


class Writer:
    """The thread that writes for all sinks of a worker; it begins with the first block."""

    def __init__(self) -> None:
        self.dropped = 0  # lines, ever
        self._queue: queue.SimpleQueue[tuple[Sink, bytes] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def put(self, sink: Sink, block: bytes) -> None:
        """Have a block written."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="connection log", daemon=True)
            self._thread.start()
        self._queue.put((sink, block))

    def retire(self, sink: Sink) -> None:
        """Write what a sink has left, then close it."""
        sink.flush()
        if self._thread is None:
            sink.drain.close()
        else:
            self._queue.put((sink, b""))

    def close(self) -> None:
        """Wait a while for what is left to be written."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(LAST_WORDS_S)

    def lose(self, sink: Sink, lines: int, why: str) -> None:
        """Count lines that are not written; say so if they are the first ones."""
        self.dropped += lines
        if not sink.lost:
            log.error(
                "log.failed to=%s: %s; lines are dropped until it can be written to again",
                sink.drain.name,
                why,
            )
        sink.lost += lines

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            sink, block = item
            if not block:
                sink.drain.close()
                continue
            try:
                sink.drain.write(block)
            except OSError as err:
                self.lose(sink, block.count(b"\n"), err.strerror or str(err))
            else:
                self._on_written(sink)
            sink.waiting_bytes -= len(block)

    def _on_written(self, sink: Sink) -> None:
        if sink.lost:
            log.warning("log.resumed to=%s: %d lines were lost", sink.drain.name, sink.lost)
            sink.lost = 0
