"""Many datagrams per system call, and one by one: the same promises, over real sockets."""

from __future__ import annotations

import itertools
import os
import socket
import struct
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, TypeAlias

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.datagrams import drain, numbered, receive_all, udp
from support.icmp import too_big
from support.namespaces import network
from support.waiting import eventually

from forwarder.net import peers
from forwarder.net.datagrams import MAX_DATAGRAM, SLOTS, Batch, Destination, is_supported
from forwarder.net.plain_datagrams import PlainBatch

if TYPE_CHECKING:
    from collections.abc import Iterator

AnyBatch: TypeAlias = "Batch | PlainBatch"

KINDS: list[type[Batch] | type[PlainBatch]] = (
    [Batch, PlainBatch] if is_supported() else [PlainBatch]
)
SOL_UDP, UDP_SEGMENT = 17, 103
IP_PKTINFO = 8

several = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def batch(request: pytest.FixtureRequest) -> AnyBatch:
    made: AnyBatch = request.param()
    return made


class Hop:
    """A client, a socket that receives from it, one that sends on, and who gets that.

    The middle sockets are ours to test: connected both, as those of a flow.
    """

    def __init__(self, stack: ExitStack, batch: AnyBatch, host: str = "127.0.0.1") -> None:
        self.batch = batch
        self.client, self.near, self.far, self.upstream = (
            stack.enter_context(udp(host)) for _ in range(4)
        )
        self.client.connect(self.near.getsockname())
        self.near.connect(self.client.getsockname())
        self.far.connect(self.upstream.getsockname())
        self.upstream.connect(self.far.getsockname())
        for sock in (self.near, self.far):
            sock.setblocking(False)
            batch.prepare(sock)
        self.to = Destination(self.far.fileno())

    def carry(self) -> int:
        """Receive once and send it on; returns how many slots there were."""
        count = self.batch.receive(self.near.fileno())
        assert self.batch.send(self.to, 0, count) == count
        return count

    def carry_all(self) -> None:
        """Carry until there is nothing more."""
        while self.carry() == SLOTS:
            pass


@pytest.fixture(params=["127.0.0.1", "::1"])
def hop(request: pytest.FixtureRequest, batch: AnyBatch) -> Iterator[Hop]:
    with ExitStack() as stack:
        yield Hop(stack, batch, request.param)


size = st.one_of(
    st.integers(0, 2000), st.sampled_from([0, 1, 1200, 1472, 1473, 9000, 65506, MAX_DATAGRAM])
)
run = st.tuples(st.integers(1, 1500), st.integers(1, 70), st.integers(0, 1500)).map(
    lambda drawn: [drawn[0]] * drawn[1] + [min(drawn[2], drawn[0])]
)


@several
@given(st.lists(st.one_of(size.map(lambda one: [one]), run), max_size=6))
@example([[1200] * 64])
@example([[1200] * 65])
@example([[1200] * 63 + [0]])
@example([[0] * 70])
@example([[MAX_DATAGRAM] * 3])
@example([[40000, 40000]])
def test_datagrams_arrive_as_they_were_sent(hop: Hop, runs: list[list[int]]) -> None:
    """Any mixture of sizes: boundaries, order and contents are kept."""
    sizes = list(itertools.chain.from_iterable(runs))[:150]
    while sum(sizes) > 200_000:  # what the kernel queues is limited
        sizes.remove(max(sizes))
    sent = numbered(len(sizes), sizes) if sizes else []
    for content in sent:
        hop.client.send(content)
    hop.carry_all()
    assert receive_all(hop.upstream, len(sent)) == sent
    assert drain(hop.upstream) == []
    assert hop.batch.errors == hop.batch.dropped == 0


def send_segmented(sock: socket.socket, content: bytes, size: int) -> None:
    """Many datagrams by one call, udp(7)."""
    sock.sendmsg([content], [(SOL_UDP, UDP_SEGMENT, struct.pack("=H", size))])


@several
@given(
    st.lists(st.tuples(st.integers(1, 1400), st.integers(1, 30), st.integers(0, 1399)), max_size=5),
    st.booleans(),
)
@example([(1200, 30, 7)], False)
@example([(1200, 2, 0), (1200, 2, 0)], True)
def test_what_leaves_its_sender_as_one_stays_many(
    hop: Hop, runs: list[tuple[int, int, int]], is_narrow: bool
) -> None:
    """The client's UDP_SEGMENT meets UDP_GRO. ``is_narrow``: the way on does not take segments."""
    if is_narrow:
        hop.to.segment_bytes = 0
    sent: list[bytes] = []
    for number, (each, count, tail) in enumerate(runs):
        parts = [bytes([number]) * each for _ in range(count)]
        if 0 < tail < each:
            parts.append(bytes([number]) * tail)
        send_segmented(hop.client, b"".join(parts), each)
        sent += parts
        hop.client.send(b"between")
        sent.append(b"between")
    hop.carry_all()
    assert receive_all(hop.upstream, len(sent)) == sent
    assert drain(hop.upstream) == []
    assert hop.batch.dropped == 0


