"""UDP clients of TCP upstreams and TCP clients of UDP upstreams, the loop turned by hand."""

from __future__ import annotations

import errno
import itertools
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.by_hand import UdpBench
from support.clogged import CloggedUpstream
from support.datagrams import drain, numbered, receive_all, udp
from support.ends import accept, listen, receive_exactly, receive_to_end, receive_to_reset, reset

from forwarder.config.model import Framing, Protocol, RelayMode
from forwarder.relay.udp import directions, framing
from forwarder.relay.udp.bridge import Bridge
from forwarder.relay.udp.directions import MAX_PENDING_BYTES, DatagramToStream
from forwarder.relay.wheel import TICK_S
from forwarder.stats.reasons import Phase

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from support.by_hand import StubPool

FRAMINGS = list(Framing)
several = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(params=[RelayMode.AUTO, RelayMode.COPY], ids=["batched", "plain"])
def bench(request: pytest.FixtureRequest) -> Iterator[UdpBench]:
    bench = UdpBench(request.param)
    yield bench
    bench.close()


def framed(how: Framing, datagrams: Sequence[bytes]) -> bytes:
    return b"".join(framing.encode(how, content) for content in datagrams)


def holds_data(way: DatagramToStream) -> bool:
    return way.holds_data


def stream_upstream(bench: UdpBench, receive_buffer: int = 0) -> socket.socket:
    return bench.own(listen(receive_buffer=receive_buffer))


def to_stream(bench: UdpBench, *upstreams: socket.socket, **rule: object) -> StubPool:
    return bench.pool(*upstreams, protocol=Protocol.UDP_TO_TCP, **rule)


def to_datagrams(bench: UdpBench, *upstreams: socket.socket, **rule: object) -> StubPool:
    return bench.pool(*upstreams, protocol=Protocol.TCP_TO_UDP, **rule)


def first_contact(
    bench: UdpBench, client: socket.socket, upstream: socket.socket, text: bytes = b"x"
) -> socket.socket:
    """Have a client send its first datagram; returns the connection that comes of it."""
    client.send(text)
    bench.turn()
    return bench.own(accept(upstream))


def in_touch(bench: UdpBench, **rule: object) -> tuple[socket.socket, socket.socket]:
    """A client that has sent its first datagram, and the connection that has come of it."""
    upstream = stream_upstream(bench)
    client = bench.client(bench.listen(to_stream(bench, upstream, **rule)))
    return client, first_contact(bench, client, upstream)


def bridged(bench: UdpBench, **rule: object) -> tuple[socket.socket, socket.socket]:
    """A client by TCP that has sent nothing yet, and its upstream by UDP."""
    upstream = bench.upstream()
    return bench.bridge(to_datagrams(bench, upstream, **rule)), upstream


# -- UDP to TCP


@pytest.mark.parametrize("how", FRAMINGS)
def test_datagrams_become_a_stream_and_back(bench: UdpBench, how: Framing) -> None:
    """Result: one connection for all of a client, bytes exact both ways."""
    upstream = stream_upstream(bench)
    listener = bench.listen(to_stream(bench, upstream, framing=how))
    client = bench.client(listener)
    sent = [b"first", *numbered(50, [10, 1200, 9000])]
    peer = first_contact(bench, client, upstream, sent[0])
    for content in sent[1:]:
        client.send(content)
        bench.turn(1)
    stream = framed(how, sent)
    assert receive_exactly(peer, len(stream)) == stream
    for content in (b"one", b"two"):
        peer.sendall(framed(how, [content]))
        bench.turn()
        assert client.recv(100) == content
    assert bench.flows() == 1


def test_unsolicited_answers_are_not_held_back(bench: UdpBench) -> None:
    """oxidinetd delivers what the upstream says only when the same client sends again."""
    client, peer = in_touch(bench)
    for number in range(5):
        peer.sendall(b"news %d" % number)
        bench.turn()
        assert client.recv(100) == b"news %d" % number


def test_clients_do_not_wait_for_each_other(bench: UdpBench) -> None:
    """oxidinetd blocks all of them for 100 ms with each datagram. One upstream is silent here."""
    upstream = stream_upstream(bench)
    listener = bench.listen(to_stream(bench, upstream))
    silent, lively = bench.client(listener), bench.client(listener)
    first_contact(bench, silent, upstream)
    peer = first_contact(bench, lively, upstream, b"y")
    assert peer.recv(1) == b"y"
    for number in range(20):
        lively.send(b"%02d" % number)
        silent.send(b"?")
        bench.turn()
        assert receive_exactly(peer, 2) == b"%02d" % number
        peer.sendall(b"!%02d" % number)
        bench.turn()
        assert lively.recv(100) == b"!%02d" % number
    assert drain(silent) == []


