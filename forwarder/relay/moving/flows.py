"""How sessions with UDP on a side go to another worker: settled flows, and bridges; all when OPEN.

What has come to their sockets and was not read yet stays there, as with streams (``streams``), and
so does what comes while nobody watches them: a settled flow is connected to its client, so the
kernel finds it whatever process has it. What was read and not sent, what an upstream has got that
has not answered yet, and the beginning of a frame travel in a memory file.
"""

from __future__ import annotations

import os
import socket
import struct
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from forwarder.config.model import Protocol
from forwarder.ipc.channel import read_memory_file, to_memory_file
from forwarder.net import peers
from forwarder.net.datagrams import Destination
from forwarder.net.sockets import Target
from forwarder.relay.moving.flow_state import FlowState
from forwarder.relay.moving.kinds import Load, restore, socket_of
from forwarder.relay.moving.parcel import Way, read, read_address
from forwarder.relay.poller import EDGE_ALL, EDGE_IN, READABLE, WRITABLE
from forwarder.relay.session import SessionState
from forwarder.relay.udp.answers import flow_class
from forwarder.relay.udp.bridge import Bridge
from forwarder.relay.udp.client_flow import StandIn, UdpFlow, UdpToTcpFlow
from forwarder.relay.udp.directions import DatagramDirection, StreamToDatagram
from forwarder.relay.udp.trial import Trial

if TYPE_CHECKING:
    from forwarder.relay.moving.parcel import Parcel
    from forwarder.relay.poller import Handler, Poller
    from forwarder.relay.relay import Relay
    from forwarder.relay.udp.directions import FlowDirection
    from forwarder.relay.udp.flow import Flow
    from forwarder.upstream.pool import Pool

_Flow = TypeVar("_Flow", bound="Flow")

# A turn reads at most 64 slots of 64 KiB each way before it finds that they cannot be sent.
_MOST_BYTES: Final = 16 * 1024 * 1024


class _Kind(Generic[_Flow]):
    """See :class:`forwarder.relay.moving.kinds.Kind`. ``protocols`` are those of its rules."""

    protocols: frozenset[Protocol]

    def may_move(self, session: _Flow) -> bool:
        """One that has an upstream; another one will, or ends, within ``connect_timeout``."""
        return session.state is SessionState.OPEN

    def describe(self, session: _Flow) -> Load:
        """Its two sockets, and what waits in it."""
        assert session.client is not None  # noqa: S101 - it is settled, or a bridge
        assert session.upstream is not None  # noqa: S101 - it is open
        fds = [session.client.fileno(), session.upstream.fileno()]
        state = _state_of(session)
        held = state.as_bytes()
        made = [to_memory_file(held)] if held else []
        fields = {
            "c2u": _way(session.c2u),
            "u2c": _way(session.u2c),
            "more": state.as_json() | self._more(session),
        }
        return Load(fields, fds + made, made)

    def let_go(self, session: _Flow) -> None:
        """Take it from poller, meters and ports."""
        relay = session.relay
        relay.flows.ports.give(session.pool)
        for direction in (session.c2u, session.u2c):
            direction.src = None
            if direction.meter is not None:
                direction.meter.forget(direction)
        for sock in (session.client, session.upstream):
            assert sock is not None  # noqa: S101 - as above
            relay.poller.unregister(sock.fileno())
            sock.detach()
        session.client = session.upstream = None

    def unpack(self, parcel: Parcel, fds: list[int], pool: Pool, relay: Relay) -> _Flow:
        """Make it again, and watch its sockets. Raises OSError or ValueError."""
        if parcel.state != SessionState.OPEN.value or parcel.target is None:
            raise ValueError("not the state of a flow that moves")
        if pool.rule.protocol not in self.protocols:
            raise ValueError("not the protocol of its rule")
        if len(fds) not in (2, 3):
            raise ValueError("not the descriptors of a flow")
        held = read_memory_file(fds[2], _MOST_BYTES) if len(fds) == 3 else b""
        state = FlowState.of(parcel.more, held)
        socks: list[socket.SocketType] = []
        session = None
        try:
            socks += map(socket_of, fds[:2], self._socket_kinds(pool))
            session = self._make(parcel, pool, relay, socks[0])
            restore(session, parcel)
            session.upstream = session.u2c.src = socks[1]
            _put(session, parcel, state)
            with ExitStack() as watched:
                self._watch(session, socks[0], state, watched)
                watched.pop_all()
        except BaseException:
            if session is not None:
                self._undo(session)
            for sock in socks:
                sock.detach()
            raise
        for fd in fds[2:]:
            os.close(fd)
        self._go_on(session, state, relay)
        return session

    def _more(self, session: _Flow) -> dict[str, object]:
        """What its parcel says beside :class:`FlowState`."""
        del session
        return {}

    def _socket_kinds(self, pool: Pool) -> tuple[int, int]:
        """Of the client's and the upstream's."""
        raise NotImplementedError

    def _make(self, parcel: Parcel, pool: Pool, relay: Relay, client: socket.SocketType) -> _Flow:
        """Begin it anew. Raises ValueError."""
        raise NotImplementedError

    def _watch(
        self, session: _Flow, client: socket.SocketType, state: FlowState, watched: ExitStack
    ) -> None:
        """Let its directions lead where they did, and have events reported. Raises OSError."""
        raise NotImplementedError

    def _undo(self, session: _Flow) -> None:
        """There is no such flow."""
        session.relay.sessions.pop(session, None)
        session.client = session.upstream = None
        session.c2u.src = session.u2c.src = None
        session.unlink()

    def _go_on(self, session: _Flow, state: FlowState, relay: Relay) -> None:
        """Do what it was about to do. Does not fail."""
        relay.flows.ports.take(session.pool)
        session.is_shared = True  # its giver and the master still have its sockets
        session.refusal = state.refusal
        if state.refusal or (state.is_detached and state.c2u):
            relay.poller.call_again(session)


