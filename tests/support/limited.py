"""A forwarder of one rule that has limits."""

from __future__ import annotations

import select
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from support import control
from support.ends import Link, accept, be_reset, carry, connect, open_link, receive_to_reset
from support.flood import Flood
from support.waiting import PATIENCE_S, eventually

if TYPE_CHECKING:
    import socket

    from support.configured import Configured

HOSTS = tuple(f"127.0.1.{number}" for number in range(1, 6))
LIMIT = 20


@dataclass
class Limited:
    """A forwarder of one rule with limits, and its upstream."""

    it: Configured
    address: tuple[str, int]
    upstream: socket.socket
    head: str
    links: list[Link] = field(default_factory=list)

    def text(self, more: str, top: str = "") -> str:
        """The configuration with these limits."""
        host, port = self.address
        return (
            f'{self.head}{top}\n[[forwarding_rules]]\nname = "one"\nlisten = "{host}:{port}"\n'
            'upstream = "{}:{}"\n{}\n'.format(*self.upstream.getsockname()[:2], more)
        )

    def reload(self, more: str, top: str = "") -> None:
        assert "reloaded" in self.it.reload(self.text(more, top))

    def flood(self, hold: int = LIMIT, hosts: tuple[str, ...] = HOSTS) -> Flood:
        return Flood(self.address, self.upstream, hold, hosts)

    def link(self) -> Link:
        """A session, which is there."""
        self.upstream.settimeout(30)
        link = open_link(self.address, self.upstream)
        self.links.append(link)
        carry(link.client, link.upstream, b"x")
        return link

    def link_if_there_is_room(self) -> bool:
        """A session, or a client that is reset; False then."""
        try:
            client = connect(self.address)
        except ConnectionResetError:
            return False
        ready, _, _ = select.select([client, self.upstream], [], [], PATIENCE_S)
        assert ready, "neither reset nor led to the upstream"
        if client in ready:
            with client:
                assert receive_to_reset(client) == b""
            return False
        self.links.append(Link(client, accept(self.upstream)))
        return True

    def refused(self) -> None:
        """One more client is reset."""
        be_reset(self.address)

    def close_links(self) -> None:
        while self.links:
            self.links.pop().close()

    def status(self) -> dict[str, object]:
        """What the status says of the rule."""
        rules = control.ask(self.control, "status")["rules"]
        assert isinstance(rules, list)
        (found,) = rules
        assert isinstance(found, dict)
        return found

    @property
    def control(self) -> str:
        return f"{self.it.path}.sock"

    def ends(self, code: str) -> int:
        """How often sessions of the rule ended so."""
        found = self.status()["ends"]
        assert isinstance(found, dict)
        return int(found.get(code, 0))

    def assert_all_places_free(self, limit: int = LIMIT) -> None:
        """The full number of sessions can be had, and not one more."""

        def is_full() -> bool:
            with self.flood(limit * 3) as flood:
                flood.fill(limit * 2)
                found = flood.open
                assert found <= limit
                return found == limit

        eventually(is_full, "not all places are free")
