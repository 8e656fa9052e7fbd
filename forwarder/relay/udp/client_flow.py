"""The flow of one UDP client: UDP on the client's side, UDP or TCP on the other.

Theory of operation
-------------------
A flow begins without a socket of its own: the listener hands it what the client sends, and answers
leave through the listener's socket. With the second datagram it *settles*: it gets a socket that
is bound to the listener's address and connected to the client, to which the kernel gives everything
from then on (see ``net.udp``). So one question and its answer cost one socket, and whatever lasts
goes on through resizes, reloads and upgrades, in this worker or in another one (``moving.flows``).

How many flows settle is bounded, because on a wildcard and on an IPv6 address the kernel looks
through all sockets of the address when a datagram of an unknown client comes (Linux 6.18, loopback:
7 us with 1,000, 57 to 90 us with 4,000 to 6,000), and before Linux 6.13 for every datagram. On an
IPv4 address it does not, see ``net.udp``; there descriptors are the bound. The others are served
through the listener; they lose nothing by that until their worker is resized away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from forwarder.net import peers, sockets
from forwarder.net.datagrams import Destination
from forwarder.net.sockets import Target
from forwarder.relay.poller import EDGE_IN, READABLE, WRITABLE
from forwarder.relay.session import SessionState
from forwarder.relay.udp.directions import DatagramDirection, DatagramToStream, StreamToDatagram
from forwarder.relay.udp.flow import Flow
from forwarder.stats.reasons import CloseReason, Phase, Who

if TYPE_CHECKING:
    import socket

    from forwarder.net.sockets import SockAddr
    from forwarder.relay.moving.parcel import Json
    from forwarder.relay.udp.directions import FlowDirection
    from forwarder.relay.udp.flow import UdpHome
    from forwarder.upstream.pool import Pool


class Receiver(Protocol):
    """The listener of a flow, which outlives no flow that is not settled.

    ``bound`` is the address that it is bound to.
    """

    pool: Pool
    bound: Target

    @property
    def sock(self) -> socket.SocketType:
        """What answers leave through."""

    def local(self, peer: bytes) -> Target:
        """The address of ours that a client uses."""

    def answer_to(self, peer: bytes) -> bytes:
        """The peer to send answers to, with our address to send from."""

    def resume_when_writable(self, direction: FlowDirection) -> None:
        """Call ``direction.resume`` when the listener's socket takes more."""

    def forget(self, flow: UdpFlow) -> None:
        """One of its flows has ended, or goes on in another worker."""


class Adopter(Receiver, Protocol):
    """A listener that also takes settled flows that come from another worker."""

    def adopt(self, flow: UdpFlow) -> None:
        """A flow of a client of its address is one of its flows from now on."""


class StandIn:
    """A listener in name only: of a settled flow whose own one was in another worker."""

    __slots__ = ("bound", "pool", "sock")

    def __init__(self, pool: Pool, bound: Target, client: socket.SocketType) -> None:
        """``client`` is the flow's own socket."""
        self.pool = pool
        self.bound = bound
        self.sock = client

    def local(self, peer: bytes) -> Target:
        """The address of ours that a client uses."""
        return local_of(self.bound, peer)

    def answer_to(self, peer: bytes) -> bytes:
        """As there; no answer leaves this way."""
        return peer

    def resume_when_writable(self, direction: FlowDirection) -> None:
        """As there; nothing waits for this."""

    def forget(self, flow: UdpFlow) -> None:
        """As there."""


def local_of(bound: Target, peer: bytes) -> Target:
    """The address of ours that a client of a listener uses, which is bound to ``bound``."""
    host = peers.local_host(peer)
    return bound if host is None else Target(bound.family, (host, bound.port))