class Flows(_Kind[UdpFlow]):
    """Those of UDP clients, once they have a socket of their own."""

    name = "flow"
    protocols = frozenset({Protocol.UDP, Protocol.UDP_TO_TCP})

    def may_move(self, session: UdpFlow) -> bool:
        """As there; one without a socket of its own gets one, or ends, with its listener."""
        return session.is_settled and super().may_move(session)

    def let_go(self, session: UdpFlow) -> None:
        """Take it from its listener and the table of its rule as well."""
        session.listener.forget(session)
        session.table.discard(session)
        super().let_go(session)

    def _more(self, session: UdpFlow) -> dict[str, object]:
        bound = session.listener.bound
        found = {"peer": session.peer.hex(), "family": bound.family, "bound": bound.sockaddr}
        return found | session.traits()

    def _socket_kinds(self, pool: Pool) -> tuple[int, int]:
        is_by_udp = pool.rule.protocol.connects_by_udp
        return socket.SOCK_DGRAM, socket.SOCK_DGRAM if is_by_udp else socket.SOCK_STREAM

    def _make(self, parcel: Parcel, pool: Pool, relay: Relay, client: socket.SocketType) -> UdpFlow:
        more = parcel.more
        peer = _peer(read(more, "peer", ""))
        bound = Target(read(more, "family", 0), read_address(more.get("bound")))
        session = flow_class(pool.rule)(
            relay, StandIn(pool, bound, client), peer, peers.address_of(peer)
        )
        session.table.mix()
        try:
            session.take_traits(more)
        except ValueError:
            self._undo(session)
            raise
        return session

    def _watch(
        self, session: UdpFlow, client: socket.SocketType, state: FlowState, watched: ExitStack
    ) -> None:
        upstream, target = session.upstream, session.target
        assert upstream is not None  # noqa: S101 - it was set just now
        assert target is not None  # noqa: S101 - as above
        if isinstance(session, UdpToTcpFlow):
            session.c2u.lead_to(upstream)
            _watch_stream(session, upstream, session.u2c, watched)
        else:
            _watch_upstream(session, session.to_upstream(upstream, target), state, watched)
            if session.gathers:
                session.relay.bench.batch.prepare(upstream)
        if not session.settle(client):
            raise OSError("the socket of its client cannot be watched")

    def _undo(self, session: UdpFlow) -> None:
        session.table.discard(session)
        super()._undo(session)

    def _go_on(self, session: UdpFlow, state: FlowState, relay: Relay) -> None:
        """As there; the listener of its address, if there is one here, knows it from now on."""
        super()._go_on(session, state, relay)
        listeners = relay.udp_listeners.get(session.listener.bound)
        if listeners:
            listeners[0].adopt(session)


