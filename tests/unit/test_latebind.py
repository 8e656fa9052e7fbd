"""Rules that are tried again: what is asked of the system for them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from forwarder.config.address import Address
from forwarder.config.model import Config, Rule, Upstream
from forwarder.errors import Place
from forwarder.serving.latebind import LateBinds
from forwarder.serving.loader import Candidate
from forwarder.serving.retries import Retries

if TYPE_CHECKING:
    from forwarder.serving.loader import Rejected


def rule(name: str, host: str) -> Rule:
    return Rule(
        name=name,
        listen=Address(host, 80),
        upstreams=(Upstream(Address("127.0.0.1", 1)),),
        retries_bind=True,
        place=Place(name),
    )


class Service:
    """One of whose rules the last one is to be tried again."""

    def __init__(self, *rules: Rule) -> None:
        self.config = Config(rules=rules)
        self.retries = Retries()
        self.awaited: set[str] = set()
        self.found: Candidate | Rejected | None = None

    def due(self, now: float) -> Config:
        del now
        return replace(self.config, rules=self.config.rules[-1:])

    def bind_late(self, found: Candidate | Rejected, tried: Config, slots: int) -> bool:
        assert (tried.rules, slots) == (self.config.rules[-1:], 1)
        self.found = found
        return False


def test_an_address_that_is_tried_again_is_the_one_that_it_was() -> None:
    """The IPv6 wildcard leaves IPv4 to a rule of its own, also while that is not tried."""
    for others, v6only in (((rule("four", "0.0.0.0"),), True), ((), False)):
        service = Service(*others, rule("six", "::"))
        late = LateBinds(service, dict, lambda: 1, may_bind=lambda: True, on_bound=lambda: None)
        late.turn(0.0)
        assert isinstance(service.found, Candidate)
        assert [address.v6only for address in service.found.binds["six"]] == [v6only]