@several
@given(
    st.lists(st.integers(0, 3000), min_size=1, max_size=12),
    st.lists(st.integers(1, 5000), min_size=1, max_size=12),
)
@example([0], [1])
@example([65507], [1, 65507])
def test_frames_are_found_however_the_stream_is_cut(
    bench: UdpBench, sizes: list[int], cuts: list[int]
) -> None:
    """From the upstream to the client. Result: every datagram, the empty ones included."""
    with listen() as upstream:
        listener = bench.listen(to_stream(bench, upstream, framing=Framing.LENGTH))
        client = bench.client(listener)
        peer = first_contact(bench, client, upstream)
        sent = numbered(len(sizes), sizes)
        stream = framed(Framing.LENGTH, sent)
        turn = itertools.cycle(cuts)
        while stream:
            size = next(turn)
            peer.sendall(stream[:size])
            stream = stream[size:]
            bench.turn(2)
        bench.turn()
        assert receive_all(client, len(sent)) == sent
        assert drain(client) == []


@pytest.mark.parametrize("how", FRAMINGS)
def test_the_end_of_the_stream_is_the_end_of_the_flow(bench: UdpBench, how: Framing) -> None:
    """What came before is delivered; a frame that was cut is counted. Then a new flow begins."""
    upstream = stream_upstream(bench)
    client = bench.client(bench.listen(to_stream(bench, upstream, framing=how)))
    peer = first_contact(bench, client, upstream)
    assert receive_exactly(peer, len(framed(how, [b"x"]))) == framed(how, [b"x"])
    peer.sendall(framed(how, [b"last words"]) + (b"\x00\x09cut" if how is Framing.LENGTH else b""))
    peer.close()
    bench.turn()
    assert client.recv(100) == b"last words"
    assert bench.flows() == 0
    assert bench.count("datagrams_dropped") == (1 if how is Framing.LENGTH else 0)
    again = first_contact(bench, client, upstream, b"again")
    assert receive_exactly(again, len(framed(how, [b"again"]))) == framed(how, [b"again"])


def test_a_reset_by_the_upstream_ends_the_flow(bench: UdpBench) -> None:
    upstream = stream_upstream(bench)
    client = bench.client(bench.listen(to_stream(bench, upstream)))
    reset(first_contact(bench, client, upstream))
    bench.turn()
    assert bench.flows() == 0
    first_contact(bench, client, upstream, b"again")


def test_what_the_upstream_said_before_it_reset_arrives_though_a_send_finds_the_reset(
    bench: UdpBench,
) -> None:
    """The client's next datagram is handled first, and there is nobody to send it to."""
    client, peer = in_touch(bench)
    client.send(b"not read")
    bench.turn()
    client.send(b"one thing more")  # which epoll reports first, since it comes first
    peer.sendall(b"answer")
    peer.close()  # with something unread: a reset follows the answer
    bench.turn()
    assert client.recv(100) == b"answer"
    assert not bench.flows()


def test_a_silent_flow_ends_its_connection_by_fin(bench: UdpBench) -> None:
    """After the time-out, refreshed from both sides. oxidinetd's never end."""
    client, peer = in_touch(bench, udp_timeout_s=10.0)
    bench.turn()
    bench.loop.pass_time(9)
    client.send(b"y")
    bench.turn()
    bench.loop.pass_time(9)
    peer.sendall(b"z")
    bench.turn()
    bench.loop.pass_time(9.8)
    assert bench.flows() == 1
    bench.loop.pass_time(0.4)
    assert bench.flows() == 0
    assert receive_to_end(peer) == b"xy"


def test_a_flow_that_is_cut_off_resets_its_connection(bench: UdpBench) -> None:
    """By a drain time-out, say. Result: no clean end for a stream that was cut."""
    _, peer = in_touch(bench)
    bench.relay.abort_sessions(Phase.DRAIN, "the test says so")
    bench.loop.pass_time(0)
    assert receive_to_reset(peer) in {b"x", b""}


