"""What all workers together shall serve, as a value: from the service to the fleet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forwarder.config.model import Config
    from forwarder.serving.addresses import BindAddress


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What all workers together shall serve. ``binds``: where each rule listens, by its name.

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
