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
    """One for each group of the configuration in force."""

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
        self._made: dict[str, _Made] = {}

    @property
    def revision(self) -> int:
        """A number that is another one when the table of servers has changed."""
        return self._table.revision

    def __iter__(self) -> Iterator[Balancer]:
        return (made.balancer for made in self._made.values())

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
        made: dict[str, _Made] = {}
        found: list[Balancer | None] = []
        for rule, own_rows in zip(rules, rows, strict=True):
            if not rule.is_balanced:
                found.append(None)
                continue
            name = rule.group_name
            if name not in made:
                made[name] = self._make(rule, own_rows, surroundings)
            found.append(made[name].balancer)
        self._made = made
        return found

    def _make(self, rule: Rule, rows: tuple[int, ...], surroundings: Surroundings) -> _Made:
        known = self._made.get(rule.group_name)
        if known is not None and known[:3] == (rule.group, rule.upstreams, rows):
            return known
        former = None if known is None else known.balancer
        balancer = Balancer(rule.group, rule.upstreams, rows, surroundings, former)
        return _Made(rule.group, rule.upstreams, rows, balancer)