class UdpFlow(Flow):
    """The flow of a client of ``listener``, by whose ``peer`` it is known there.

    ``gathers``: the kernel may hand over several datagrams as one. ``lasts``: it is worth a socket
    of its own before its listener stops.
    """

    __slots__ = ("listener", "peer", "table")

    gathers = True
    lasts = True

    c2u: DatagramDirection | DatagramToStream
    u2c: DatagramDirection | StreamToDatagram

    def __init__(
        self, relay: UdpHome, listener: Receiver, peer: bytes, client_address: SockAddr
    ) -> None:
        super().__init__(relay, listener.pool, client_address)
        self.listener = listener
        self.peer = peer
        self.join(*self.make_directions())
        self.u2c.to = Destination(listener.sock.fileno(), listener.answer_to(peer))
        self.table = relay.flows.of(self.pool)
        self.table.add(self)

    def make_directions(
        self,
    ) -> tuple[DatagramDirection | DatagramToStream, DatagramDirection | StreamToDatagram]:
        """Make the two directions."""
        return DatagramDirection(self.relay.bench, self), DatagramDirection(self.relay.bench, self)

    def local(self) -> Target:
        """The address of ours that the client uses."""
        return self.listener.local(self.peer)

    @property
    def is_settled(self) -> bool:
        """Whether it has a socket of its own for its client."""
        return self.client is not None

    def settle(self, sock: socket.SocketType) -> bool:
        """Own from here on a socket for this client alone: connected to it, and read dry.

        False if the poller does not take it: then all is as it was.
        """
        is_blocked = self.u2c.holds_data
        events = EDGE_IN | WRITABLE if is_blocked else EDGE_IN
        try:
            self.relay.poller.register(sock.fileno(), self.c2u, events)
        except OSError:
            return False
        self.client = sock
        if self.gathers:
            self.relay.bench.batch.prepare(sock)
        self.u2c.to = Destination(sock.fileno())
        self.c2u.src = sock
        return True

    def touch(self) -> None:
        """Something arrived just now."""
        self.active_at = self.relay.poller.now
        self.table.touch(self)

    def on_connected(self, upstream: socket.SocketType, mask: int) -> None:
        """Send there from now on, what waits first."""
        del mask
        assert self.target is not None  # noqa: S101 - it is connected
        to = self.to_upstream(upstream, self.target)
        self.join_upstream(upstream, to, gathers=self.gathers)
        self.on_open()
        self.c2u.resume()

    def to_upstream(self, upstream: socket.SocketType, target: Target) -> Destination:
        """How datagrams are sent to ``target``."""
        del target
        return Destination(upstream.fileno())

    def traits(self) -> dict[str, object]:
        """What only flows of its class know, for another worker."""
        return {}

    def take_traits(self, content: Json) -> None:
        """Have what :meth:`traits` of the same flow has given. Raises ValueError for nonsense."""

    def on_blocked(self, direction: FlowDirection) -> None:
        """``direction``, to a UDP socket, waits until that takes more; it may be the listener's."""
        if direction is self.u2c and not self.is_settled:
            self.listener.resume_when_writable(direction)
        else:
            super().on_blocked(direction)

    def close(self, reason: CloseReason) -> None:
        """End, and let the listener forget it; the client's next datagram begins another flow."""
        if self.state is SessionState.CLOSED:
            return
        self.listener.forget(self)
        self.table.discard(self)
        super().close(reason)


class UdpToTcpFlow(UdpFlow):
    """A UDP client whose datagrams are one TCP connection upstream."""

    __slots__ = ()

    is_answered = True
    c2u: DatagramToStream
    u2c: StreamToDatagram

    def make_directions(self) -> tuple[DatagramToStream, StreamToDatagram]:
        """Make the two directions."""
        bench, framing = self.relay.bench, self.pool.rule.framing
        return DatagramToStream(bench, self, framing), StreamToDatagram(bench, self, framing)

    def make_socket(
        self, target: Target, source: SockAddr | None, *, is_rival: bool
    ) -> socket.SocketType:
        """Make a TCP socket."""
        del is_rival  # none of these is made of the spare descriptor
        return sockets.upstream_socket(target, source, self.pool.how[target.family])

    def connect(self, upstream: socket.SocketType, target: Target) -> int:
        """Begin to connect."""
        return upstream.connect_ex(target.sockaddr)

    def on_connected(self, upstream: socket.SocketType, mask: int) -> None:
        """Send there from now on, what waits first."""
        self.dialer = None
        self.upstream = upstream
        self.relay.poller.hand_over(upstream.fileno(), self.u2c)
        self.u2c.src = upstream
        self.on_open()
        self.c2u.open(upstream)
        if mask & READABLE and self.u2c.src is not None:
            self.u2c.pump(mask)

    def on_stream_ended(self) -> None:
        """The upstream sends no more; what the client sends from now on begins a new flow."""
        self.close(CloseReason(Who.UPSTREAM, Phase.DATA))

    def on_stream_broken(self, why: str) -> None:
        """The upstream has reset the connection."""
        self.close(CloseReason(Who.UPSTREAM, Phase.DATA, why, is_reset=True))

    @property
    def to_stream(self) -> DatagramToStream:
        """To the upstream."""
        return self.c2u
