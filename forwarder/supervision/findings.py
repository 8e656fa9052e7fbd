"""What the checker has found out, as the master reports it: lines of the log, and reasons kept.

The state of a server is in the table; here is why it is in it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from forwarder.balancing.table import Standing
from forwarder.checker.standing import What
from forwarder.system.printable import field, visible
from forwarder.system.rarely import Crowds

if TYPE_CHECKING:
    from collections.abc import Iterable

    from forwarder.checker.messages import Checked, News
    from forwarder.stats.ledger import Ledger, Server
    from forwarder.supervision.servers import Servers

log = logging.getLogger(__name__)

# What the log calls them.
_EVENTS: Final = {
    What.DOWN: "upstream.down",
    What.UP: "upstream.up",
    What.EJECTED: "upstream.ejected",
    What.RETURNED: "upstream.returned",
    What.FAILING: "upstream.failing",
    What.RECOVERING: "upstream.recovering",
}
_TROUBLES: Final = frozenset({What.DOWN, What.EJECTED})
# What only says that something may be about to change.
_HINTS: Final = frozenset({What.FAILING, What.RECOVERING})
# What only says why things are as they are: how they are.
_NO_CHANGES: Final = {What.REASON: What.DOWN, What.REMARK: What.UP}
_USABLE: Final = frozenset({Standing.UP, Standing.SLOW})


@dataclass(frozen=True, slots=True)
class Finding:
    """The last change of a server: what it was, why, and when, in monotonic seconds."""

    what: What
    why: str
    at: float


class Findings:
    """Why servers are as they are, by group and name."""

    def __init__(self, servers: Servers, ledger: Ledger) -> None:
        """The table of ``servers`` and the counters of ``ledger`` are read for what is logged."""
        self._servers = servers
        self._ledger = ledger
        self._found: dict[Server, Finding] = {}
        self._groups: dict[str, Checked] = {}
        self._crowds = Crowds()

    def use(self, groups: Iterable[Checked]) -> None:
        """Forget what was found of all servers but those of these groups."""
        self._groups = {group.name: group for group in groups}
        known = {(it.name, str(up)) for it in self._groups.values() for up, _ in it.servers}
        self._found = {one: found for one, found in self._found.items() if one in known}

    def of(self, group: str, server: str) -> Finding | None:
        """The last change of a server; None if there was none."""
        return self._found.get((group, server))

    def take(self, news: Iterable[News], now: float) -> None:
        """Take in what the checker has found, and log it: some servers by name, if it is many."""
        for one in news:
            if one.group not in self._groups:
                continue  # it did not know that yet
            if one.what in _NO_CHANGES:
                known = self._found.get((one.group, one.server))
                at = known.at if known is not None else one.at
                self._found[one.group, one.server] = Finding(_NO_CHANGES[one.what], one.why, at)
                continue
            if one.what not in _HINTS:
                self._found[one.group, one.server] = Finding(one.what, one.why, one.at)
            if self._crowds.names((one.what.value, one.group), one.server, now):
                log.log(_level(one.what), "%s %s", _EVENTS[one.what], self._line(one))

    @property
    def deadline(self) -> float | None:
        """When :meth:`turn` has something to do; None for never."""
        return self._crowds.deadline

    def turn(self, now: float) -> None:
        """Log how many servers were not named."""
        for (word, group), more in self._crowds.over(now):
            what = What(word)
            log.log(
                _level(what),
                "%s group=%s and %d more servers, left=%d: `forwarder upstream list`",
                _EVENTS[what],
                field(visible(group)),
                more,
                self.usable(group),
            )

    def usable(self, group: str) -> int:
        """How many servers of a group get sessions now, by what was found and ordered."""
        checked = self._groups.get(group)
        servers = checked.servers if checked is not None else ()
        table = self._servers.table
        return sum(
            table.standing(seat) in _USABLE and table.weight(seat, upstream.weight) > 0
            for upstream, seat in servers
        )

    def _line(self, one: News) -> str:
        parts = [f"group={field(visible(one.group))} server={field(visible(one.server))}"]
        if one.why:
            parts.append(f"why={field(visible(one.why))}")
        if one.after:
            parts.append(f"after={one.after}")
        if one.what not in _HINTS:
            sessions = self._ledger.server(one.group, one.server)["sessions"]
            parts.append(f"sessions={sessions} left={self.usable(one.group)}")
        return " ".join(parts)


def _level(what: What) -> int:
    return logging.WARNING if what in _TROUBLES else logging.INFO