@pytest.mark.parametrize("sizes", [[8000], [65507], [100]], ids=str)
def test_a_burst_that_the_upstream_takes_is_not_dropped(bench: UdpBench, sizes: list[int]) -> None:
    """More at once than may wait: what waits is sent first."""
    upstream = stream_upstream(bench)
    client = bench.client(bench.listen(to_stream(bench, upstream)))
    peer = first_contact(bench, client, upstream, b"")
    first_contact_again = numbered(40, sizes)
    for content in first_contact_again:
        client.send(content)
    expected = b"".join(first_contact_again)
    got = bytearray()
    peer.settimeout(0.01)
    for _ in range(400):
        bench.turn(1)
        with suppress(TimeoutError):
            while len(got) < len(expected):
                got += peer.recv(1 << 20)
        if len(got) == len(expected):
            break
    assert got == expected
    assert bench.count("datagrams_dropped") == 0


@pytest.mark.parametrize("how", FRAMINGS)
def test_an_upstream_that_does_not_read_costs_bounded_memory(bench: UdpBench, how: Framing) -> None:
    """Drops are counted, and when it reads again whole datagrams arrive, in order."""
    upstream = stream_upstream(bench, receive_buffer=4096)
    client = bench.client(bench.listen(to_stream(bench, upstream, framing=how)))
    peer = first_contact(bench, client, upstream, b"")
    flow = next(iter(bench.listeners[0]._flows.values()))
    size = 1000
    count = 0
    while not bench.count("datagrams_dropped"):
        for content in numbered(100, [size]):
            client.send((count).to_bytes(4, "big") + content[4:])
            count += 1
        bench.turn(2)
        assert count < 100_000
        # The client's socket is not read while the upstream takes nothing: the kernel drops then.
        if flow.is_settled and flow.c2u.holds_data:
            break
    assert isinstance(flow.c2u, DatagramToStream)
    assert len(flow.c2u._pending) <= MAX_PENDING_BYTES + 70_000
    got = bytearray()
    peer.settimeout(0.01)
    for _ in range(2000):
        bench.turn(1)
        try:
            got += peer.recv(1 << 20)
        except TimeoutError:
            if not flow.c2u.holds_data:
                break
    data = bytes(got)
    header = 2 if how is Framing.LENGTH else 0
    if header:
        assert data[:2] == b"\0\0"
        data = data[2:]
    step = size + header
    assert len(data) % step == 0
    numbers = [
        int.from_bytes(data[at + header : at + header + 4], "big")
        for at in range(0, len(data), step)
    ]
    assert numbers == sorted(set(numbers))
    client.send(b"and on")
    bench.turn()
    expected = framed(how, [b"and on"])
    peer.settimeout(30)
    assert receive_exactly(peer, len(expected)) == expected


def test_what_there_is_room_for_again_is_not_dropped(bench: UdpBench) -> None:
    """The stream takes a part of what waits, and that is enough for the next datagram."""
    upstream = stream_upstream(bench)
    listener = bench.listen(to_stream(bench, upstream))
    listener._settles = False  # a socket of its own would not be read meanwhile
    client = bench.client(listener)
    first_contact(bench, client, upstream)
    (flow,) = bench.relay.sessions
    assert isinstance(flow.c2u, DatagramToStream)
    slow = Slow()
    flow.c2u.open(slow)
    size = MAX_PENDING_BYTES // 64 - 1
    for content in numbered(64, [size]):
        client.send(content)
        bench.turn(1)
    slow.room = size
    client.send(bytes(size))
    bench.turn(1)
    assert bench.count("datagrams_dropped") == 0
    assert len(flow.c2u._pending) == 64 * size
    client.send(bytes(size))
    bench.turn(1)
    assert bench.count("datagrams_dropped") == 1


class Slow:
    """A stream that takes ``room`` bytes, once."""

    room = 0

    def send(self, data: bytearray) -> int:
        """As a socket that is not blocking."""
        taken, self.room = min(self.room, len(data)), 0
        if not taken:
            raise BlockingIOError
        return taken


@pytest.mark.parametrize("how", FRAMINGS)
def test_what_comes_while_it_connects_is_delivered(bench: UdpBench, how: Framing) -> None:
    with CloggedUpstream() as clogged:
        client = bench.client(bench.listen(to_stream(bench, clogged.listener, framing=how)))
        sent = numbered(20, [30])
        for content in sent:
            client.send(content)
            bench.turn(1)
        clogged.open()
        peer = bench.own(accept(clogged.listener))
        bench.turn()
        stream = framed(how, sent)
        assert receive_exactly(peer, len(stream)) == stream


