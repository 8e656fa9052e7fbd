"""A small file that the master keeps up to date, without ever waiting for a disk.

Theory of operation
-------------------
A text is written by a forked child: beside the file, then over it (rename(2)), both on the disk
(fsync(2)) before that counts. So the file has the old text or the new one, whole, whatever happens:
a full disk, a crash, a power cut. There is one child at a time, and of several texts meanwhile only
the last is written. What fails is logged once and tried again from time to time; the instance goes
on all the same.

The master of an instance is the only writer; an old one that has an heir writes no more.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import select
import selectors
import signal
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from forwarder.system.children import keep_only
from forwarder.system.signals import leave_to_the_master

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

# Arbitrary: 10,000 orders have 2 MB.
MOST_BYTES: Final = 16 << 20
# Those who wait for their text to be kept are told so after this time, if a disk takes longer.
ANSWER_S: Final = 3.0
RETRY_S: Final = 30.0  # after a failure; arbitrary
CLOSE_S: Final = 1.0  # how long the end of the master waits for what is being written
_MODE: Final = 0o600
_MOST_ERROR_BYTES: Final = 512  # of what a child says of its failure; a pipe takes it at once
_DONE: Final = b"\0"


def read(path: str) -> bytes:
    """The file's content; b"" if there is none.

    Raises OSError, and ValueError if it is too long or no regular file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not block
    except FileNotFoundError:
        return b""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ValueError("not a regular file")
    with os.fdopen(fd, "rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES >> 20} MiB")
    return content


def complaint(path: str) -> str:
    """Why the file could not be written now, as far as that shows without writing; or ""."""
    directory = Path(path).parent
    try:
        status = directory.stat()
    except OSError as err:
        return f"{directory}: {err.strerror}"
    if not stat.S_ISDIR(status.st_mode):
        return f"{directory}: {os.strerror(errno.ENOTDIR)}"
    if Path(path).is_dir():
        return f"{path}: {os.strerror(errno.EISDIR)}"
    if not os.access(directory, os.W_OK | os.X_OK):
        return f"{directory}: not writable for us"
    return ""


def replace(path: str, text: bytes) -> None:
    """Put ``text`` in place of the file's content, on the disk and all or nothing. Raises OSError.

    Blocks as long as the disk takes.
    """
    new = Path(f"{path}.{os.getpid()}.new")
    try:
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
        with os.fdopen(fd, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(fd)
        new.replace(path)
    except BaseException:
        with suppress(OSError):
            new.unlink()
        raise
    fd = os.open(Path(path).parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class StateFile:
    """One file and who waits for it. Owns the pipe of the child that writes, which others reap."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        """Keep nothing yet, see :meth:`use`."""
        self.problem = ""  # why what the file should have is not there, if it is not
        self._selector = selector
        self._path: str | None = None
        self._wanted: bytes | None = None  # what has still to be written
        self._waiting: list[tuple[float, Callable[[str], None]]] = []  # until when, and for whom
        self._writing: list[tuple[float, Callable[[str], None]]] = []  # those for whom it is
        self._retry_at = math.inf
        self._read_fd = -1
        self._text = b""  # what is being written
        self._is_closed = False

    @property
    def path(self) -> str | None:
        """Where it is; None: nothing is kept."""
        return self._path

    def use(self, path: str | None) -> bool:
        """Keep everything there from now on, or nowhere. Returns whether that is another place."""
        if path == self._path:
            return False
        self._path, self._wanted, self._retry_at, self.problem = path, None, math.inf, ""
        return True

    def keep(self, text: bytes, done: Callable[[str], None] = lambda _: None) -> None:
        """Write ``text``. ``done`` is called once: with "" when it is kept, else with why not."""
        if self._path is None:
            done("")
            return
        self._wanted, self._retry_at = text, math.inf
        self._waiting.append((time.monotonic() + ANSWER_S, done))
        self._begin()

    @property
    def deadline(self) -> float | None:
        """When :meth:`turn` has something to do without an event; None or infinite for never."""
        return min([self._retry_at, *(at for at, _ in (*self._waiting, *self._writing))])

    def turn(self, now: float) -> None:
        """Try again what has failed, and tell those who have waited long enough."""
        if now >= self._retry_at:
            self._retry_at = math.inf
            self._begin()
        for some in (self._waiting, self._writing):
            for one in [one for one in some if now >= one[0]]:
                some.remove(one)
                one[1](f"{self._path} is still being written")

    def close(self) -> None:
        """Wait a moment for what is being written and has still to be; nothing is, after that."""
        until = time.monotonic() + CLOSE_S
        while self._read_fd >= 0 and (left := until - time.monotonic()) > 0:
            if select.select([self._read_fd], [], [], left)[0]:
                self._hear()
        self._is_closed = True
        if self._read_fd >= 0:
            self._hang_up()

    # -- the child

    def _begin(self) -> None:
        """Start a child, unless there is one or nothing to write."""
        if self._read_fd >= 0 or self._wanted is None or self._path is None or self._is_closed:
            return
        text, self._wanted = self._wanted, None
        self._writing, self._waiting = self._waiting, []
        try:
            read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        except OSError as err:
            self._on_failed(text, f"cannot write it: {err.strerror}")
            return
        try:
            pid = os.fork()
        except OSError as err:
            os.close(read_fd)
            os.close(write_fd)
            self._on_failed(text, f"cannot fork: {err.strerror}")
            return
        if pid == 0:
            _write_and_leave(self._path, text, write_fd)
        os.close(write_fd)
        os.set_blocking(read_fd, False)
        self._read_fd, self._text = read_fd, text
        try:
            self._selector.register(read_fd, selectors.EVENT_READ, self._hear)
        except OSError as err:  # ENOMEM, ENOSPC: epoll_ctl(2)
            self._hang_up()
            self._on_failed(text, f"cannot watch who writes it: {err.strerror}")

    def _hear(self) -> None:
        """Read what the child says of its work; it says all at once."""
        try:
            said = os.read(self._read_fd, _MOST_ERROR_BYTES)
        except BlockingIOError:
            return
        self._hang_up()
        if said == _DONE:
            self._on_written()
        else:
            why = said.decode(errors="replace") or "the process that writes it was killed"
            self._on_failed(self._text, why)
        self._begin()

    def _hang_up(self) -> None:
        with suppress(KeyError, ValueError, RuntimeError):  # the selector may be closed by now
            self._selector.unregister(self._read_fd)
        os.close(self._read_fd)
        self._read_fd = -1

    def _on_written(self) -> None:
        if self.problem:
            log.info("state.written file=%s", self._path)
        self.problem = ""
        self._tell("")

    def _on_failed(self, text: bytes, why: str) -> None:
        problem = f"cannot write {self._path}: {why}"
        if problem != self.problem:
            log.warning("state.failed %s; going on without, next try in %.0f s", problem, RETRY_S)
        self.problem = problem
        if self._wanted is None:
            self._wanted = text
            self._retry_at = time.monotonic() + RETRY_S
        self._tell(problem)

    def _tell(self, problem: str) -> None:
        told, self._writing = self._writing, []
        for _, done in told:
            done(problem)


def _write_and_leave(path: str, text: bytes, write_fd: int) -> None:
    """In the forked child: write, say how that went, and end."""
    said = b"unknown"
    try:
        keep_only([write_fd])
        leave_to_the_master(but=(signal.SIGCHLD,))
        replace(path, text)
        said = _DONE
    except OSError as err:
        said = (err.strerror or str(err)).encode()[:_MOST_ERROR_BYTES]
    finally:
        with suppress(OSError):
            os.write(write_fd, said)
        os._exit(0)
