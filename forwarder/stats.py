"""What workers count, and the master's sums of it. Pure: plain numbers in, plain numbers out.

A worker reports over its channel what has changed, once per beat: its own counters as they stand,
and of each rule how much was added since its last report. The master keeps the sums, so what a
worker has reported outlives it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

# Of one worker. ``sessions`` are open now; all others only grow.
COUNTERS: Final = (
    "sessions",
    "sessions_total",
    "connects_failed",
    "bytes_c2u",
    "bytes_u2c",
    "bytes_spliced",
    "pipes_refused",
    "datagrams_dropped",
    "icmp_errors",
    "flows_evicted",
)
# So many rules go into one report: with the longest names (100 characters, each up to 12 bytes as
# JSON) it stays below what the channel takes.
RULES_PER_REPORT: Final = 24


@dataclass(slots=True)
class RuleCounts:
    """Of one rule in one worker. ``opened`` and ``failed`` count from the last report on."""

    sessions: int = 0
    opened: int = 0
    failed: int = 0
    reported: int = 0  # the sessions of the last report

    @property
    def has_news(self) -> bool:
        """Whether there is something to report."""
        return bool(self.opened or self.failed or self.sessions != self.reported)


def take_report(rules: Mapping[str, RuleCounts]) -> list[list[object]]:
    """News of at most RULES_PER_REPORT rules, which then are none any more."""
    news: list[list[object]] = []
    for name, counts in rules.items():
        if counts.has_news:
            news.append([name, counts.sessions, counts.opened, counts.failed])
            counts.reported = counts.sessions
            counts.opened = counts.failed = 0
            if len(news) == RULES_PER_REPORT:
                break
    return news


@dataclass(slots=True)
class _Worker:
    counters: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0))
    sessions: dict[str, int] = field(default_factory=dict)  # by rule; never 0


@dataclass(slots=True)
class _Rule:
    opened: int = 0
    failed: int = 0


class Tally:
    """The sums over all workers, those that are gone included."""

    def __init__(self) -> None:
        self._workers: dict[int, _Worker] = {}
        self._rules: dict[str, _Rule] = {}
        self._gone = dict.fromkeys(COUNTERS, 0)

    def hear(self, pid: int, message: Mapping[str, object]) -> None:
        """Take a worker's report. What is not a number of ours is left out."""
        worker = self._workers.setdefault(pid, _Worker())
        counters = message.get("counters")
        if isinstance(counters, dict):
            for name in COUNTERS:
                value = counters.get(name)
                if isinstance(value, int):
                    worker.counters[name] = value
        news = message.get("rules")
        for item in news if isinstance(news, list) else ():
            match item:
                case [str(name), int(sessions), int(opened), int(failed)]:
                    self._add(worker, name, sessions, (opened, failed))

    def _add(self, worker: _Worker, name: str, sessions: int, added: tuple[int, int]) -> None:
        rule = self._rules.setdefault(name, _Rule())
        rule.opened += added[0]
        rule.failed += added[1]
        if sessions:
            worker.sessions[name] = sessions
        else:
            worker.sessions.pop(name, None)

    def on_exit(self, pid: int) -> None:
        """A worker is gone, and its sessions with it; what it had done stays."""
        worker = self._workers.pop(pid, None)
        if worker is not None:
            for name, value in worker.counters.items():
                if name != "sessions":
                    self._gone[name] += value

    def forget_rules(self, known: Iterable[str]) -> None:
        """Drop the sums of rules that are neither known nor in use any more."""
        used = {name for worker in self._workers.values() for name in worker.sessions}
        for name in self._rules.keys() - used - set(known):
            del self._rules[name]

    def worker(self, pid: int) -> dict[str, int]:
        """The counters of one worker that lives."""
        return dict(self._workers.get(pid, _Worker()).counters)

    def totals(self) -> dict[str, int]:
        """The counters of all workers since the start."""
        found = dict(self._gone)
        for worker in self._workers.values():
            for name, value in worker.counters.items():
                found[name] += value
        return found

    def rules(self, names: Iterable[str]) -> dict[str, dict[str, int]]:
        """Counters of the named rules, over all workers."""
        found = {}
        for name in names:
            rule = self._rules.get(name, _Rule())
            found[name] = {
                "sessions": 0,
                "sessions_total": rule.opened,
                "connects_failed": rule.failed,
            }
        for worker in self._workers.values():
            for name, sessions in worker.sessions.items():
                if name in found:
                    found[name]["sessions"] += sessions
        return found