@pytest.mark.skipif(Batch not in KINDS, reason="no recvmmsg here")
def test_one_slot_holds_many_and_copies_are_many() -> None:
    """The kernel hands a segmented send over as one. Result: copies are what was sent."""
    with ExitStack() as stack:
        hop = Hop(stack, Batch())
        parts = numbered(20, [1000])
        send_segmented(hop.client, b"".join(parts), 1000)
        assert hop.batch.receive(hop.near.fileno()) == 1
        assert hop.batch.total(0, 1) == 20_000
        assert hop.batch.datagrams(0, 1) == parts


@pytest.mark.parametrize("count", [1, SLOTS - 1, SLOTS, SLOTS + 1, 2 * SLOTS])
def test_fewer_slots_than_there_are_means_empty(hop: Hop, count: int) -> None:
    for content in numbered(count):
        hop.client.send(content)
    received: list[int] = []
    while not received or received[-1] == SLOTS:
        received.append(hop.batch.receive(hop.near.fileno()))
    assert sum(received) == count


def test_a_part_of_what_was_received_can_be_sent(hop: Hop) -> None:
    sent = numbered(10, [50, 60])
    for content in sent:
        hop.client.send(content)
    assert hop.batch.receive(hop.near.fileno()) == 10
    assert hop.batch.datagrams(3, 5) == sent[3:5]
    assert hop.batch.total(3, 5) == 110
    assert hop.batch.send(hop.to, 3, 7) == 7
    assert receive_all(hop.upstream, 4) == sent[3:7]


# -- sockets that are full


class Narrow:
    """A destination that takes a few datagrams and then is full: a queue of unix datagrams.

    A UDP socket on loopback is never full, since the receiver's queue takes or drops at once.
    """

    def __init__(self, stack: ExitStack) -> None:
        self.near, self.far = map(
            stack.enter_context, socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        )
        self.near.setblocking(False)
        self.near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least there is
        self.to = Destination(self.near.fileno())
        self.to.segment_bytes = 0  # for unix sockets know nothing of segments


@pytest.mark.parametrize("sizes", [[100], [100, 200], [1400, 1400, 3]], ids=str)
def test_a_full_socket_takes_what_it_can_and_the_rest_later(
    batch: AnyBatch, sizes: list[int]
) -> None:
    """Result: nothing is lost, repeated or reordered, however often it is full."""
    with ExitStack() as stack:
        hop, narrow = Hop(stack, batch), Narrow(stack)
        sent = numbered(60, sizes)
        for content in sent:
            hop.client.send(content)
        last = batch.receive(hop.near.fileno())
        got: list[bytes] = []
        first = stops = 0
        while (first := batch.send(narrow.to, first, last)) < last:
            stops += 1
            got += drain(narrow.far)
        got += drain(narrow.far)
        assert stops > 1, "never full"
        assert got == sent
        assert batch.dropped == 0


@pytest.mark.skipif(Batch not in KINDS, reason="no recvmmsg here")
def test_many_in_one_slot_to_a_socket_that_gets_full() -> None:
    """Those that were not taken stay in the slot. Result: nothing is lost or repeated."""
    with ExitStack() as stack:
        batch = Batch()
        hop, narrow = Hop(stack, batch), Narrow(stack)
        sent: list[bytes] = []
        for number in range(3):
            parts = [part + bytes([number]) for part in numbered(40, [999])] + [b"tail"]
            send_segmented(hop.client, b"".join(parts), 1000)
            sent += parts
        last = batch.receive(hop.near.fileno())
        assert last == 3
        got: list[bytes] = []
        first = stops = 0
        while (first := batch.send(narrow.to, first, last)) < last:
            stops += 1
            left = batch.datagrams(first, last)
            got += drain(narrow.far)
            assert left == sent[len(got) :]
        got += drain(narrow.far)
        assert stops > 3, "hardly ever full"
        assert got == sent
        assert batch.dropped == 0


def test_a_copy_for_a_full_socket_is_not_taken(batch: AnyBatch) -> None:
    with ExitStack() as stack:
        narrow = Narrow(stack)
        taken = 0
        while batch.send_copy(narrow.to, taken.to_bytes(2, "big")):
            taken += 1
        assert 0 < taken < 1000
        assert drain(narrow.far) == [number.to_bytes(2, "big") for number in range(taken)]
        assert batch.dropped == 0