class Bridges(_Kind[Bridge]):
    """Those of TCP clients whose upstream is reached by UDP."""

    name = "bridge"
    protocols = frozenset({Protocol.TCP_TO_UDP})

    def _socket_kinds(self, pool: Pool) -> tuple[int, int]:
        del pool
        return socket.SOCK_STREAM, socket.SOCK_DGRAM

    def _make(self, parcel: Parcel, pool: Pool, relay: Relay, client: socket.SocketType) -> Bridge:
        return Bridge(relay, pool, client, parcel.client)

    def _watch(
        self, session: Bridge, client: socket.SocketType, state: FlowState, watched: ExitStack
    ) -> None:
        upstream = session.upstream
        assert upstream is not None  # noqa: S101 - it was set just now
        session.c2u.src = client
        session.u2c.lead_to(client)
        _watch_upstream(session, Destination(upstream.fileno()), state, watched)
        session.relay.bench.batch.prepare(upstream)
        _watch_stream(session, client, session.c2u, watched)


def _state_of(session: Flow) -> FlowState:
    c2u, u2c = session.c2u, session.u2c
    return FlowState(
        c2u=tuple(c2u.held),
        u2c=tuple(u2c.held),
        asked=None if c2u.trial is None else tuple(c2u.trial.kept),
        rest=b"".join(one.decoder.rest for one in (c2u, u2c) if isinstance(one, StreamToDatagram)),
        is_detached=session.is_detached,
        refusal=session.refusal,
    )


def _way(direction: FlowDirection) -> Way:
    is_done = isinstance(direction, StreamToDatagram) and direction.is_ended
    return Way(moved=direction.moved, is_done=is_done)


def _put(session: Flow, parcel: Parcel, state: FlowState) -> None:
    """Put into both directions what they held."""
    for direction, way, held in (
        (session.c2u, parcel.c2u, state.c2u),
        (session.u2c, parcel.u2c, state.u2c),
    ):
        direction.moved = direction.counted = way.moved
        direction.hold([*held])
        if isinstance(direction, StreamToDatagram):
            direction.is_ended = way.is_done
            direction.decoder.feed(memoryview(state.rest))
    if state.asked is not None:
        session.c2u.trial = Trial(session)
        session.c2u.trial.keep(state.asked)


def _watch_upstream(session: Flow, to: Destination, state: FlowState, watched: ExitStack) -> None:
    """Watch an upstream that is reached by UDP, and send there if it is not to be left."""
    c2u, upstream = session.c2u, session.upstream
    assert isinstance(c2u, DatagramDirection | StreamToDatagram)  # noqa: S101 - by UDP
    assert upstream is not None  # noqa: S101 - it was set just now
    events = EDGE_IN
    if not state.is_detached:
        c2u.to = to
        if c2u.holds_data:
            events |= WRITABLE
    handler: Handler = c2u.trial or session.u2c
    _register(session.relay.poller, upstream, handler, events, watched)


def _watch_stream(
    session: Flow, sock: socket.SocketType, direction: StreamToDatagram, watched: ExitStack
) -> None:
    """Watch the stream of a flow, the first time with care."""
    poller = session.relay.poller
    _register(poller, sock, _Arrival(session, direction, poller), EDGE_ALL, watched)


def _register(
    poller: Poller, sock: socket.SocketType, handler: Handler, events: int, watched: ExitStack
) -> None:
    poller.register(sock.fileno(), handler, events)
    watched.callback(poller.unregister, sock.fileno())


def _peer(text: str) -> bytes:
    """A peer of a parcel. Raises ValueError for nonsense."""
    peer = bytes.fromhex(text)
    try:
        address, local = peers.split(peer)
        peers.address_of(address)
    except (struct.error, KeyError) as err:
        raise ValueError("not a client") from err
    if len(local) not in (0, 4, 16):
        raise ValueError("not a client")
    return peer


class _Arrival:
    """Handles the first event of a stream's socket that is watched anew, for its direction.

    As with streams, what is reported again is no sign of life.
    """

    __slots__ = ("_direction", "_flow", "_poller")

    def __init__(self, flow: Flow, direction: StreamToDatagram, poller: Poller) -> None:
        self._flow = flow
        self._direction = direction
        self._poller = poller

    def on_events(self, mask: int) -> None:
        """Handle them, and leave all further ones to the direction."""
        flow, direction = self._flow, self._direction
        assert direction.src is not None  # noqa: S101 - it is what is watched
        self._poller.hand_over(direction.src.fileno(), direction)
        if not mask & READABLE:
            direction.on_writable()
            return
        active_at, before = flow.active_at, (direction.moved, direction.is_ended)
        direction.on_events(mask)
        if before == (direction.moved, direction.is_ended):
            flow.active_at = active_at

    def on_bug(self) -> None:
        """End the flow whose event handler failed."""
        self._direction.on_bug()
