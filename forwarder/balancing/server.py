"""One server of a group, as a value of a worker. Chooses nothing and counts nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forwarder.stats.board import ROWS

if TYPE_CHECKING:
    from forwarder.config.model import Upstream
    from forwarder.stats.rows import Row


class Server:
    """What a worker knows of one server of a group.

    ``name`` is its end as configured, ``index`` its place in the group. ``row`` is the number of
    its row, ``counts`` that row on the worker's board. ``is_counted``: its sessions are counted at
    the gate, too. ``is_limited``: there is a limit of them now.
    """

    __slots__ = (
        "counts",
        "index",
        "is_backup",
        "is_counted",
        "is_limited",
        "max_sessions",
        "name",
        "row",
        "weight",
    )

    def __init__(
        self,
        upstream: Upstream,
        index: int,
        row: int,
        counts: Row,
        is_counted: bool,  # noqa: FBT001
    ) -> None:
        self.name = str(upstream)
        self.index = index
        self.row = row
        self.counts = counts
        self.weight = upstream.weight
        self.is_backup = upstream.is_backup
        self.max_sessions = upstream.max_sessions
        self.is_counted = is_counted
        self.is_limited = False

    @property
    def seat(self) -> int:
        """Where it stands in the table of servers."""
        return self.row - ROWS

    def is_like(self, other: Server) -> bool:
        """Whether it has the same place, and the same is configured for it."""
        passing = ("counts", "is_limited")
        same = (one for one in self.__slots__ if one not in passing)
        return all(getattr(self, one) == getattr(other, one) for one in same)