# -- errors


def unreachable(stack: ExitStack, host: str = "127.0.0.1") -> socket.socket:
    """A socket that is connected to a port where nobody is."""
    with udp(host) as gone:
        address = gone.getsockname()
    sock = stack.enter_context(udp(host))
    sock.connect(address)
    sock.setblocking(False)
    return sock


@pytest.mark.parametrize("count", [1, 2, 60])
@pytest.mark.parametrize("sizes", [[100], [100, 70]], ids=str)
def test_refusals_are_counted_and_cost_no_other_datagram(
    hop: Hop, count: int, sizes: list[int]
) -> None:
    """Nobody is there, and then somebody is. Result: every later datagram arrives."""
    hop.upstream.close()
    address = hop.far.getpeername()
    for content in numbered(count, sizes):
        hop.client.send(content)
    hop.carry_all()
    with udp(address[0], address[1]) as back:
        sent = numbered(5, sizes)
        for content in sent:
            hop.client.send(content)
        hop.carry_all()
        assert receive_all(back, 5) == sent
        assert hop.batch.errors > 0
        assert hop.batch.dropped == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make up an ICMP error")
@pytest.mark.parametrize("sizes", [[100], [100, 70]], ids=str)
def test_one_that_was_too_big_costs_no_later_one(batch: AnyBatch, sizes: list[int]) -> None:
    """A router says so, and the next send is told that in place of sending."""
    with network(), ExitStack() as stack:
        hop = Hop(stack, batch)
        too_big(hop.far.getsockname(), hop.upstream.getsockname())
        sent = numbered(5, sizes)
        for content in sent:
            hop.client.send(content)
        hop.carry_all()
        assert receive_all(hop.upstream, 5) == sent
        assert hop.batch.dropped == 0


def test_an_error_does_not_hide_what_is_queued_behind_it(batch: AnyBatch) -> None:
    """A refusal is reported by a receive. Result: the same call returns the datagram behind it."""
    with ExitStack() as stack:
        sock = unreachable(stack)
        address = sock.getpeername()
        sock.send(b"to nobody")
        back = stack.enter_context(udp(*address))
        back.sendto(b"here I am", sock.getsockname())
        assert batch.receive(sock.fileno()) == 1
        assert batch.datagrams(0, 1) == [b"here I am"]
        assert batch.errors == 1


def test_what_is_too_large_is_counted_and_the_others_go_on(batch: AnyBatch) -> None:
    """65,527 bytes come over IPv6; IPv4 takes 65,507."""
    with ExitStack() as stack:
        six, four = Hop(stack, batch, "::1"), Hop(stack, batch)
        sent = [b"before", bytes(65527), b"after"]
        for content in sent:
            six.client.send(content)
        assert batch.receive(six.near.fileno()) == 3
        assert batch.send(four.to, 0, 3) == 3
        assert receive_all(four.upstream, 2) == [b"before", b"after"]
        assert batch.dropped == 1
        assert batch.send_copy(four.to, bytes(65527))
        assert batch.send_copy(four.to, bytes(70000))
        assert batch.dropped == 3
        assert batch.errors == 0


def test_a_way_that_takes_no_segments_is_found_out_and_used(batch: AnyBatch) -> None:
    """A small MTU. Result: everything arrives, and the next run is not tried as one."""
    with ExitStack() as stack:
        hop = Hop(stack, batch)
        hop.far.setsockopt(socket.IPPROTO_IP, 10, 0)  # IP_MTU_DISCOVER, IP_PMTUDISC_DONT
        with suppress(OSError):
            hop.far.setsockopt(SOL_UDP, 101, 1)  # UDP_NO_CHECK6_TX; segments need checksums
        for _ in range(2):
            sent = numbered(30, [1300])
            for content in sent:
                hop.client.send(content)
            hop.carry_all()
            assert receive_all(hop.upstream, 30) == sent
        assert batch.dropped == 0


def test_a_closed_descriptor_ends_no_loop(batch: AnyBatch) -> None:
    with udp() as sock:
        fd = sock.fileno()
    assert batch.receive(fd) == 0 if isinstance(batch, Batch) else True
    if isinstance(batch, Batch):
        assert batch.send_copy(Destination(fd), b"x")
        assert batch.dropped == 1


# -- clients by address