def test_a_connect_gets_its_time_and_then_the_next_upstream_is_tried(bench: UdpBench) -> None:
    upstream = stream_upstream(bench)
    with CloggedUpstream() as clogged:
        pool = to_stream(bench, clogged.listener, upstream, connect_timeout_s=5.0)
        client = bench.client(bench.listen(pool))
        client.send(b"x")
        bench.turn()
        bench.loop.pass_time(5.2)
        bench.turn()
        assert bench.own(accept(upstream)).recv(1) == b"x"


@pytest.mark.parametrize("how", FRAMINGS)
def test_what_no_upstream_has_got_is_counted(bench: UdpBench, how: Framing) -> None:
    """Three datagrams, one of them empty, of a client whose connection is refused."""
    with listen() as upstream:
        pool = to_stream(bench, upstream, framing=how)
    client = bench.client(bench.listen(pool))
    for content in (b"one", b"", b"three"):
        client.send(content)
    bench.turn()
    assert bench.flows() == 0
    assert bench.count("datagrams_dropped") == 3


def test_all_upstreams_refuse(bench: UdpBench, caplog: pytest.LogCaptureFixture) -> None:
    """Result: counted, no flow is left; the next datagram tries again and finds one."""
    with listen() as gone:
        address = gone.getsockname()
    with udp() as other:
        pool = to_stream(bench, other)
    client = bench.client(bench.listen(pool))
    client.send(b"x")
    bench.turn()
    assert bench.flows() == 0
    assert bench.count("connects_failed") == 1
    assert any("connect.failed" in record.message for record in caplog.records)
    back = stream_upstream(bench)
    assert address
    pool.resolved = to_stream(bench, back).resolved
    assert first_contact(bench, client, back, b"y").recv(1) == b"y"


