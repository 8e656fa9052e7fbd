"""The pools of one worker: of the rules in force, and of rules that were.

Chooses no upstream and ends no session.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from forwarder.upstream.members import differ_by_members
from forwarder.upstream.pool import Pool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from forwarder.balancing.balancer import Balancer
    from forwarder.config.model import Rule
    from forwarder.relay.session import Session
    from forwarder.stats.rows import Row
    from forwarder.upstream.names import Names


class Pools:
    """``in_force`` are those of the rules that are served, by name.

    ``needing`` are those of them that name interfaces for their upstreams.
    """

    __slots__ = ("_former", "_names", "_row_of", "in_force", "needing")

    def __init__(self, names: Names, row_of: Callable[[int], Row]) -> None:
        """``row_of`` gives the row of a number on the worker's board."""
        self.in_force: dict[str, Pool] = {}
        self.needing: list[Pool] = []
        self._names = names
        self._row_of = row_of
        self._former: set[Pool] = set()  # whose rules are served, by other members of a name

    def apply(
        self,
        rules: Sequence[Rule],
        rows: Sequence[int],
        balancers: Sequence[Balancer | None],
        sessions: Iterable[Session],
    ) -> set[Pool]:
        """Serve these rules from now on, each with the row that counts it and its balancer.

        Returns the pools of rules that are gone, or are others now.
        """
        before = {*self.in_force.values(), *self._former}
        self.in_force = {
            rule.name: self._of(rule, row, balancer)
            for rule, row, balancer in zip(rules, rows, balancers, strict=True)
        }
        self.needing = [pool for pool in self.in_force.values() if pool.needs_interfaces]
        gone = before.difference(self.in_force.values())
        moved = {pool for pool in gone if self._has_only_moved(pool)}
        # Thousands of rules may share a group.
        self._former = moved and moved & {session.pool.origin for session in sessions}
        return gone - moved

    def _of(self, rule: Rule, row: int, balancer: Balancer | None) -> Pool:
        """The pool of an unchanged rule goes on, with its names; others are new."""
        known = self.in_force.get(rule.name)
        is_same = known is not None and (known.rule, known.row) == (rule, row)
        if known is not None and is_same and known.balancer is balancer:
            return known
        return Pool(rule, self._names, row, self._row_of(row), balancer)

    def _has_only_moved(self, pool: Pool) -> bool:
        """Whether the rule of a former pool is as it was, but for members of names."""
        now = self.in_force.get(pool.rule.name)
        return now is not None and differ_by_members(pool.rule, now.rule)