def listening(stack: ExitStack, host: str, *, tells: bool) -> socket.socket:
    """A listener; ``tells`` which of our addresses a client has asked."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    if tells and family == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
    elif tells:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    sock.bind((host, 0))
    sock.setblocking(False)
    return sock


WHO = [
    pytest.param("127.0.0.1", "127.0.0.1", "127.0.0.1", False, id="v4"),
    pytest.param("0.0.0.0", "127.0.0.1", "127.0.0.7", True, id="v4 wildcard"),
    pytest.param("::1", "::1", "::1", False, id="v6"),
    pytest.param("::", "::1", "::1", True, id="v6 wildcard"),
    pytest.param("::", "127.0.0.1", "127.0.0.7", True, id="v4 on v6 wildcard"),
]


@pytest.mark.parametrize(("bound", "source", "asked", "tells"), WHO)
def test_answers_go_to_who_asked_from_where_it_asked(
    batch: AnyBatch, bound: str, source: str, asked: str, tells: bool
) -> None:
    """Runs of one size, too. Result: a connected client accepts every answer."""
    with ExitStack() as stack:
        listener = listening(stack, bound, tells=tells)
        client = stack.enter_context(udp(source))
        client.connect((asked, listener.getsockname()[1]))
        for sizes in ([100], [100, 30], [1]):
            sent = numbered(40, sizes)
            for content in sent:
                client.send(content)
            assert batch.receive_from(listener.fileno()) == 40
            assert {batch.peer(slot) for slot in range(40)} == {batch.peer(0)}
            to = Destination(listener.fileno(), batch.peer(0))
            assert batch.send(to, 0, 40) == 40
            assert receive_all(client, 40) == sent
            assert batch.send_copy(to, b"more")
            assert client.recv(100) == b"more"
        assert bool(peers.split(batch.peer(0))[1]) is tells
        assert batch.errors == batch.dropped == 0


def test_both_ways_name_a_client_alike() -> None:
    for bound, source, asked, tells in (param.values for param in WHO):
        names = []
        with ExitStack() as stack:
            listener = listening(stack, str(bound), tells=bool(tells))
            client = stack.enter_context(udp(str(source)))
            client.connect((str(asked), listener.getsockname()[1]))
            for kind in KINDS:
                client.send(b"x")
                batch: AnyBatch = kind()
                assert batch.receive_from(listener.fileno()) == 1
                names.append(batch.peer(0))
        assert len(set(names)) == 1


def test_destinations_in_turn_do_not_mix(batch: AnyBatch) -> None:
    """Connected, addressed, addressed with a source, in any order: each gets its own."""
    with ExitStack() as stack:
        hop = Hop(stack, batch)
        four = listening(stack, "0.0.0.0", tells=True)
        six = listening(stack, "::", tells=True)
        ends: list[tuple[Destination, socket.socket]] = [(hop.to, hop.upstream)]
        for listener, source, asked in (
            (four, "127.0.0.1", "127.0.0.9"),
            (six, "::1", "::1"),
            (six, "127.0.0.1", "127.0.0.3"),
        ):
            client = stack.enter_context(udp(source))
            client.connect((asked, listener.getsockname()[1]))
            client.send(b"x")
            assert batch.receive_from(listener.fileno()) == 1
            ends.append((Destination(listener.fileno(), batch.peer(0)), client))
        sent = numbered(4, [200])
        for content in sent:
            hop.client.send(content)
        assert batch.receive(hop.near.fileno()) == 4
        for to, end in itertools.chain.from_iterable(itertools.permutations(ends)):
            assert batch.send(to, 0, 4) == 4
            assert receive_all(end, 4) == sent
        assert batch.dropped == batch.errors == 0


def test_a_socket_that_tells_more_than_was_asked_is_understood(batch: AnyBatch) -> None:
    """A service manager has set SO_TIMESTAMP. Result: one client, and whom it asked is known."""
    with ExitStack() as stack:
        listener = listening(stack, "0.0.0.0", tells=True)
        listener.setsockopt(socket.SOL_SOCKET, 29, 1)  # SO_TIMESTAMP
        client = stack.enter_context(udp())
        client.connect(("127.0.0.5", listener.getsockname()[1]))
        for content in numbered(3):
            client.send(content)
        eventually(lambda: batch.receive_from(listener.fileno()) == 3)
        assert {batch.peer(slot) for slot in range(3)} == {batch.peer(0)}
        assert peers.local_host(batch.peer(0)) == "127.0.0.5"


def test_errors_of_one_receive_are_bounded(batch: AnyBatch) -> None:
    """Refusals without end would otherwise keep a worker from its other sockets."""
    with ExitStack() as stack:
        sock = unreachable(stack)
        for _ in range(10):
            with suppress(OSError):
                sock.send(b"x")
        assert batch.receive(sock.fileno()) == 0
        with pytest.raises(BlockingIOError):
            sock.recv(1)
