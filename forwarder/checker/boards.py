"""The failed connects of all workers, read from their boards and put together.

Nothing is read of a server as long as no worker has counted a failed connect; that one word per
board says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from forwarder.stats.board import ROWS
from forwarder.stats.rows import (
    BYTES_U2C,
    CONNECT_BUCKETS,
    CONNECT_MS,
    CONNECTS_FAILED,
    SESSIONS,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from forwarder.checker.checks import Server
    from forwarder.stats.board import Board

_NOTHING: Final = (0, 0)


class Concerned(Protocol):
    """Whom failed connects concern, see :class:`forwarder.checker.checks.Checks`."""

    def watched(self) -> Iterator[Server]:
        """The servers whose failed connects count."""

    def on_connects(self, server: Server, failed: int, worked: int, *, is_first: bool) -> bool:
        """So many connects have failed and worked. Returns whether to look again soon."""


class _Seen:
    """A board, and what was read on it the last time."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.alarm_row = board.row(ROWS)
        self.alarm = self.alarm_row[SESSIONS]
        self.counts: dict[int, tuple[int, int]] = {}  # by seat: failed, worked


class Boards:
    """The boards of the workers that live."""

    def __init__(self, checks: Concerned) -> None:
        """What is found goes to ``checks``."""
        self._checks = checks
        self._boards: dict[int, _Seen] = {}
        self._hot: set[Server] = set()  # that were looked at the last time, and will be again

    def add(self, pid: int, board: Board) -> None:
        """Read that board, too, but not what was counted there before. Its file is closed."""
        board.close()  # it stays mapped
        self._boards[pid] = seen = _Seen(board)
        if seen.alarm:
            for server in self._checks.watched():
                seen.counts[server.seat] = _counts(seen, server)

    def remove(self, pid: int) -> None:
        """Read the board of a worker no longer."""
        self._boards.pop(pid, None)

    def on_other_servers(self) -> None:
        """Seats may be others' now, who have counted nothing there."""
        watched = {server.seat: server for server in self._checks.watched()}
        self._hot &= set(watched.values())
        for seen in self._boards.values():
            known = seen.counts
            seen.counts = {seat: known[seat] for seat in watched.keys() & known.keys()}
            if seen.alarm:
                for seat in watched.keys() - known.keys():
                    seen.counts[seat] = _counts(seen, watched[seat])

    def look(self) -> None:
        """Look for failed connects, and at what became of those of the last time."""
        found = set(self._hot)
        for seen in self._boards.values():
            alarm = seen.alarm_row[SESSIONS]
            if alarm != seen.alarm:
                seen.alarm = alarm
                found.update(self._failing(seen, self._checks.watched()))
        if found:
            before = self._hot
            self._hot = {server for server in found if self._is_hot(server, before)}

    def _failing(self, seen: _Seen, servers: Iterable[Server]) -> list[Server]:
        """The servers to which connects of that worker have failed since the last time."""
        row, counts = seen.board.row, seen.counts
        return [
            server
            for server in servers
            if row(ROWS + server.seat)[CONNECTS_FAILED] != counts.get(server.seat, _NOTHING)[0]
        ]

    def _is_hot(self, server: Server, before: set[Server]) -> bool:
        failed = worked = 0
        for seen in self._boards.values():
            old = seen.counts.get(server.seat, _NOTHING)
            new = seen.counts[server.seat] = _counts(seen, server)
            failed += max(0, new[0] - old[0])
            worked += max(0, new[1] - old[1])
        is_first = server not in before
        return self._checks.on_connects(server, failed, worked, is_first=is_first)


def _counts(seen: _Seen, server: Server) -> tuple[int, int]:
    """How many connects of a worker to a server have failed, and how many have worked.

    A connect by UDP says nothing, so there it is what has come back.
    """
    row = seen.board.row(ROWS + server.seat)
    if server.checked.is_udp:
        return row[CONNECTS_FAILED], row[BYTES_U2C]
    return row[CONNECTS_FAILED], sum(row[CONNECT_MS : CONNECT_MS + CONNECT_BUCKETS])
