"""A flow goes on in another worker whatever it holds, and neither end sees anything of it."""

from __future__ import annotations

import errno
import select
import socket
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from support.by_hand import target_of
from support.datagrams import drain, numbered, receive_all, udp
from support.ends import accept, listen, receive_exactly, receive_to_end, reset
from support.limited_sends import LimitedSends
from support.moving_flows import FlowPair

from forwarder.config.model import Answers, Framing, Limits, Protocol, RelayMode
from forwarder.net.datagrams import SOL_UDP, UDP_SEGMENT
from forwarder.relay.udp import framing
from forwarder.relay.udp.client_flow import StandIn, UdpFlow
from forwarder.relay.udp.directions import DatagramDirection
from forwarder.stats.reasons import REASONS, Phase
from forwarder.stats.rows import (
    DATAGRAMS_DROPPED,
    ENDS,
    MOVED_IN,
    MOVED_OUT,
    SESSIONS,
    SESSIONS_TOTAL,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.moving import Side

    from forwarder.relay.udp.flow import Flow
    from forwarder.relay.udp_listener import UdpListener

AUTO, COPY = RelayMode.AUTO, RelayMode.COPY
MODES = [(AUTO, AUTO), (COPY, COPY), (AUTO, COPY), (COPY, AUTO)]
EVERY_MODE = pytest.mark.parametrize(
    "pair", MODES, ids=lambda modes: "-".join(mode.value for mode in modes), indirect=True
)


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Iterator[FlowPair]:
    """See :class:`FlowPair`."""
    with closing(FlowPair(*getattr(request, "param", ()))) as pair:
        yield pair


def flow_of(side: Side) -> Flow:
    return side.session  # type: ignore[return-value]


def ends(side: Side) -> dict[str, int]:
    """Why flows have ended in a worker."""
    return {code: side.row(1)[ENDS + i] for i, code in enumerate(REASONS) if side.row(1)[ENDS + i]}


# -- settled flows


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::"])
@EVERY_MODE
def test_datagrams_go_both_ways_before_meanwhile_and_after(pair: FlowPair, host: str) -> None:
    upstream = pair.upstream()
    pair.serve(upstream)
    listener = pair.listen(host=host)
    client = pair.client(listener)
    source = pair.settled(client, upstream)
    local = flow_of(pair.one).local()
    beside = pair.listen(pair.other, beside=listener)
    questions, answers = numbered(100), numbered(70, [300, 10])

    def meanwhile() -> None:
        for content in questions:
            client.send(content)
        for content in answers:
            upstream.sendto(content, source)

    assert pair.move(pair.one, pair.other, meanwhile) == 1
    assert receive_all(upstream, 100) == questions
    assert receive_all(client, 70) == answers
    assert (listener._settled, beside._settled) == (0, 1)
    assert [*beside._flows.values()] == [flow_of(pair.other)]
    assert flow_of(pair.other).local() == local
    assert pair.move(pair.other, pair.one) == 1
    assert pair.ask(client, upstream, b"three") == source
    pair.answer(upstream, source, client, b"four")
    assert (listener._settled, beside._settled) == (1, 0)


def test_a_flow_is_counted_once_and_no_younger_and_ends_once(pair: FlowPair) -> None:
    upstream = pair.upstream()
    pair.serve(upstream, udp_timeout_s=20.0)
    client = pair.client(pair.listen())
    source = pair.settled(client, upstream)
    pair.one.relay.count(pair.one.row(0))
    before = flow_of(pair.one)
    born = before.id, before.started_at, before.connected_at, before.target
    pair.loop.pass_time(7)
    pair.move(pair.one, pair.other)
    flow = flow_of(pair.other)
    assert (flow.id, flow.started_at, flow.connected_at, flow.target) == born
    assert pair.loop.now - flow.active_at == pytest.approx(7)
    one, other = pair.one.row(1), pair.other.row(1)
    counts = (SESSIONS, SESSIONS_TOTAL, MOVED_OUT, MOVED_IN)
    assert [one[index] for index in counts] == [0, 1, 1, 0]
    assert [other[index] for index in counts] == [1, 0, 0, 1]
    pair.answer(upstream, source, client, b"123")
    pair.loop.pass_time(25)
    assert (ends(pair.one), ends(pair.other)) == ({}, {"us/idle": 1})
    assert [side.relay.books.bytes_u2c for side in pair.sides] == [5, 3]


@pytest.mark.parametrize("is_back", [False, True])
@EVERY_MODE
def test_what_was_read_and_not_sent_comes_first(
    pair: FlowPair, monkeypatch: pytest.MonkeyPatch, is_back: bool
) -> None:
    """Both ways, of runs that were received as one; also where nobody takes the flow."""
    upstream = pair.upstream()
    pair.serve(upstream)
    listener = pair.listen()
    client = pair.client(listener)
    source = pair.settled(client, upstream)
    sent = numbered(60, [500])
    run = [(SOL_UDP, UDP_SEGMENT, (500).to_bytes(2, "little"))]
    with monkeypatch.context() as patch:
        full = LimitedSends(patch, *(side.relay for side in pair.sides))
        client.sendmsg([b"".join(sent[:20])], run)
        upstream.sendmsg([b"".join(sent[:20])], run, 0, source)
        pair.turn()
        flow = flow_of(pair.one)
        assert (flow.c2u.waiting, flow.u2c.waiting) == (20, 20)
        client.sendmsg([b"".join(sent[20:40])], run)  # stays in the queue
        upstream.sendmsg([b"".join(sent[20:40])], run, 0, source)
        given = pair.pack(pair.one)
        client.sendmsg([b"".join(sent[40:])], run)
        upstream.sendmsg([b"".join(sent[40:])], run, 0, source)
        if is_back:
            pair.settle(pair.one, given, refused=[0])
        else:
            assert pair.deliver(given, pair.other) == ([], "")
            pair.settle(pair.one, given)
        given.close()
        pair.turn()
        assert (drain(upstream), drain(client)) == ([], [])
        full.room = 2
        pair.turn()
    for _ in range(3):
        pair.turn()
    assert receive_all(upstream, 60) == sent
    assert receive_all(client, 60) == sent
    assert sum(side.row(1)[DATAGRAMS_DROPPED] for side in pair.sides) == 0


def test_where_nobody_listens_at_its_address_a_flow_goes_on(pair: FlowPair) -> None:
    """Its rule is gone there. Result: it is one flow until it is silent."""
    upstream = pair.upstream()
    pair.serve(upstream, udp_timeout_s=20.0)
    listener = pair.listen()
    client = pair.client(listener)
    source = pair.settled(client, upstream)
    pair.other.serve()
    local = flow_of(pair.one).local()
    pair.move(pair.one, pair.other)
    flow = flow_of(pair.other)
    assert isinstance(flow, UdpFlow)
    assert isinstance(flow.listener, StandIn)
    assert flow.local() == local
    assert pair.ask(client, upstream, b"three") == source
    pair.move(pair.other, pair.one)  # which knows its address again
    assert [*listener._flows.values()] == [flow_of(pair.one)]
    pair.loop.pass_time(25)
    assert not pair.one.relay.sessions


def hand(side: Side, listener: UdpListener, peer: bytes, text: bytes) -> None:
    """Have a listener find a datagram in its queue."""
    with udp() as queue, udp() as near:
        queue.setblocking(False)
        near.sendto(text, queue.getsockname())
        assert side.relay.bench.batch.receive_from(queue.fileno()) == 1
        listener._take(peer, 0, 1)


def test_what_a_client_says_to_the_listener_is_its_flows(pair: FlowPair) -> None:
    """A datagram may have been on its way into that queue. Result: no second flow."""
    upstream = pair.upstream()
    pair.serve(upstream)
    listener = pair.listen()
    source = pair.settled(pair.client(listener), upstream)
    beside = pair.listen(pair.other, beside=listener)
    pair.move(pair.one, pair.other)
    (peer,) = beside._flows
    hand(pair.other, beside, peer, b"late")
    assert upstream.recvfrom(100) == (b"late", source)
    assert len(pair.other.relay.sessions) == 1


def test_a_flow_that_its_client_has_there_already_stays_beside_it(pair: FlowPair) -> None:
    """The kernel sent the client's datagrams there before it settled here."""
    upstream = pair.upstream()
    pair.serve(upstream)
    listener = pair.listen()
    client = pair.client(listener)
    source = pair.settled(client, upstream)
    beside = pair.listen(pair.other, beside=listener)
    (peer,) = listener._flows
    hand(pair.other, beside, peer, b"elsewhere")
    there = upstream.recvfrom(100)[1]
    first = flow_of(pair.other)
    pair.move(pair.one, pair.other)
    assert [*beside._flows.values()] == [first]
    pair.answer(upstream, source, client, b"to one")
    pair.answer(upstream, there, client, b"to the other")
    assert pair.ask(client, upstream, b"three") == source
    beside.stop()
    pair.answer(upstream, there, client, b"and on")


def test_one_without_a_socket_of_its_own_is_left(pair: FlowPair) -> None:
    """Until its listener stops: then it settles, and goes."""
    upstream = pair.upstream()
    pair.serve(upstream)
    listener = pair.listen()
    client = pair.client(listener)
    source = pair.ask(client, upstream, b"one")
    given = pair.pack(pair.one)
    assert (len(given), given.left, given.busy) == (0, 0, 1)
    listener.stop()
    assert pair.move(pair.one, pair.other) == 1
    assert pair.ask(client, upstream, b"two") == source


def test_the_longest_silent_flow_makes_room_also_of_those_that_came(pair: FlowPair) -> None:
    upstream = pair.upstream()
    pair.serve(upstream, max_flows=4)
    listener = pair.listen()
    clients = [pair.client(listener) for _ in range(3)]
    for client in clients:
        pair.settled(client, upstream)
        pair.loop.pass_time(1)
    pair.ask(clients[0], upstream, b"the youngest now")
    beside = pair.listen(pair.other, beside=listener)
    pair.move(pair.one, pair.other)
    listener.stop()
    listener.sock.close()
    pair.loop.pass_time(1)
    for _ in range(2):
        pair.ask(pair.client(beside), upstream, b"new")
    (flow,) = [one for one in beside._flows.values() if one.peer[2:4] == _port(clients[0])]
    assert flow.is_settled
    ports = {one.peer[2:4] for one in beside._flows.values()}
    assert [_port(client) in ports for client in clients] == [True, False, True]


def _port(client: socket.socket) -> bytes:
    port: int = client.getsockname()[1]
    return port.to_bytes(2, "big")


def test_limits_ports_and_places_go_along(pair: FlowPair) -> None:
    upstream = pair.upstream()
    pair.serve(upstream, limits=Limits(max_sessions=3, bandwidth=1e6))
    client = pair.client(pair.listen())
    pair.settled(client, upstream)
    ports = [side.relay.flows.ports._used for side in pair.sides]
    assert [used[None] for used in ports] == [1, 0]
    pair.move(pair.one, pair.other)
    assert [used[None] for used in ports] == [0, 1]
    assert [side.holdings.rows[1] for side in pair.sides] == [0, 1]
    assert pair.shared.gate.sessions(1) == 1
    flow = flow_of(pair.other)
    assert flow.c2u.meter is pair.other.relay.restrictions.meters[1][0]


def test_a_flow_under_a_meter_waits_on_in_the_other_worker(pair: FlowPair) -> None:
    upstream = pair.upstream()
    pair.serve(upstream, limits=Limits(bandwidth=1000.0))
    client = pair.client(pair.listen())
    pair.settled(client, upstream, answer=b"")
    sent = numbered(10, [500])
    for content in sent:
        client.send(content)
        pair.turn()
    way = flow_of(pair.one).c2u
    assert way.meter is not None
    assert way.meter.holds_up(way)
    former = way.meter
    pair.move(pair.one, pair.other)
    assert not former.holds_up(way)
    got: list[bytes] = []
    while len(got) < len(sent):
        pair.loop.pass_time(0.1)
        pair.turn()
        got += drain(upstream)
    assert got == sent


# -- upstreams


def test_what_an_upstream_has_not_answered_reaches_the_next_one(pair: FlowPair) -> None:
    """On trial, moved, and it refuses only then."""
    first, second = pair.upstream(), pair.upstream()
    pair.serve(first, second)
    client = pair.client(pair.listen())
    pair.settled(client, first, answer=b"")
    given = pair.pack(pair.one)
    first.close()
    client.send(b"three")
    pair.deliver(given, pair.other)
    pair.settle(pair.one, given)
    given.close()
    for _ in range(3):
        pair.turn()
    assert receive_all(second, 3) == [b"one", b"two", b"three"]


def test_a_refusal_that_was_seen_is_acted_upon_there(pair: FlowPair) -> None:
    first, second = pair.upstream(), pair.upstream()
    pair.serve(first, second)
    client = pair.client(pair.listen())
    pair.settled(client, first, answer=b"")
    flow_of(pair.one).on_report(errno.ECONNREFUSED)
    pair.move(pair.one, pair.other)
    assert receive_all(second, 2) == [b"one", b"two"]


def test_one_that_is_to_leave_its_upstream_does_so_there(pair: FlowPair) -> None:
    """At the client's next datagram, and what the old one still says is passed on."""
    first, second = pair.upstream(), pair.upstream()
    pair.serve(first)
    client = pair.client(pair.listen())
    source = pair.settled(client, first)
    pair.serve(second)
    (session,) = pair.one.relay.sessions
    session.pool.resolved = (target_of(second),)  # type: ignore[attr-defined]  # StubPool
    pair.one.relay.follow_names()
    assert flow_of(pair.one).is_detached
    pair.move(pair.one, pair.other)
    pair.answer(first, source, client, b"still")
    pair.ask(client, second, b"three")


@pytest.mark.parametrize("when", ["before", "meanwhile", "after"])
def test_an_upstream_that_answers_from_another_port_is_spoken_to_there(
    pair: FlowPair, when: str
) -> None:
    upstream, elsewhere = pair.upstream(), pair.upstream()
    pair.serve(upstream, answers=Answers.ANY_PORT)
    client = pair.client(pair.listen())
    source = pair.settled(client, upstream, answer=b"")

    def answer() -> None:
        elsewhere.sendto(b"from here", source)

    if when == "before":
        answer()
        pair.turn()
    pair.move(pair.one, pair.other, answer if when == "meanwhile" else None)
    if when == "after":
        answer()
    pair.turn()
    assert client.recv(100) == b"from here"
    assert pair.ask(client, elsewhere, b"three") == source
    with udp() as stranger:
        stranger.sendto(b"I am no upstream", source)
    pair.answer(elsewhere, source, client, b"four")
    elsewhere.close()
    client.send(b"five")
    for _ in range(3):
        pair.turn()
    assert not pair.other.relay.sessions


def test_questions_that_wait_for_an_answer_are_known_there(pair: FlowPair) -> None:
    """It settled as its listener stopped."""
    upstream = pair.upstream()
    pair.serve(upstream, answers=Answers.ONE)
    listener = pair.listen()
    client = pair.client(listener)
    source = pair.ask(client, upstream, b"one")
    listener.stop()
    pair.move(pair.one, pair.other)
    assert flow_of(pair.other).unanswered == 1  # type: ignore[attr-defined]
    pair.answer(upstream, source, client, b"answer")
    assert flow_of(pair.other).unanswered == 0  # type: ignore[attr-defined]


# -- streams on one side


def framed(*contents: bytes) -> bytes:
    return b"".join(framing.encode(Framing.LENGTH, one) for one in contents)


def test_a_connection_upstream_goes_on_amid_a_frame(pair: FlowPair) -> None:
    with listen() as upstream:
        pair.serve(upstream, protocol=Protocol.UDP_TO_TCP, framing=Framing.LENGTH)
        listener = pair.listen()
        client = pair.client(listener)
        client.send(b"one")
        pair.turn()
        far = pair.own(accept(upstream))
        client.send(b"two")
        pair.turn()
        assert receive_exactly(far, 10) == framed(b"one", b"two")
        stream = framed(b"first", b"second", b"third")
        far.sendall(stream[:9])
        pair.turn()
        assert client.recv(100) == b"first"
        pair.loop.pass_time(5)
        pair.move(pair.one, pair.other, lambda: far.sendall(stream[9:12]))
        assert drain(client) == []
        far.sendall(stream[12:])
        pair.turn()
        assert receive_all(client, 2) == [b"second", b"third"]
        client.send(b"three")
        pair.turn()
        assert receive_exactly(far, 7) == framed(b"three")
        pair.loop.pass_time(5)
        pair.move(pair.other, pair.one)
        assert pair.loop.now - flow_of(pair.one).active_at == pytest.approx(5)
        far.close()
        pair.turn()
        assert ends(pair.one) == {"upstream/data": 1}


def test_bytes_that_a_connection_did_not_take_come_first(pair: FlowPair) -> None:
    with listen(receive_buffer=4096) as upstream:
        pair.serve(upstream, protocol=Protocol.UDP_TO_TCP, framing=Framing.LENGTH)
        client = pair.client(pair.listen())
        sent = numbered(3000, [1000])
        client.send(sent[0])
        pair.turn()
        far = pair.own(accept(upstream))
        at = 1
        while not flow_of(pair.one).c2u.holds_data:
            client.send(sent[at])
            at += 1
            pair.turn()
        pair.move(pair.one, pair.other, lambda: client.send(sent[at]))
        stream = framed(*sent[: at + 1])
        got = bytearray()
        far.settimeout(0)
        while len(got) < len(stream):
            pair.turn()
            try:
                got += far.recv(1 << 20)
            except BlockingIOError:
                continue
        assert got == stream


def test_a_bridge_goes_on_amid_a_frame(pair: FlowPair) -> None:
    upstream = pair.upstream()
    pair.serve(upstream, protocol=Protocol.TCP_TO_UDP, framing=Framing.LENGTH, idle_timeout_s=60.0)
    client = pair.bridge()
    stream = framed(b"first", b"second", b"third")
    client.sendall(stream[:9])
    pair.turn()
    got, source = upstream.recvfrom(100)
    assert got == b"first"
    upstream.sendto(b"answer", source)
    pair.turn()
    assert receive_exactly(client, 8) == framed(b"answer")
    pair.loop.pass_time(5)

    def meanwhile() -> None:
        client.sendall(stream[9:12])
        upstream.sendto(b"meanwhile", source)

    pair.move(pair.one, pair.other, meanwhile)
    assert receive_exactly(client, 11) == framed(b"meanwhile")
    client.sendall(stream[12:])
    pair.turn()
    assert receive_all(upstream, 2) == [b"second", b"third"]
    pair.loop.pass_time(5)
    pair.move(pair.other, pair.one)
    assert pair.loop.now - flow_of(pair.one).active_at == pytest.approx(5)
    pair.loop.pass_time(60)
    assert ends(pair.one) == {"us/idle": 1}


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_bridge_whose_client_has_said_all_waits_for_answers(pair: FlowPair, when: str) -> None:
    upstream = pair.upstream()
    pair.serve(upstream, protocol=Protocol.TCP_TO_UDP, udp_timeout_s=20.0)
    client = pair.bridge()
    client.sendall(b"question")
    pair.turn()
    _, source = upstream.recvfrom(100)
    if when == "before":
        client.shutdown(socket.SHUT_WR)
        pair.turn()
        pair.loop.pass_time(15)
    pair.move(
        pair.one,
        pair.other,
        (lambda: client.shutdown(socket.SHUT_WR)) if when == "meanwhile" else None,
    )
    assert flow_of(pair.other).ends_by_silence
    upstream.sendto(b"answer", source)
    pair.turn()
    assert receive_exactly(client, 6) == b"answer"
    pair.loop.pass_time(15)
    pair.move(pair.other, pair.one)
    pair.loop.pass_time(6)
    assert receive_to_end(client) == b""
    assert ends(pair.one) == {"us/idle": 1}


def test_a_reset_of_a_bridges_client_meanwhile_ends_it(pair: FlowPair) -> None:
    upstream = pair.upstream()
    pair.serve(upstream, protocol=Protocol.TCP_TO_UDP)
    client = pair.bridge()
    pair.move(pair.one, pair.other, lambda: reset(client))
    assert ends(pair.other) == {"client/data/reset": 1}


def test_what_is_reported_of_a_connection_again_is_no_sign_of_life(pair: FlowPair) -> None:
    """The order of the table stays as well, by which flows make room."""
    with listen() as upstream:
        pair.serve(upstream, protocol=Protocol.UDP_TO_TCP)
        listener = pair.listen()
        clients = [pair.client(listener) for _ in range(2)]
        for client in (*clients, *reversed(clients)):
            client.send(b"x")
            pair.turn()
            pair.loop.pass_time(1)
        for _ in clients:
            pair.own(accept(upstream))
        given = pair.pack(pair.one)
        pair.deliver(given, pair.other)
        (table,) = pair.other.relay.flows._tables.values()
        oldest = [*pair.other.relay.sessions][1]
        assert table.oldest() is oldest
        pair.settle(pair.one, given)
        given.close()
        pair.turn()
        assert table.oldest() is oldest


def test_what_ends_before_its_giver_knows_ends_at_once(pair: FlowPair) -> None:
    """The giver still has the sockets. Result: the client of a bridge need not wait for that."""
    upstream = pair.upstream()
    pair.serve(upstream, protocol=Protocol.TCP_TO_UDP)
    client = pair.bridge()
    given = pair.pack(pair.one)
    pair.deliver(given, pair.other)
    pair.other.relay.abort_sessions(Phase.KILL, "killed")
    pair.turn()
    client.settimeout(10)
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    pair.settle(pair.one, given)
    given.close()


def test_what_a_client_says_to_a_flow_that_has_ended_disturbs_nobody(pair: FlowPair) -> None:
    """Its socket lives on until its giver has closed it, too, and keeps its client."""
    upstream = pair.upstream()
    pair.serve(upstream)
    client = pair.client(pair.listen())
    pair.settled(client, upstream)
    given = pair.pack(pair.one)
    pair.deliver(given, pair.other)
    client.send(b"never read")
    pair.other.relay.abort_sessions(Phase.KILL, "killed")
    pair.loop.pass_time(0)
    own = socket.socket(fileno=given.sessions[0][1][0])
    assert own.getpeername()[1] == client.getsockname()[1]
    own.detach()
    client.send(b"neither")
    assert not select.select([pair.other.relay.poller._epoll], [], [], 0)[0]
    pair.settle(pair.one, given)
    given.close()


# -- failures


def test_a_flow_that_cannot_be_watched_there_goes_on_where_it_was(
    pair: FlowPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel has no memory for one more, for the first socket or the second."""
    upstream = pair.upstream()
    pair.serve(upstream)
    client = pair.client(pair.listen())
    source = pair.settled(client, upstream)
    poller = pair.other.relay.poller
    register = poller.register
    for may in range(2):
        given = pair.pack(pair.one)
        left = [may]

        def fail(fd: int, handler: object, events: int, left: list[int] = left) -> None:
            if not left[0]:
                raise OSError(errno.ENOSPC, "no space")
            left[0] -= 1
            register(fd, handler, events)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(type(poller), "register", lambda _, *given: fail(*given))
            assert pair.deliver(given, pair.other) == ([0], "nonsense")
        assert not pair.other.relay.sessions
        assert not pair.other.relay.flows
        pair.settle(pair.one, given, refused=[0])
        given.close()
        assert pair.ask(client, upstream, b"on") == source
    assert isinstance(flow_of(pair.one).c2u, DatagramDirection)
