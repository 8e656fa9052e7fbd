"""The balancers of one worker; those of groups that a configuration does not change go on."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from forwarder.balancing.balancer import Balancer, Surroundings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from forwarder.balancing.table import ServerTable
    from forwarder.config.model import Group, Rule, Upstream
    from forwarder.limits.gate import Holder
    from forwarder.stats.rows import Row


class _Made(NamedTuple):
    """A balancer, and what it was made of."""

    group: Group
    upstreams: tuple[Upstream, ...]
    rows: tuple[int, ...]
    balancer: Balancer


class Balancers:
    """One for each definition of each group in force."""

    __slots__ = ("_holder", "_made", "_row_of", "_settle_soon", "_table")

    def __init__(
        self,
        table: ServerTable,
        row_of: Callable[[int], Row],
        holder: Holder,
        settle_soon: Callable[[], None],
    ) -> None:
        """See :class:`Surroundings`."""
        self._table = table
        self._row_of = row_of
        self._holder = holder
        self._settle_soon = settle_soon
        # By the name of the group: of one that rules share there are two definitions while an
        # address that the former one serves is closing.
        self._made: dict[str, list[_Made]] = {}

    @property
    def revision(self) -> int:
        """A number that is another one when the table of servers has changed."""
        return self._table.revision

    def __iter__(self) -> Iterator[Balancer]:
        return (one.balancer for made in self._made.values() for one in made)

    def apply(
        self,
        rules: Sequence[Rule],
        rows: Sequence[tuple[int, ...]],
        part: float,
    ) -> list[Balancer | None]:
        """The balancer of each of these rules, from now on; None where nothing is chosen.

        ``rows``: for each rule those of its upstreams, and last that of its group. ``part``: see
        :class:`Surroundings`.
        """
        surroundings = Surroundings(
            table=self._table,
            row_of=self._row_of,
            holder=self._holder,
            settle_soon=self._settle_soon,
            part=part,
        )
        made: dict[str, list[_Made]] = {}
        found: list[Balancer | None] = []
        for rule, own_rows in zip(rules, rows, strict=True):
            if not rule.is_balanced:
                found.append(None)
                continue
            own = made.setdefault(rule.group_name, [])
            one = _of(own, rule, own_rows)
            if one is None:
                one = self._make(rule, own_rows, surroundings)
                own.append(one)
            found.append(one.balancer)
        kept = {one.balancer for group in made.values() for one in group}
        for balancer in self:
            balancer.is_retired = balancer not in kept
        self._made = made
        return found

    def _make(self, rule: Rule, rows: tuple[int, ...], surroundings: Surroundings) -> _Made:
        known = self._made.get(rule.group_name, [])
        one = _of(known, rule, rows)
        if one is not None:
            return one
        former = known[0].balancer if known else None
        balancer = Balancer(rule.group, rule.upstreams, rows, surroundings, former)
        return _Made(rule.group, rule.upstreams, rows, balancer)


def _of(made: Sequence[_Made], rule: Rule, rows: tuple[int, ...]) -> _Made | None:
    """What was made for the group as this rule knows it."""
    wanted = (rule.group, rule.upstreams, rows)
    return next((one for one in made if one[:3] == wanted), None)
