"""The pools of one worker: of the rules in force, and of rules that were.

Chooses no upstream and ends no session.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, WeakValueDictionary

from forwarder.relay.moving.parcel import read
from forwarder.relay.moving.terms import have_other_members, rule_of, terms_of
from forwarder.stats.board import SHARED_ROW
from forwarder.upstream.members import differ_by_members
from forwarder.upstream.pool import Pool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from forwarder.balancing.balancer import Balancer
    from forwarder.config.model import Rule
    from forwarder.relay.moving.parcel import Json
    from forwarder.relay.session import Session
    from forwarder.stats.rows import Row
    from forwarder.upstream.names import Names


class Pools:
    """``in_force`` are those of the rules that are served, by name.

    ``needing`` are those of them that name interfaces for their upstreams.
    """

    __slots__ = (
        "_brought",
        "_former",
        "_names",
        "_ports",
        "_row_of",
        "_terms",
        "in_force",
        "needing",
    )

    def __init__(self, names: Names, row_of: Callable[[int], Row]) -> None:
        """``row_of`` gives the row of a number on the worker's board."""
        self.in_force: dict[str, Pool] = {}
        self.needing: list[Pool] = []
        self._names = names
        self._row_of = row_of
        self._former: set[Pool] = set()  # whose rules are served, by other members of a name
        # Of rules that are not served so, or not here, while sessions from other workers use them.
        self._brought: WeakValueDictionary[str, Pool] = WeakValueDictionary()
        self._ports: WeakValueDictionary[tuple[int, int], Pool] = WeakValueDictionary()
        self._terms: WeakKeyDictionary[Pool, Json] = WeakKeyDictionary()

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

    # -- sessions that come from another worker, or go to one

    def terms(self, pool: Pool) -> Json:
        """What a session needs of the rule of a whole pool."""
        found = self._terms.get(pool)
        if found is None:
            found = self._terms[pool] = terms_of(pool.rule)
        return found

    def by_terms(self, terms: Json, row: int | None) -> Pool:
        """The pool for sessions under these terms: the one in force, or one of a former rule.

        ``row`` is the one that counts their rule; None: they are another instance's. Raises
        ValueError for nonsense.
        """
        name = read(terms, "name", "")
        now = self.in_force.get(name)
        if now is not None and self.terms(now) == terms:
            return now
        if row is None:
            row = SHARED_ROW if now is None else now.row
        key = json.dumps([row, terms], sort_keys=True)
        pool = self._brought.get(key)
        if pool is None:
            pool = Pool(rule_of(terms), self._names, row, self._row_of(row))
            self._brought[key] = pool
            self._terms[pool] = terms
        return pool

    def at(self, pool: Pool, offset: int) -> Pool:
        """As ``Pool.at``, but made once for all sessions that come to a port."""
        if not offset:
            return pool
        found = self._ports.get((id(pool), offset))  # a pool of a port keeps the one of the rule
        if found is None:
            found = pool.at(offset)
            if found is not pool:
                self._ports[id(pool), offset] = found
        return found

    def is_gone(self, pool: Pool) -> bool:
        """Whether the rule of a whole pool is gone, or is another one now."""
        now = self.in_force.get(pool.rule.name)
        if now is None or now is pool:
            return now is None
        return not have_other_members(self.terms(pool), self.terms(now))

    # -- making them

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
