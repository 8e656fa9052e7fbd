"""Two relays in this process that give each other flows: see ``moving``."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from forwarder.config.model import Protocol, Rule
from forwarder.net import udp as net_udp
from forwarder.net.sockets import Target
from forwarder.relay.access import AccessList
from forwarder.relay.udp_listener import UdpListener
from support.by_hand import RULE, StubPool, accepted, target_of
from support.datagrams import free_udp_address, udp, udp_client
from support.moving import Pair, Side

if TYPE_CHECKING:
    import socket

    from forwarder.config.model import RelayMode


class FlowPair(Pair):
    """Both serve one rule at one address; the other listens only when it is told to."""

    def __init__(self, *modes: RelayMode) -> None:
        super().__init__(*modes)
        self._listeners: list[UdpListener] = []

    def own(self, sock: socket.socket) -> socket.socket:
        """Close a socket when the test is over."""
        return self._stack.enter_context(sock)

    def upstream(self, host: str = "127.0.0.1") -> socket.socket:
        """A UDP upstream."""
        return self.own(udp(host))

    def serve(
        self, *upstreams: socket.socket | Target, protocol: Protocol = Protocol.UDP, **more: object
    ) -> Rule:
        """Have the same rule in force in both; ``more`` are its other fields."""
        rule: Rule = replace(RULE, protocol=protocol, **more)  # type: ignore[arg-type]  # as there
        targets = tuple(one if isinstance(one, Target) else target_of(one) for one in upstreams)
        for side in self.sides:
            side.serve(StubPool(rule, targets))
        return rule

    def listen(
        self, side: Side | None = None, host: str = "127.0.0.1", beside: UdpListener | None = None
    ) -> UdpListener:
        """A listener of a side, the first by default; ``beside``: at the address of another one."""
        side = side or self.one
        port = beside.bound.port if beside else free_udp_address(host)[1]
        if beside:
            host = str(beside.bound.sockaddr[0])
        (pool,) = side.pools.in_force.values()
        sock = self.own(
            net_udp.listen_udp(
                Target(2 if ":" not in host else 10, (host, port)),
                v6only=":" in host and host != "::",
                options=pool.rule.options,
            )
        )
        listener = UdpListener(self.loop, side.relay, sock, pool, AccessList.compile((), ()))
        listener.start()
        self._listeners.append(listener)
        return listener

    def client(self, listener: UdpListener) -> socket.socket:
        """A client of a listener."""
        host, port = str(listener.bound.sockaddr[0]), listener.bound.port
        return self.own(udp_client(({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port)))

    def ask(self, client: socket.socket, upstream: socket.socket, text: bytes) -> tuple[str, int]:
        """A datagram from the client to the upstream; returns where it came from there."""
        client.send(text)
        self.turn()
        got, source = upstream.recvfrom(65536)
        assert got == text
        return source[0], source[1]

    def answer(
        self, upstream: socket.socket, source: tuple[str, int], client: socket.socket, text: bytes
    ) -> None:
        """A datagram from the upstream to the client."""
        upstream.sendto(text, source)
        self.turn()
        assert client.recv(65536) == text

    def settled(
        self, client: socket.socket, upstream: socket.socket, answer: bytes = b"hello"
    ) -> tuple[str, int]:
        """Have a client's flow settle; returns where its datagrams come from."""
        source = self.ask(client, upstream, b"one")
        assert self.ask(client, upstream, b"two") == source
        if answer:
            self.answer(upstream, source, client, answer)
        return source

    def bridge(self) -> socket.socket:
        """Give the first relay a TCP client; returns the client's end."""
        client, sock, address = accepted()
        (pool,) = self.one.pools.in_force.values()
        self.one.relay.open_session(pool, sock, address)
        self.turn()
        return self.own(client)

    def close(self) -> None:
        """As there; no listener knows a flow any more."""
        for side in self.sides:
            side.close()
        for listener in self._listeners:
            assert not listener._flows
            assert listener._settled == 0
        for side in self.sides:
            assert not side.relay.flows
            assert not +side.relay.flows.ports._used
        super().close()
