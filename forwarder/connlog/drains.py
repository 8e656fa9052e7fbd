"""Where lines go: a file, a pipe, syslog, the journal. May block, so a thread calls it.

Theory of operation
-------------------
A drain takes blocks of whole lines and leaves whole lines, whatever happens on the way.

* A **file** gets each block by one append (open(2), O_APPEND). A full disk may take only a part of
  it, and a killed process may leave a part, so that a line is cut; and all workers write to the
  same file. So a block is written under a lock that the workers share (fcntl(2), a record lock: it
  belongs to a process and ends with it). Under the lock a worker ends a cut line that another
  process has left, and takes back one that it leaves itself.
* A **pipe**, a terminal or a socket gets lines in portions that the kernel does not mix with those
  of other writers (pipe(7), PIPE_BUF). They cannot be taken back: a cut line is ended before the
  next one.
* A **daemon** gets a datagram for each line.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import stat
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# A pipe or a daemon that takes nothing for this long gets no more of this block.
PATIENCE_MS: Final = 1000
# The longest write that pipe(7) keeps in one piece, on Linux; POSIX asks for 512 at least.
PIPE_BUF: Final = getattr(select, "PIPE_BUF", 512)

SYSLOG_SOCKET: Final = "/dev/log"
JOURNAL_SOCKET: Final = "/run/systemd/journal/socket"
_NEWLINE: Final = 0x0A
_PRIORITY: Final = 3 * 8 + 6  # daemon.info, RFC 3164 section 4.1.1


class Unwritten(Exception):  # noqa: N818 - an expected end, not a fault
    """Some lines of a block were not written. ``lines``: how many."""

    def __init__(self, lines: int, err: OSError) -> None:
        super().__init__(err.strerror or str(err))
        self.lines = lines


class Drain(Protocol):
    """Takes blocks of lines, in the thread that writes."""

    name: str

    def write(self, lines: bytes) -> None:
        """Write whole lines. Raises Unwritten."""

    def close(self) -> None:
        """Give up the descriptor."""


def for_descriptor(name: str, fd: int) -> Drain:
    """The drain for an open descriptor, which it owns from now on."""
    is_file = stat.S_ISREG(os.fstat(fd).st_mode) and name != "stderr"
    return FileDrain(name, fd) if is_file else StreamDrain(name, fd)


class FileDrain:
    """A regular file, opened for appending; if it is readable, too, cut lines are noticed."""

    def __init__(self, name: str, fd: int) -> None:
        self.name = name
        self._fd = fd

    def write(self, lines: bytes) -> None:
        """Append a block."""
        with _lock(self._fd):
            prefix = b"\n" if self._ends_in_a_part() else b""
            left = memoryview(prefix + lines)
            try:
                while left:
                    left = left[os.write(self._fd, left) :]
            except OSError as err:
                written = max(0, len(lines) - len(left))
                raise Unwritten(self._cut_off_part(lines, written), err) from err

    def _ends_in_a_part(self) -> bool:
        """Whether the last line is cut. No other worker can be writing it: we hold the lock."""
        with suppress(OSError):  # EBADF: not open for reading
            size = os.fstat(self._fd).st_size
            return size > 0 and os.pread(self._fd, 1, size - 1) != b"\n"
        return False

    def _cut_off_part(self, lines: bytes, written: int) -> int:
        """Take back a cut line from the first ``written`` bytes; returns the lines missing."""
        whole = lines.rfind(b"\n", 0, written) + 1
        if whole < written:
            with suppress(OSError):  # EPERM: append-only (chattr +a); the next block ends the line
                os.ftruncate(self._fd, os.fstat(self._fd).st_size - (written - whole))
        return lines.count(b"\n", whole)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)


@contextmanager
def _lock(fd: int) -> Iterator[None]:
    """Hold the workers' lock on the file; without a lock where the file system has none."""
    with suppress(OSError):
        fcntl.lockf(fd, fcntl.LOCK_EX)
    try:
        yield
    finally:
        with suppress(OSError):
            fcntl.lockf(fd, fcntl.LOCK_UN)


class StreamDrain:
    """A pipe, a terminal or a socket by descriptor, which it owns; also stderr, whatever that is.

    ``patience_ms`` is how long a descriptor in non-blocking mode may take nothing.
    """

    def __init__(self, name: str, fd: int, patience_ms: int = PATIENCE_MS) -> None:
        self.name = name
        self._fd = fd
        self._patience_ms = patience_ms
        self._is_cut = False  # the last write ended within a line

    def write(self, lines: bytes) -> None:
        """Write a block in portions of whole lines."""
        start = 0
        while start < len(lines):
            end = (
                lines.rfind(b"\n", start, start + PIPE_BUF - 1) + 1 or lines.find(b"\n", start) + 1
            )
            content = (b"\n" if self._is_cut else b"") + lines[start:end]
            left = memoryview(content)
            try:
                while left:
                    left = left[self._write_some(left) :]
                    self._is_cut = content[len(content) - len(left) - 1] != _NEWLINE
            except OSError as err:
                missing = lines.count(b"\n", max(start, end - len(left)))
                raise Unwritten(missing, err) from err
            start = end

    def _write_some(self, content: memoryview) -> int:
        try:
            return os.write(self._fd, content)
        except BlockingIOError:
            poll = select.poll()
            poll.register(self._fd, select.POLLOUT)
            if not poll.poll(self._patience_ms):
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
        """Send each line; reconnects when the daemon was restarted."""
        every = lines.split(b"\n")[:-1]
        for number, line in enumerate(every):
            try:
                self._send_anew(self._encode(line))
            except OSError as err:
                self.close()
                raise Unwritten(len(every) - number, err) from err

    def _send_anew(self, content: bytes) -> None:
        if self._sock is not None:
            try:
                self._sock.send(content)
            except TimeoutError:  # the daemon is there, but does not read
                raise
            except OSError:
                self.close()
            else:
                return
        self._connect().send(content)

    def _connect(self) -> socket.socket:
        sock = self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        sock.settimeout(PATIENCE_MS / 1000)
        sock.connect(self._path)
        return sock

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
