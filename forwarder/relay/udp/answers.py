"""Flows whose upstream answers in a known way: once to each question, or from another port.

*One answer* (``answers = "one"``, as in DNS): the flow ends as soon as nothing is left to be
answered, so its port, or its connection, is in use for as long as a question takes. Name servers
allow few connections (RFC 7766, section 6.2.2).

*Any port* (``answers = "any-port"``, as in TFTP, RFC 1350 section 4): the socket towards the
upstream is not connected at first. The first datagram that comes from the upstream's address, from
whatever port, is the answer; the socket is connected to where that came from, and from then on the
flow is one like others. When that port is closed it ends, and what the client sends then goes to
the configured port again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from forwarder.config.model import Answers, Protocol
from forwarder.net import peers, udp
from forwarder.net.datagrams import SLOTS, Destination
from forwarder.relay.moving.parcel import read
from forwarder.relay.poller import BROKEN
from forwarder.relay.udp.client_flow import UdpFlow, UdpToTcpFlow
from forwarder.relay.udp.directions import (
    BATCHES_PER_TURN,
    UNLIMITED,
    DatagramDirection,
    DatagramToStream,
    FromDatagrams,
    StreamToDatagram,
)
from forwarder.stats.reasons import CloseReason, Phase, Who

if TYPE_CHECKING:
    import socket

    from forwarder.config.model import Rule
    from forwarder.net.sockets import SockAddr, Target
    from forwarder.relay.moving.parcel import Json
    from forwarder.relay.udp.client_flow import Receiver
    from forwarder.relay.udp.flow import UdpHome
    from forwarder.relay.workbench import Workbench

_ANSWERED: Final = CloseReason(Who.UPSTREAM, Phase.DATA, "answered")
_GONE: Final = CloseReason(Who.UPSTREAM, Phase.DATA, "its port is closed")


def flow_class(rule: Rule) -> type[UdpFlow]:
    """The flow that a client gets, of a rule that listens on UDP."""
    is_one = rule.answers is Answers.ONE
    if rule.protocol is Protocol.UDP_TO_TCP:
        return _OneAnswerToTcpFlow if is_one else UdpToTcpFlow
    if rule.answers is Answers.ANY_PORT:
        return _AnyPortFlow
    return _OneAnswerFlow if is_one else UdpFlow


# -- one answer


class _OneAnswer(UdpFlow):
    """``unanswered``: questions that wait for an answer. A slot of a batch holds one datagram.

    It has no socket of its own before its listener stops: a question that comes just when the flow
    ends would be lost with that. So one that has one ends by silence, as others do.
    """

    __slots__ = ("unanswered",)

    gathers = False
    lasts = False

    def __init__(
        self, relay: UdpHome, listener: Receiver, peer: bytes, client_address: SockAddr
    ) -> None:
        self.unanswered = 0
        super().__init__(relay, listener, peer, client_address)

    def traits(self) -> dict[str, object]:
        return {"unanswered": self.unanswered}

    def take_traits(self, content: Json) -> None:
        self.unanswered = read(content, "unanswered", 0)

    def has_ended(self) -> bool:
        """Whether all is answered; if so, it has ended."""
        if self.unanswered > 0 or self.is_settled:
            return False
        self.close(_ANSWERED)
        return True


class _OneAnswerFlow(_OneAnswer):
    __slots__ = ()

    def make_directions(self) -> tuple[DatagramDirection, DatagramDirection]:
        return _Questions(self.relay.bench, self), _Answers(self.relay.bench, self)


class _OneAnswerToTcpFlow(_OneAnswer, UdpToTcpFlow):
    """The same over a connection; each frame is an answer."""

    __slots__ = ()

    c2u: DatagramToStream
    u2c: StreamToDatagram

    def make_directions(self) -> tuple[DatagramToStream, StreamToDatagram]:
        bench, framing = self.relay.bench, self.pool.rule.framing
        return _QuestionStream(bench, self, framing), _AnswerStream(bench, self, framing)


class _Asking(FromDatagrams):
    """What both directions to an upstream have in common."""

    __slots__ = ()

    flow: _OneAnswer

    def deliver(self, first: int, last: int) -> bool:
        self.flow.unanswered += last - first
        return super().deliver(first, last)


class _Questions(_Asking, DatagramDirection):
    __slots__ = ()


class _QuestionStream(_Asking, DatagramToStream):
    __slots__ = ()


class _Answers(DatagramDirection):
    __slots__ = ()

    flow: _OneAnswer

    def deliver(self, first: int, last: int) -> bool:
        self.flow.unanswered -= last - first
        return super().deliver(first, last) and not self.flow.has_ended()

    def resume(self) -> None:
        super().resume()
        if self.src is not None and not self.holds_data:
            self.flow.has_ended()


class _AnswerStream(StreamToDatagram):
    __slots__ = ()

    flow: _OneAnswer

    def _send(self) -> bool:
        waiting = len(self._pending)
        is_sent = super()._send()
        self.flow.unanswered -= waiting - len(self._pending)
        return is_sent and not (waiting and self.flow.has_ended())


# -- any port


class _AnyPortFlow(UdpFlow):
    """``is_found``: whether it is known from which port the upstream answers.

    A slot of a batch holds one datagram, since each is looked at until then.
    """

    __slots__ = ("is_found",)

    gathers = False

    u2c: _FirstAnswer

    def __init__(
        self, relay: UdpHome, listener: Receiver, peer: bytes, client_address: SockAddr
    ) -> None:
        self.is_found = False
        super().__init__(relay, listener, peer, client_address)

    def make_directions(self) -> tuple[DatagramDirection, DatagramDirection]:
        """Make the two directions."""
        return DatagramDirection(self.relay.bench, self), _FirstAnswer(self.relay.bench, self)

    def make_socket(
        self, target: Target, source: SockAddr | None, *, is_rival: bool
    ) -> socket.SocketType:
        """Make a socket that receives from any address."""
        del is_rival
        self.is_found = False  # where another upstream was left
        self.u2c.forget()
        return udp.open_socket(target, source, self.pool.how[target.family])

    def on_answer(self) -> None:
        """A datagram has come: whether it is from the upstream is known later."""
        if self.is_found:
            super().on_answer()

    def on_report(self, number: int) -> None:
        """The port that has answered is closed: the flow ends, see :class:`_FirstAnswer`."""
        if not self.is_found:
            if self.upstream is not None:
                udp.forget_errors(self.upstream)
            super().on_report(number)

    def to_upstream(self, upstream: socket.SocketType, target: Target) -> Destination:
        """Each datagram is sent there, until the port that answers is known."""
        if self.is_found:
            return super().to_upstream(upstream, target)
        address = target.sockaddr
        assert not isinstance(address, str)  # noqa: S101 - not of UDP
        return Destination(upstream.fileno(), peers.pack(target.family, address))

    def find(self, answerer: bytes) -> bool:
        """Connect to where the first answer has come from.

        False if there is no route there any more: then nothing has changed.
        """
        upstream = self.upstream
        assert upstream is not None  # noqa: S101 - it has answered
        try:
            upstream.connect(peers.address_of(answerer))
        except OSError:
            return False
        udp.set_error_queue(upstream, is_on=False)
        self.is_found = True
        assert isinstance(self.c2u, DatagramDirection)  # noqa: S101 - make_directions
        self.c2u.to = Destination(upstream.fileno())
        if self.c2u.trial is not None:
            self.on_answer()
        return True

    def traits(self) -> dict[str, object]:
        """From which port it is answered, and what that means."""
        return {"answerer": self.u2c.answerer.hex(), "is_pure": self.u2c.is_pure}

    def take_traits(self, content: Json) -> None:
        """The same."""
        self.u2c.answerer = bytes.fromhex(read(content, "answerer", ""))
        self.u2c.is_pure = read(content, "is_pure", False)
        self.is_found = bool(self.u2c.answerer)


class _FirstAnswer(DatagramDirection):
    """From the upstream, of which at first only the address is known.

    ``is_pure``: nothing that others have sent is in the queue of ``src``.
    """

    __slots__ = ("answerer", "is_pure")

    flow: _AnyPortFlow

    def __init__(self, bench: Workbench, flow: _AnyPortFlow) -> None:
        super().__init__(bench, flow)
        self.forget()

    def forget(self) -> None:
        """There is another ``src``, which has got no answer."""
        self.answerer = b""
        self.is_pure = False

    def move(self, mask: int, room: int = UNLIMITED) -> None:
        """Move what is there; check the sender, as long as it may be any."""
        if not self.is_pure:
            self._move_some(room)
            return
        super().move(mask, room)
        if mask & BROKEN and self.src is not None and not self.holds_data:
            self.flow.close(_GONE)

    def _move_some(self, room: int) -> None:
        """Move what is from the upstream. What came before it was found is looked at, too."""
        enough = self.moved + room
        for _ in range(BATCHES_PER_TURN):
            if self.src is None or self.holds_data:
                return
            was_found = self.flow.is_found
            count = self.bench.batch.receive_from(self.src.fileno())
            for slot in range(count):
                self._take(slot)
            if count < SLOTS and self.flow.is_found is was_found:
                self.is_pure = was_found
                return
            if self.moved >= enough:
                break
        self.yield_turn()

    def _take(self, slot: int) -> None:
        flow, peer = self.flow, self.bench.batch.peer(slot)
        if not flow.is_found and self._is_upstream(peer) and flow.find(peer):
            self.answerer = peer
        if peer == self.answerer:
            self.deliver(slot, slot + 1)
        else:
            flow.drop(1)

    def _is_upstream(self, peer: bytes) -> bool:
        target = self.flow.target
        if target is None or not peers.is_answerable(peer):
            return False
        return peers.is_from(peer, str(target.sockaddr[0]))


FLOW_CLASSES: Final = (UdpFlow, UdpToTcpFlow, _OneAnswerFlow, _OneAnswerToTcpFlow, _AnyPortFlow)
"""All that :func:`flow_class` may give."""
