"""Memory in which one worker counts and others read. No lock and no message.

An aligned 8-byte store cannot be seen half done on any machine that CPython runs on.
"""

from __future__ import annotations

import mmap
from typing import Final

from forwarder.stats.rows import WORDS

# Rules that have a row of their own; further ones share the last row. A page exists once something
# in it was counted, so the memory of unused rules is address space only.
ROWS: Final = 65536


class Board:
    """The rows of one worker. Made by the master before it forks the worker, and shared with it.

    The memory lives as long as anything refers to it.
    """

    def __init__(self) -> None:
        self._words = memoryview(mmap.mmap(-1, ROWS * WORDS * 8)).cast("Q")

    def row(self, number: int) -> memoryview:
        """A row, to count in or to read."""
        return self._words[number * WORDS : (number + 1) * WORDS]
