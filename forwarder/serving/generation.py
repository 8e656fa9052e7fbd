"""What all workers together have to serve, as a value: from the service to the fleet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from forwarder.config.model import Config, Rule
    from forwarder.serving.addresses import BindAddress
    from forwarder.serving.listeners import ListenerTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What all workers together have to serve. ``binds``: where each rule listens, by its name.

    ``counted_as`` names the rule as which each one is counted, where that is not its own name.
    ``revision`` grows with every change, ``generation`` with every accepted reload.
    """

    revision: int
    generation: int
    config: Config
    binds: dict[str, tuple[BindAddress, ...]]
    counted_as: dict[str, str]

    def counted_names(self) -> list[str]:
        """Under which name each rule is counted, in their order."""
        alias = self.counted_as
        return [alias.get(rule.name, rule.name) for rule in self.config.rules]

    def groups(self) -> list[tuple[Rule, str]]:
        """The rules, in their order, each with the name by which its group is known."""
        names = zip(self.config.rules, self.counted_names(), strict=True)
        return [(rule, rule.group.name or name) for rule, name in names]

    def share(
        self, table: ListenerTable, slots: Iterable[int]
    ) -> tuple[dict[int, int], dict[int, int]]:
        """The sockets of some slots: their descriptors by id, and by id the index of their rule."""
        descriptors: dict[int, int] = {}
        routes: dict[int, int] = {}
        for index, rule in enumerate(self.config.rules):
            for address in self.binds[rule.name]:
                mine = table.descriptors(address, slots)
                descriptors |= mine
                routes |= dict.fromkeys(mine, index)
        return descriptors, routes
