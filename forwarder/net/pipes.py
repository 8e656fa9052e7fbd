"""Pipes for splice(2), pooled per worker within the kernel's per-user budget.

Holds no data and moves none. pipe(7): unprivileged users may own ``fs.pipe-user-pages-soft``
pages of pipe capacity (16,384 by default), counted per uid over all processes; beyond it new pipes
silently get one or two pages, which would turn splice into a crawl. So the pool never goes there:
it degrades to smaller pipes, then hands out none and its caller copies.

Whoever takes a pipe notes whose data will be in it before there is some (``PipePool.notes``). So
its data has an owner, too, when this process is killed.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from forwarder.net.sockets import waiting_bytes
from forwarder.system import kernel

if TYPE_CHECKING:
    from collections.abc import Callable

HAS_SPLICE: Final = hasattr(os, "splice")
# 256 KiB gave the throughput of 1 MiB, 64 KiB lost a fifth (bulk over loopback, 2 cores).
PIPE_BYTES: Final = 256 * 1024
SMALL_PIPE_BYTES: Final = 64 * 1024
# From this fill on only small pipes are made, so that the last quarter of the budget serves
# four times as many sessions.
SMALL_FROM: Final = 0.75
# Pipes of a pool, at most: as many notes as there are. Only an administrator's budget, or many
# small pipes, come near it.
MOST_PIPES: Final = 16384
# pipe(7) lets an administrator set the limit to 0 (none), and a root process is exempt; the pool
# still needs a bound, since every pipe costs two descriptors.
BUDGET_WITHOUT_LIMIT_PAGES: Final = 16384


class Pipe:
    """Both ends of a pipe; owned by the pool or by the direction that took it.

    ``filled``: the bytes in it, for an owner that keeps it with data. ``number`` is its place in
    the notes of its pool; ``mark`` is what a note of it has in its upper half.
    """

    __slots__ = ("filled", "mark", "number", "pages", "read_fd", "write_fd")

    filled: int
    number: int
    mark: int

    def __init__(self, size: int) -> None:
        """Make a non-blocking pipe of ``size`` bytes. Raises OSError when the system has none."""
        self.read_fd, self.write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            granted = fcntl.fcntl(self.write_fd, fcntl.F_SETPIPE_SZ, size)
        except OSError:
            self.close()
            raise
        self.pages = granted // PAGE_BYTES

    @classmethod
    def with_data(cls, read_fd: int, write_fd: int) -> Pipe:
        """A pipe of another process, with what is in it. Takes over both ends.

        Raises OSError or ValueError if it is none; the descriptors then stay the caller's.
        """
        if not (_is_end(read_fd, os.O_RDONLY) and _is_end(write_fd, os.O_WRONLY)):
            raise ValueError("not a pipe")
        pipe = cls.__new__(cls)
        pipe.read_fd, pipe.write_fd = read_fd, write_fd
        pipe.pages = fcntl.fcntl(write_fd, fcntl.F_GETPIPE_SZ) // PAGE_BYTES
        pipe.filled = waiting_bytes(read_fd)
        for fd in (read_fd, write_fd):
            os.set_blocking(fd, False)
        return pipe

    def close(self) -> None:
        """Close both ends; what is still inside is lost."""
        read_fd, write_fd = self.read_fd, self.write_fd
        self.read_fd = self.write_fd = -1
        os.close(read_fd)
        os.close(write_fd)


PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


def _is_end(fd: int, mode: int) -> bool:
    """Whether a descriptor is an end of a pipe, that to read or that to write. Raises OSError."""
    is_pipe = stat.S_ISFIFO(os.fstat(fd).st_mode)
    return is_pipe and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == mode


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """``made`` pipes exist, ``idle`` of them unused; ``refused`` times a caller had to copy."""

    made: int
    idle: int
    pages: int
    refused: int


class PipePool:
    """Empty pipes to borrow. A pipe that holds data must be discarded, never given back.

    ``notes``: by the number of a pipe, its mark and, in the lower half, the descriptor that what is
    in it was read from. A note of an empty pipe says nothing. ``on_made`` and ``on_closed`` are
    called with each pipe.
    """

    __slots__ = (
        "_free",
        "_idle",
        "_made",
        "_pages",
        "_refused",
        "_serial",
        "budget_pages",
        "notes",
        "on_closed",
        "on_made",
    )

    def __init__(self, budget_pages: int) -> None:
        """``budget_pages`` is this worker's share of the pages; 0 makes a pool without pipes.

        It may be changed at any time; pipes that exist are kept.
        """
        self.budget_pages = budget_pages
        self.notes = memoryview(mmap.mmap(-1, MOST_PIPES * 8)).cast("Q")
        self.on_made: Callable[[Pipe], None] | None = None
        self.on_closed: Callable[[Pipe], None] | None = None
        self._free: list[int] = []  # numbers below those in use
        self._serial = 0
        self._idle: list[Pipe] = []
        self._made = 0
        self._pages = 0
        self._refused = 0

    def take(self) -> Pipe | None:
        """Borrow an empty pipe, or None when the budget or the descriptors are used up."""
        if self._idle:
            return self._idle.pop()
        wanted = PIPE_BYTES
        if self._pages >= self.budget_pages * SMALL_FROM:
            wanted = SMALL_PIPE_BYTES
        is_full = self._made >= MOST_PIPES
        if is_full or self._pages + wanted // PAGE_BYTES > self.budget_pages:
            self._refused += 1
            return None
        try:
            pipe = Pipe(wanted)
        except OSError:  # EMFILE, ENFILE, EPERM (budget spent by others): copying always works
            self._refused += 1
            return None
        self.take_on(pipe)
        return pipe

    def take_for_rest(self) -> Pipe | None:
        """Borrow an empty pipe for what a socket did not take; None: keep it in memory.

        Most of the budget is left to bulk, which would be copied without.
        """
        is_used_up = self._pages > self.budget_pages // 2
        return None if is_used_up and not self._idle else self.take()

    def give(self, pipe: Pipe) -> None:
        """Return an empty pipe."""
        self._idle.append(pipe)

    def discard(self, pipe: Pipe) -> None:
        """Close a borrowed pipe that still holds data."""
        self.pass_on(pipe)
        pipe.close()

    def pass_on(self, pipe: Pipe) -> None:
        """A borrowed pipe, with what is in it, is another process's from now on."""
        self._made -= 1
        self._free.append(pipe.number)
        self.notes[pipe.number] = 0
        self._pages -= pipe.pages
        if self.on_closed is not None:
            self.on_closed(pipe)

    def take_on(self, pipe: Pipe) -> None:
        """A pipe that another process had, or that is new, is one of these, and borrowed.

        If it is there already the budget is not asked; it keeps others from being made.
        """
        pipe.number = self._free.pop() if self._free else self._made
        self._made += 1
        self._serial += 1
        pipe.mark = (self._serial & 0xFFFFFFFF) << 32
        self._pages += pipe.pages
        if self.on_made is not None:
            self.on_made(pipe)

    def note(self, pipe: Pipe, src_fd: int) -> None:
        """Note that what will be in a pipe, or is in it, was read from this descriptor."""
        self.notes[pipe.number] = pipe.mark | src_fd

    def close(self) -> None:
        """Close the idle pipes. Borrowed ones stay with their borrowers."""
        while self._idle:
            self.discard(self._idle.pop())

    def statistics(self) -> PoolStatistics:
        """Count the pipes."""
        return PoolStatistics(self._made, len(self._idle), self._pages, self._refused)


def budget_pages(workers: int) -> int:
    """One worker's share of the kernel's pipe budget of this user, in pages.

    Reads /proc once. A quarter of the budget is left to other programs of the user.
    """
    text = kernel.setting("fs/pipe-user-pages-soft")
    limit = int(text) if text.isdigit() else 0
    return (limit or BUDGET_WITHOUT_LIMIT_PAGES) * 3 // 4 // workers