def test_a_connect_that_waited_for_a_descriptor_has_its_deadline(
    bench: UdpBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would otherwise take as long as the kernel tries, two minutes."""
    with CloggedUpstream() as clogged:
        client = bench.client(
            bench.listen(to_stream(bench, clogged.listener, connect_timeout_s=5.0))
        )

        def refuse(*_: object) -> None:
            raise OSError(errno.EMFILE, "none left")

        with monkeypatch.context() as patch:
            patch.setattr("forwarder.relay.udp.client_flow.sockets.upstream_socket", refuse)
            client.send(b"x")
            bench.turn()
            bench.loop.pass_time(1)
            assert bench.flows() == 1
        bench.loop.pass_time(1)
        bench.turn()
        assert bench.flows() == 1
        bench.loop.pass_time(3.2)
        assert bench.flows() == 0


@pytest.mark.parametrize("timeout_s", [0.0, 5.0])
def test_waiting_for_a_descriptor_without_a_time_limit(
    bench: UdpBench, monkeypatch: pytest.MonkeyPatch, timeout_s: float
) -> None:
    upstream = bench.upstream()
    client = bench.client(bench.listen(bench.pool(upstream, connect_timeout_s=timeout_s)))
    calls = 0

    def refuse(*_: object) -> None:
        nonlocal calls
        calls += 1
        raise OSError(errno.EMFILE, "none left")

    with monkeypatch.context() as patch:
        patch.setattr("forwarder.net.udp.upstream_socket", refuse)
        client.send(b"x")
        bench.turn()
        bench.loop.pass_time(1)
    assert calls > 3
    bench.loop.pass_time(2 * TICK_S)
    bench.turn()
    assert upstream.recv(10) == b"x"


# -- TCP to UDP


@pytest.mark.parametrize("how", FRAMINGS)
def test_a_stream_becomes_datagrams_and_back(bench: UdpBench, how: Framing) -> None:
    """Many answers to one question, each as it was. oxidinetd waits 100 ms for one."""
    client, upstream = bridged(bench, framing=how)
    bench.turn()
    client.sendall(framed(how, [b"question"]))
    bench.turn()
    text, source = upstream.recvfrom(100)
    assert text == b"question"
    sent = numbered(30, [5, 1200, 60000])
    for content in sent:
        upstream.sendto(content, source)
        bench.turn(1)
    stream = framed(how, sent)
    assert receive_exactly(client, len(stream)) == stream


@several
@given(
    st.lists(st.integers(0, 3000), min_size=1, max_size=12),
    st.lists(st.integers(1, 5000), min_size=1, max_size=12),
)
@example([65507], [65509])
@example([65507, 0, 0, 65507], [65507])
def test_frames_of_a_client_are_found_however_they_are_cut(
    bench: UdpBench, sizes: list[int], cuts: list[int]
) -> None:
    client, upstream = bridged(bench, framing=Framing.LENGTH)
    sent = numbered(len(sizes), sizes)
    stream = framed(Framing.LENGTH, sent)
    turn = itertools.cycle(cuts)
    while stream:
        size = next(turn)
        client.sendall(stream[:size])
        stream = stream[size:]
        bench.turn(1)
    bench.turn()
    assert receive_all(upstream, len(sent)) == sent
    assert drain(upstream) == []


@several
@given(st.lists(st.integers(1, 200_000), min_size=1, max_size=5))
@example([65507, 65508])
def test_raw_bytes_are_neither_lost_nor_too_many_for_a_datagram(
    bench: UdpBench, sizes: list[int]
) -> None:
    """oxidinetd makes one datagram of 64 KiB of it, which is one too large."""
    client, upstream = bridged(bench)
    for number, size in enumerate(sizes):
        content = bytes([number]) * size
        client.sendall(content)
        got = bytearray()
        while len(got) < size:
            bench.turn()
            got += b"".join(drain(upstream))
        assert got == content
    assert bench.count("datagrams_dropped") == 0


def test_a_silent_upstream_ends_nothing(bench: UdpBench) -> None:
    client, upstream = bridged(bench, udp_timeout_s=10.0)
    client.sendall(b"x")
    bench.turn()
    _, source = upstream.recvfrom(100)
    bench.loop.pass_time(1e5)
    upstream.sendto(b"late", source)
    bench.turn()
    assert client.recv(100) == b"late"


def test_an_idle_time_out_is_kept_if_there_is_one(bench: UdpBench) -> None:
    client, _ = bridged(bench, idle_timeout_s=20.0)
    bench.turn()
    bench.loop.pass_time(19.8)
    assert bench.flows() == 1
    bench.loop.pass_time(0.4)
    assert bench.flows() == 0
    assert receive_to_end(client) == b""


def test_after_the_clients_fin_answers_still_come(bench: UdpBench) -> None:
    """Until there are none for the time-out of UDP; then its connection ends by FIN."""
    client, upstream = bridged(bench, udp_timeout_s=10.0)
    client.sendall(b"question")
    client.shutdown(socket.SHUT_WR)
    bench.turn()
    text, source = upstream.recvfrom(100)
    assert text == b"question"
    for number in range(3):
        bench.loop.pass_time(9)
        upstream.sendto(b"%d" % number, source)
        bench.turn()
        assert client.recv(1) == b"%d" % number
    bench.loop.pass_time(9.8)
    assert bench.flows() == 1
    bench.loop.pass_time(0.4)
    assert bench.flows() == 0
    assert receive_to_end(client) == b""


def test_a_fin_that_comes_while_there_is_more_to_read_is_no_reset(
    bench: UdpBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client has used up what one turn reads. Result: answers still come."""
    monkeypatch.setattr(directions, "_READS_PER_TURN", 1)
    client, upstream = bridged(bench)
    client.sendall(b"early")
    bench.relay.poller.turn()
    client.sendall(b"last")
    client.shutdown(socket.SHUT_WR)
    for _ in range(3):
        bench.relay.poller.turn()
    bench.turn()
    text, source = upstream.recvfrom(100)
    assert (text, drain(upstream)) == (b"early", [b"last"])
    upstream.sendto(b"answer", source)
    bench.turn()
    assert client.recv(100) == b"answer"
    assert bench.flows() == 1


def test_at_a_stop_a_connection_whose_client_has_said_all_does_not_linger(bench: UdpBench) -> None:
    """One whose client may still speak does."""
    upstream = bench.upstream()
    done, open_ = (bench.bridge(to_datagrams(bench, upstream)) for _ in range(2))
    for client in (done, open_):
        client.sendall(b"x")
    done.shutdown(socket.SHUT_WR)
    bench.turn()
    bench.loop.pass_time(2)
    bench.relay.end_silent_flows(1.0)
    assert bench.flows() == 1
    bench.loop.pass_time(0)
    assert receive_to_end(done) == b""


def test_a_frame_that_the_clients_fin_cuts_is_counted(bench: UdpBench) -> None:
    client, upstream = bridged(bench, framing=Framing.LENGTH)
    client.sendall(framed(Framing.LENGTH, [b"whole"]) + b"\x01\x00part")
    client.shutdown(socket.SHUT_WR)
    bench.turn()
    assert drain(upstream) == [b"whole"]
    assert bench.count("datagrams_dropped") == 1


@pytest.mark.parametrize("is_ended", [False, True])
def test_a_reset_by_the_client_ends_it(bench: UdpBench, is_ended: bool) -> None:
    """Also behind its FIN."""
    client, _ = bridged(bench)
    client.sendall(b"x")
    bench.turn()
    if is_ended:
        client.shutdown(socket.SHUT_WR)
        bench.turn()
    reset(client)
    bench.turn()
    assert bench.flows() == 0


def test_a_client_that_has_gone_is_noticed_by_an_answer(bench: UdpBench) -> None:
    """It has closed without reading on: its FIN says nothing of that."""
    client, upstream = bridged(bench)
    client.sendall(b"x")
    bench.turn()
    _, source = upstream.recvfrom(100)
    client.close()
    bench.turn()
    assert bench.flows() == 1
    for _ in range(3):
        upstream.sendto(b"answer", source)
        bench.turn()
    assert bench.flows() == 0


def test_an_upstream_that_refuses_does_not_end_the_connection(bench: UdpBench) -> None:
    upstream = bench.upstream()
    address = upstream.getsockname()
    client = bench.bridge(to_datagrams(bench, upstream))
    upstream.close()
    for _ in range(5):
        client.sendall(b"x")
        bench.turn()
    assert bench.count("icmp_errors") > 0
    assert bench.flows() == 1
    back = bench.own(udp(*address))
    client.sendall(b"y")
    bench.turn()
    text, source = back.recvfrom(10)
    assert text == b"y"
    back.sendto(b"z", source)
    bench.turn()
    assert client.recv(10) == b"z"


@pytest.mark.parametrize("how", FRAMINGS)
def test_a_client_that_does_not_read_costs_bounded_memory(bench: UdpBench, how: Framing) -> None:
    """What the kernel has no room for is dropped; later the client reads whole datagrams."""
    client, upstream = bridged(bench, framing=how)
    client.sendall(framed(how, [b"x"]))
    bench.turn()
    _, source = upstream.recvfrom(100)
    (bridge,) = bench.relay.sessions
    assert isinstance(bridge, Bridge)
    count = 0
    while not holds_data(bridge.u2c):
        for _ in range(50):
            upstream.sendto(count.to_bytes(4, "big") + bytes(9996), source)
            count += 1
        bench.turn(1)
        assert count < 10_000
    assert len(bridge.u2c._pending) <= MAX_PENDING_BYTES + 70_000
    client.settimeout(0.01)
    got = bytearray()
    for _ in range(5000):
        bench.turn(1)
        try:
            got += client.recv(1 << 20)
        except TimeoutError:
            if not holds_data(bridge.u2c):
                break
    header = 2 if how is Framing.LENGTH else 0
    step = 10_000 + header
    assert len(got) % step == 0
    numbers = [
        int.from_bytes(got[at + header : at + header + 4], "big") for at in range(0, len(got), step)
    ]
    assert numbers == sorted(set(numbers))
    upstream.sendto(b"and on", source)
    bench.turn()
    client.settimeout(30)
    assert receive_exactly(client, len(framed(how, [b"and on"]))) == framed(how, [b"and on"])


def test_a_bridge_that_is_cut_off_resets_its_client(bench: UdpBench) -> None:
    client, _ = bridged(bench)
    bench.turn()
    bench.relay.abort_sessions(Phase.DRAIN, "the test says so")
    bench.loop.pass_time(0)
    assert receive_to_reset(client) == b""


def test_what_is_too_large_for_a_datagram_is_counted(bench: UdpBench) -> None:
    """A frame may say 65,535. Result: it is dropped whole, and the next one is found."""
    client, upstream = bridged(bench, framing=Framing.LENGTH)
    client.sendall(struct.pack("!H", 65535) + bytes(65535) + framed(Framing.LENGTH, [b"next"]))
    for _ in range(20):
        bench.turn(1)
    assert drain(upstream) == [b"next"]
    assert bench.count("datagrams_dropped") == 1
