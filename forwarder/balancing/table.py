"""The table of servers: what the master and the checker say of each, in memory that workers read.

Theory of operation
-------------------
A server has a *seat*, eight words. Each word has one writer: the master writes what an operator or
the configuration wants, the checker what it has found out. All zero means: as configured, and
usable. So a table that nobody has written to, or whose checker is dead, keeps nobody from serving.

Seat 0 is no server: its words say when something was changed last, so that a worker reads a word
or two per session and looks at the servers only when there is something new. A writer writes first,
and the time then. It is a time and no count, as during an upgrade two masters may write there, and
no change may get lost. The last seat is shared by all servers that found no other free, so nothing
is ever said there.

An aligned 8-byte store cannot be seen half done on any machine that CPython runs on.
"""

from __future__ import annotations

import os
import time
from enum import IntEnum
from typing import Final

from forwarder.stats.board import ROWS
from forwarder.system import memfile

# As many as there are rows of servers on a board: the seat of a server is its row less ROWS.
SEATS: Final = ROWS
SHARED: Final = SEATS - 1
SEAT_WORDS: Final = 8
TABLE_BYTES: Final = SEATS * SEAT_WORDS * 8
# What a successor must know to read the words of its predecessor: another number, another meaning.
LAYOUT: Final = 1
# The words of a seat. ORDER is the master's, all others are the checker's.
ORDER, HEALTH, STATE, SINCE_NS, CHECKS_PASSED, CHECKS_FAILED, EJECTIONS, AGENT_LIMIT = range(8)
# The words of seat 0: when the master, and the checker, has changed something last.
ORDERS, FINDINGS = range(2)
# HEALTH is 0 or one more than the part of its weight that a server has, in thousandths.
FULL: Final = 1000
# The most: that of an agent which makes the least weight the greatest.
MOST_SHARE: Final = 256 * FULL


class Standing(IntEnum):
    """What the checker thinks of a server: the word STATE."""

    UP = 0
    DOWN = 1  # by checks
    EJECTED = 2  # by failed connects
    UNKNOWN = 3  # not checked yet, and not to be used before that
    SLOW = 4  # up again, and not at its full weight yet


# ORDER is 0 for "as configured", or these bits.
HAS_ORDER: Final = 1 << 32
DRAINS: Final = 1 << 33  # no new sessions
DISABLED: Final = 1 << 34  # and no checks
CUTS: Final = 1 << 35  # and its sessions are reset
_ALL: Final = (1 << 64) - 1
_WEIGHT: Final = (1 << 16) - 1  # used if HAS_WEIGHT
HAS_WEIGHT: Final = 1 << 36


class ServerTable:
    """The memory. Made by the master before it forks; owns its file until :meth:`close`."""

    def __init__(self, fd: int | None = None) -> None:
        """Make a table, or map that of ``fd``, which becomes ours.

        Raises OSError, and ValueError for a file that is no table; the descriptor is closed then.
        """
        if fd is None:
            fd = memfile.make("forwarder-servers", TABLE_BYTES)
        if not memfile.is_made(fd, TABLE_BYTES):
            os.close(fd)
            raise ValueError("not a table of servers")
        try:
            self.words = memfile.words_of(fd, TABLE_BYTES, writable=True)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd

    def fileno(self) -> int:
        """The file, for one that is to share it."""
        return self._fd

    def close(self) -> None:
        """Close the file; the memory lives as long as anything refers to it."""
        os.close(self._fd)

    @property
    def revision(self) -> int:
        """A number that is another one when something has changed."""
        words = self.words
        return words[ORDERS] + words[FINDINGS]

    def word(self, seat: int, which: int) -> int:
        """One word of a seat."""
        return self.words[seat * SEAT_WORDS + which]

    # -- the master

    def order(self, seat: int, order: int) -> None:
        """Say what an operator wants of a server; 0: nothing but what is configured."""
        if seat != SHARED:
            self.words[seat * SEAT_WORDS + ORDER] = order
            self.words[ORDERS] = time.monotonic_ns()

    def clear(self, seat: int) -> None:
        """Make a seat free for another server. The checker must not know the old one any more."""
        at = seat * SEAT_WORDS
        self.words[at : at + SEAT_WORDS] = memoryview(bytes(8 * SEAT_WORDS)).cast("Q")
        self.words[ORDERS] = time.monotonic_ns()

    # -- the checker

    def find(
        self, seat: int, standing: Standing, share: int, since_ns: int, *, limit: int = 0
    ) -> None:
        """Say what was found out. ``share``: what part of its weight it has, in thousandths.

        More than FULL only where its agent says so, as it does of ``limit``: how many sessions it
        may have in place of ``max_sessions``, 0 is as configured.
        """
        if seat == SHARED:
            return
        at = seat * SEAT_WORDS
        words = self.words
        words[at + HEALTH] = 0 if share == FULL else share + 1
        words[at + AGENT_LIMIT] = limit
        words[at + STATE] = standing
        words[at + SINCE_NS] = since_ns
        words[FINDINGS] = time.monotonic_ns()

    def count(self, seat: int, which: int) -> None:
        """Count one more of something: CHECKS_PASSED, CHECKS_FAILED or EJECTIONS."""
        at = seat * SEAT_WORDS + which
        self.words[at] = (self.words[at] + 1) & _ALL  # a predecessor may have left anything

    # -- everybody

    def said(self, seat: int) -> tuple[int, ...]:
        """All that makes a difference to a choice, to be compared with what was said before."""
        at = seat * SEAT_WORDS
        words = self.words
        return words[at + ORDER], words[at + HEALTH], words[at + STATE], words[at + AGENT_LIMIT]

    def orders(self, seat: int, configured: int) -> tuple[int, bool]:
        """What weight a server has, unless it is down, and whether it is to get no session at all.

        ``configured`` is its weight unless an operator has given it another one.
        """
        order = self.words[seat * SEAT_WORDS]
        return (
            order & _WEIGHT if order & HAS_WEIGHT else configured,
            bool(order & (DRAINS | DISABLED)),
        )

    def share(self, seat: int) -> int:
        """What part of its weight a server has by what was found out, in thousandths; 0: none."""
        health = self.words[seat * SEAT_WORDS + HEALTH]
        return min(health - 1, MOST_SHARE) if health else FULL

    def limit(self, seat: int, configured: int) -> int:
        """How many sessions a server may have, 0 is no limit: as configured, or by its agent."""
        return self.words[seat * SEAT_WORDS + AGENT_LIMIT] or configured

    def standing(self, seat: int) -> Standing:
        """What the checker thinks of a server; UP for what only newer code knows."""
        state = self.words[seat * SEAT_WORDS + STATE]
        return Standing(state) if state < len(Standing) else Standing.UP

    def weight(self, seat: int, configured: int) -> int:
        """The weight of a server now, in thousandths; 0: it gets no session while others can."""
        weight, is_out = self.orders(seat, configured)
        return 0 if is_out else weight * self.share(seat)
