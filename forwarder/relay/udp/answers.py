"""Flows whose upstream answers in a known way: once to each question, or from another port.

*One answer* (``answers = "one"``, as in DNS): the flow ends as soon as nothing is left to be
answered, so its port, or its connection, is in use for as long as a question takes. Name servers
allow few connections (RFC 7766, section 6.2.2).

*Any port* (``answers = "any-port"``, as in TFTP, RFC 1350 section 4): the socket towards the
upstream is not connected at first. The first datagram that comes from the upstream's address, from
whatever port, is the answer; the socket is connected to where that came from, and from then on the
flow is one like others. When nobody listens there any more it ends, and what the client sends then
goes to the configured port again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from forwarder.config.model import Answers, Protocol
from forwarder.net import peers, udp
from forwarder.net.datagrams import SLOTS, Destination
from forwarder.relay.poller import BROKEN
from forwarder.relay.udp.client_flow import UdpFlow, UdpToTcpFlow
from forwarder.relay.udp.directions import (
    UNLIMITED,
    DatagramToStream,
    DatagramWay,
    StreamToDatagram,
)
from forwarder.stats.reasons import CloseReason, Phase, Who

if TYPE_CHECKING:
    import socket

    from forwarder.config.model import Rule
    from forwarder.net.sockets import SockAddr, Target
    from forwarder.relay.relay import Relay
    from forwarder.relay.udp_listener import UdpListener

_ANSWERED: Final = CloseReason(Who.UPSTREAM, Phase.DATA, "answered")
_GONE: Final = CloseReason(Who.UPSTREAM, Phase.DATA, "its port is closed")


def flow_class(rule: Rule) -> type[UdpFlow]:
    """What a client of a rule whose clients speak UDP gets."""
    is_one = rule.answers is Answers.ONE
    if rule.protocol is Protocol.UDP_TO_TCP:
        return _OneAnswerToTcpFlow if is_one else UdpToTcpFlow
    if rule.answers is Answers.ANY_PORT:
        return _AnyPortFlow
    return _OneAnswerFlow if is_one else UdpFlow


# -- one answer


class _OneAnswerFlow(UdpFlow):
    """``unanswered``: questions that wait for an answer. A slot of a batch holds one datagram."""

    __slots__ = ("unanswered",)

    gathers = False

    def __init__(
        self, relay: Relay, listener: UdpListener, peer: bytes, client_address: SockAddr
    ) -> None:
        self.unanswered = 0
        super().__init__(relay, listener, peer, client_address)

    def make_ways(self) -> tuple[DatagramWay, DatagramWay]:
        """Make the two ways."""
        return _Questions(self.relay, self), _Answers(self.relay, self)


class _Questions(DatagramWay):
    __slots__ = ()

    flow: _OneAnswerFlow

    def deliver(self, first: int, last: int) -> bool:
        self.flow.unanswered += last - first
        return super().deliver(first, last)


class _Answers(DatagramWay):
    __slots__ = ()

    flow: _OneAnswerFlow

    def deliver(self, first: int, last: int) -> bool:
        self.flow.unanswered -= last - first
        return super().deliver(first, last) and not self._has_ended()

    def resume(self) -> None:
        super().resume()
        if self.src is not None and not self.holds_data:
            self._has_ended()

    def _has_ended(self) -> bool:
        is_over = self.flow.unanswered <= 0
        if is_over:
            self.flow.close(_ANSWERED)
        return is_over


class _OneAnswerToTcpFlow(UdpToTcpFlow):
    """The same over a connection; each frame is an answer."""

    __slots__ = ("unanswered",)

    gathers = False

    def __init__(
        self, relay: Relay, listener: UdpListener, peer: bytes, client_address: SockAddr
    ) -> None:
        self.unanswered = 0
        super().__init__(relay, listener, peer, client_address)

    def make_ways(self) -> tuple[DatagramToStream, StreamToDatagram]:
        """Make the two ways."""
        framing = self.pool.rule.framing
        return _QuestionStream(self.relay, self, framing), _AnswerStream(self.relay, self, framing)


class _QuestionStream(DatagramToStream):
    __slots__ = ()

    flow: _OneAnswerToTcpFlow

    def deliver(self, first: int, last: int) -> bool:
        self.flow.unanswered += last - first
        return super().deliver(first, last)


class _AnswerStream(StreamToDatagram):
    __slots__ = ()

    flow: _OneAnswerToTcpFlow

    def _send(self) -> bool:
        waiting = len(self._pending)
        is_sent = super()._send()
        self.flow.unanswered -= waiting - len(self._pending)
        if is_sent and waiting and self.flow.unanswered <= 0:
            self.flow.close(_ANSWERED)
            return False
        return is_sent


# -- any port


class _AnyPortFlow(UdpFlow):
    """``is_found``: whether it is known from which port the upstream answers."""

    __slots__ = ("is_found",)

    u2c: _FirstAnswer

    def __init__(
        self, relay: Relay, listener: UdpListener, peer: bytes, client_address: SockAddr
    ) -> None:
        self.is_found = False
        super().__init__(relay, listener, peer, client_address)

    def make_ways(self) -> tuple[DatagramWay, DatagramWay]:
        """Make the two ways."""
        return DatagramWay(self.relay, self), _FirstAnswer(self.relay, self)

    def make_socket(
        self, target: Target, source: SockAddr | None, *, is_rival: bool
    ) -> socket.SocketType:
        """Make a socket that hears everybody."""
        del is_rival
        self.is_found = False  # where another upstream was left
        self.u2c.answerer = b""
        return udp.open_socket(target, source, self.pool.how[target.family])

    def on_report(self, number: int) -> None:
        """The port that has answered is closed: the flow ends, see :class:`_FirstAnswer`."""
        if not self.is_found:
            super().on_report(number)

    def to_upstream(self, upstream: socket.SocketType, target: Target) -> Destination:
        """Each datagram is sent there, until it is known who answers."""
        address = target.sockaddr
        assert not isinstance(address, str)  # noqa: S101 - not of UDP
        return Destination(upstream.fileno(), peers.pack(target.family, address))

    def find(self, answerer: bytes) -> None:
        """Speak to where the first answer has come from, and to nobody else."""
        assert self.upstream is not None  # noqa: S101 - it has answered
        self.is_found = True
        self.upstream.connect(peers.address_of(answerer))
        assert isinstance(self.c2u, DatagramWay)  # noqa: S101 - make_ways
        self.c2u.to = Destination(self.upstream.fileno())


class _FirstAnswer(DatagramWay):
    """From the upstream, of whom at first only the address is known."""

    __slots__ = ("answerer",)

    flow: _AnyPortFlow

    def __init__(self, relay: Relay, flow: _AnyPortFlow) -> None:
        super().__init__(relay, flow)
        self.answerer = b""

    def move(self, mask: int, room: int = UNLIMITED) -> None:
        """Move what is there; look who it is from, as long as it may be from anybody."""
        if self.flow.is_found:
            super().move(mask, room)
            if mask & BROKEN and self.src is not None and not self.holds_data:
                self.flow.close(_GONE)
            return
        while self.src is not None:
            was_found = self.flow.is_found
            count = self.relay.batch.receive_from(self.src.fileno())
            for slot in range(count):
                self._take(slot)
            # What came before the socket was connected is still in its queue.
            if count < SLOTS and self.flow.is_found is was_found:
                return

    def _take(self, slot: int) -> None:
        peer = self.relay.batch.peer(slot)
        if not self.flow.is_found and self._is_upstream(peer):
            self.answerer = peer
            self.flow.find(peer)
        if peer == self.answerer:
            self.deliver(slot, slot + 1)
        else:
            self.relay.drop_datagrams(self.flow.pool, 1)

    def _is_upstream(self, peer: bytes) -> bool:
        target = self.flow.target
        if target is None or not peers.is_answerable(peer):
            return False
        return peers.is_from(peer, str(target.sockaddr[0]))
