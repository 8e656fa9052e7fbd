"""What an instance serves, before any worker does."""

from __future__ import annotations

import time

from forwarder.config.address import Address
from forwarder.config.model import Config, Rule, Upstream
from forwarder.errors import Place
from forwarder.serving.service import Service


def test_what_is_due_is_done_though_workers_have_acknowledged_nothing() -> None:
    """A time that has passed and stays would keep the master busy."""
    rule = Rule(
        name="web",
        listen=Address("web.example", 80),
        upstreams=(Upstream(Address("127.0.0.1", 1)),),
        place=Place("web"),
    )
    service = Service(Config(rules=(rule,)), lambda: None)
    service.open(lambda _: [], {})
    assert service.awaited == {"web"}
    later = time.monotonic() + 60
    service.turn(later)
    assert service.deadline > later
    assert service.is_started
    service.table.release()
