"""Sends of datagrams that are taken or not, as a test says."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

    from forwarder.relay.relay import Relay


class LimitedSends:
    """Lets the sockets of relays, of all together, take so many datagrams more: ``room``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *relays: Relay) -> None:
        self.room = 0
        for relay in relays:
            self._limit(relay, monkeypatch)

    def _limit(self, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
        batch = relay.bench.batch
        send, send_copy = batch.send, batch.send_copy

        def limited(to: object, first: int, last: int) -> int:
            taken = min(self.room, last - first)
            self.room -= taken
            return send(to, first, first + taken) if taken else first  # type: ignore[arg-type]

        def limited_copy(to: object, content: bytes) -> bool:
            if not self.room:
                return False
            self.room -= 1
            return send_copy(to, content)  # type: ignore[arg-type]

        monkeypatch.setattr(batch, "send", limited)
        monkeypatch.setattr(batch, "send_copy", limited_copy)
