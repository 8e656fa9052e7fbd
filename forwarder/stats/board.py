"""Memory in which one worker counts and others read. No lock and no message.

An aligned 8-byte store cannot be seen half done on any machine that CPython runs on.

A board is a file in memory, so that also a process that was forked before its worker can read it.
Only those who have it from their fork can write: the worker, and the master.
"""

from __future__ import annotations

import os
from typing import Final

from forwarder.stats.rows import WORDS
from forwarder.system import memfile

# Rules have the rows from 0, servers those from ROWS, as many. The first of each has a use of its
# own: 0 is what the worker counts of itself; in SESSIONS of row ROWS it counts failed connects to
# any server. Rules, and servers, that find no row free share the last. A page exists once something
# in it was counted, so the memory of unused rows is address space only.
ROWS: Final = 65536
SHARED_ROW: Final = ROWS - 1
SHARED_SERVER_ROW: Final = 2 * ROWS - 1
BOARD_BYTES: Final = 2 * ROWS * WORDS * 8


class Board:
    """The rows of one worker. Made by the master before it forks the worker, and shared with it.

    Owns its file until :meth:`close`; the memory lives as long as anything refers to it. In the
    worker, which closes what it has inherited, the file is gone and the memory is not.
    """

    def __init__(self, shared: int | None = None) -> None:
        """Make a board; one of another process: :meth:`read_only`. Raises OSError."""
        is_ours = shared is None
        fd = memfile.make("forwarder-board", BOARD_BYTES) if shared is None else shared
        try:
            self._words = memfile.words_of(fd, BOARD_BYTES, writable=is_ours)
        except BaseException:
            os.close(fd)
            raise
        memfile.keep_writers_out(fd)
        self._fd = fd

    @classmethod
    def read_only(cls, fd: int) -> Board:
        """The board behind a descriptor, which becomes the new object's. Nobody can write by it.

        Raises OSError, and ValueError for a file that is no board; the descriptor is closed then.
        """
        if not memfile.is_made(fd, BOARD_BYTES):
            os.close(fd)
            raise ValueError("not a board")
        return cls(fd)

    def fileno(self) -> int:
        """The file, for a process that is to read it. -1 when it is closed."""
        return self._fd

    def close(self) -> None:
        """Close the file. Who has mapped it goes on."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def row(self, number: int) -> memoryview:
        """A row, to count in or to read."""
        return self._words[number * WORDS : (number + 1) * WORDS]
