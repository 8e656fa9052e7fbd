"""Bandwidth through the real command: never more than the limit, and all that was sent."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from support import procfs
from support.datagrams import drain, udp_client
from support.ends import (
    Link,
    Talker,
    accept,
    carry,
    connect,
    fill,
    listen,
    listen_unix,
    receive_to_end,
    receive_to_reset,
    reset,
    seeded,
    talk,
)
from support.forwarder import reserve_port
from support.waiting import eventually

from forwarder.limits.meter import quantum_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from process.conftest import Launch, Limit, LimitAny

pytestmark = pytest.mark.process

RATE = 2_000_000  # bytes per second: 16 Mbit
BANDWIDTH = 'bandwidth = "2MB"'


def ahead(workers: int) -> int:
    """What may be moved besides the rate: see the documentation of the limit."""
    quantum = RATE // 100
    return int(RATE * 0.005) + quantum + workers * (3 * quantum + 16 * 1024)


def exchange(links: Sequence[Link], count: int) -> float:
    """Move ``count`` bytes each way over all links together, to their ends; returns seconds."""
    talkers = []
    for number, link in enumerate(links):
        data = seeded(count // len(links), number)
        talkers += [Talker(link.client, data), Talker(link.upstream, data[::-1])]
    began = time.monotonic()
    talk(*talkers)
    took = time.monotonic() - began
    for one, other in zip(talkers[::2], talkers[1::2], strict=True):
        assert one.received == other.outgoing
        assert other.received == one.outgoing
    return took


def assert_slow(count: int, took: float, workers: int) -> None:
    """So many bytes each way were not moved faster than the limit. A slow machine is no fault."""
    assert count <= RATE * took + ahead(workers), f"{count} bytes in {took:.3f} s"


@pytest.mark.parametrize(
    ("workers", "streams", "relay"),
    [
        *((1, 1, "splice"), (1, 8, "splice"), (2, 8, "splice"), (4, 8, "splice"), (4, 1, "copy")),
        *((2, 8, "copy"),),
    ],
)
def test_all_streams_together_have_the_bandwidth_each_way(
    limit: Limit, workers: int, streams: int, relay: str
) -> None:
    it = limit(BANDWIDTH, workers=workers, top=f'relay = "{relay}"')
    links = [it.link() for _ in range(streams)]
    count = 1_600_000
    assert_slow(count, exchange(links, count), workers)
    eventually(lambda: it.status()["sessions"] == 0)
    spliced = it.status()["bytes_spliced"]
    assert isinstance(spliced, int)
    if relay == "copy":
        assert spliced == 0
    else:
        assert spliced >= count, "bulk was copied"


def test_sessions_that_end_at_once_pay_for_what_they_move(limit: Limit) -> None:
    """A hundred of them with 10 kB each way, one after the other."""
    it = limit(BANDWIDTH, workers=2)
    began = time.monotonic()
    for _ in range(100):
        exchange([it.link()], 10_000)
        it.close_links()
    assert_slow(1_000_000, time.monotonic() - began, 2)


def test_the_end_of_a_long_session_is_no_credit_for_the_next_one(limit: Limit) -> None:
    it = limit(BANDWIDTH, workers=1)
    for _ in range(3):
        assert_slow(500_000, exchange([it.link()], 500_000), 1)


@pytest.mark.parametrize(
    ("side", "relay"), [("listen", "splice"), ("upstream", "copy"), ("both", "splice")]
)
def test_unix_sockets_have_a_bandwidth_too(
    launch: Launch, tmp_path: Path, side: str, relay: str
) -> None:
    with ExitStack() as stack:
        address: tuple[str, int] | str = stack.enter_context(reserve_port()).getsockname()
        there = stack.enter_context(
            listen() if side == "listen" else listen_unix(str(tmp_path / "up"))
        )
        written_there = (
            "{}:{}".format(*there.getsockname()) if side == "listen" else (f"unix:{tmp_path}/up")
        )
        here = "{}:{}".format(*address) if side == "upstream" else f"unix:{tmp_path}/listen"
        if side != "upstream":
            address = str(tmp_path / "listen")
        path = tmp_path / "forwarder.toml"
        path.write_text(
            f'workers = 2\nrelay = "{relay}"\n[[forwarding_rules]]\n'
            f'listen = "{here}"\nupstream = "{written_there}"\n{BANDWIDTH}\n'
        )
        launch("-c", str(path))
        links = []
        for _ in range(4):
            client = stack.enter_context(connect(address))
            links.append(Link(client, stack.enter_context(accept(there))))
        assert_slow(800_000, exchange(links, 800_000), 2)


# -- a way waits for its meter


SLOW = 'bandwidth = "400kbit"'  # 50 kB a second


def test_who_waits_for_the_meter_is_not_idle(limit: Limit) -> None:
    """The other sessions leave it nothing for longer than the timeout.

    *Result*: all arrives, in each way, before and after a half-close.
    """
    it = limit(
        'bandwidth = "160kbit"\nidle_timeout = "300ms"\nhalf_close_timeout = "300ms"', workers=1
    )
    links = [it.link() for _ in range(3)]
    exchange(links, 3 * 15_000)


def test_a_half_close_waits_behind_what_is_still_to_be_moved(limit: Limit) -> None:
    it = limit(SLOW, workers=1)
    link = it.link()
    data = seeded(40_000, 1)
    link.client.sendall(data)
    link.client.shutdown(socket.SHUT_WR)
    carry(link.upstream, link.client, b"the other way is not held up")
    assert receive_to_end(link.upstream) == data
    carry(link.upstream, link.client, b"and lives on")


@pytest.mark.parametrize("who", ["client", "upstream"])
def test_a_reset_while_a_way_waits_ends_the_session(limit: Limit, who: str) -> None:
    it = limit(SLOW, workers=1)
    link = it.link()
    near, far = link.end(who)
    near.sendall(seeded(60_000, 2))
    reset(near)
    assert len(receive_to_reset(far)) <= 60_000
    eventually(lambda: it.status()["sessions"] == 0)
    other = it.link()
    carry(other.client, other.upstream, b"and the others go on")


def test_the_reader_may_go_while_a_way_waits(limit: Limit) -> None:
    it = limit(SLOW, workers=1)
    links = [it.link() for _ in range(5)]
    for link in links:
        link.client.sendall(bytes(30_000))
    for link in links[1:]:
        reset(link.upstream)
        assert receive_to_reset(link.client) == b""
    eventually(lambda: it.status()["sessions"] == 1)
    links[0].client.shutdown(socket.SHUT_WR)
    assert len(receive_to_end(links[0].upstream)) == 30_000


def test_a_stop_ends_though_ways_wait(limit: Limit) -> None:
    it = limit(SLOW, workers=2, top='drain_timeout = "500ms"')
    for _ in range(4):
        fill(it.link().client, bytes(1 << 20), 0.05)
    assert it.it.forwarder.stop() == 0


# -- reloads


@pytest.mark.parametrize(
    "way", [("8kbit", "1Gbit"), ("8kbit", ""), ("", "2MB"), ("1Gbit", "2MB")], ids="->".join
)
def test_a_reload_changes_the_bandwidth_of_open_sessions(
    limit: Limit, way: tuple[str, str]
) -> None:
    """Sessions that wait, that are quiet, and that move bulk at that moment.

    *Result*: at 8 kbit this would take half an hour; at 2 MB a second it takes its time.
    """
    before, after = (f'bandwidth = "{value}"' if value else "" for value in way)
    it = limit(before, workers=2)
    links = [it.link() for _ in range(4)]
    busy = links[:2]
    for link in busy:
        fill(link.client, bytes(200_000), 0.05)
    it.reload(after)
    began = time.monotonic()
    for link in busy:
        link.upstream.setblocking(False)
    for link in busy:
        eventually(lambda link=link: not drain_stream(link.upstream))  # type: ignore[misc]
    count = 1_600_000
    took = exchange(links[2:], count)
    if after == BANDWIDTH:
        assert_slow(count, took, 2)
    assert time.monotonic() - began < 120


def drain_stream(sock: socket.socket) -> bool:
    """Whether anything has come; it is taken."""
    try:
        return bool(sock.recv(1 << 20))
    except BlockingIOError:
        return False


def test_bandwidth_comes_and_goes_under_a_transfer(limit: Limit) -> None:
    """Directions are exchanged under sessions in every state, ten times; every byte is right."""
    it = limit("", workers=2)
    links = [it.link() for _ in range(6)]
    half, quiet = links[0], links[1]
    half.client.shutdown(socket.SHUT_WR)
    assert receive_to_end(half.upstream) == b""
    data = seeded(6_000_000, 3)
    senders = [Talker(link.client, data) for link in links[2:]]
    receivers = [Talker(link.upstream, data[:1000]) for link in links[2:]]
    thread = threading.Thread(target=talk, args=(*senders, *receivers))
    thread.start()
    for number in range(10):
        it.reload("" if number % 2 else f'bandwidth = "{5 + number}MB"')
    it.reload("")
    thread.join()
    assert all(talker.received == data for talker in receivers)
    carry(quiet.client, quiet.upstream, b"there")
    carry(half.upstream, half.client, b"back")


# -- what it costs


def test_nobody_is_busy_while_it_waits(limit: Limit) -> None:
    """Eight clogged streams over two workers at 50 kB a second, for a second.

    *Result*: a worker wakes up for each quantum that anybody draws, and no more often.
    """
    it = limit(SLOW, workers=2)
    links = [it.link() for _ in range(8)]
    for link in links:
        fill(link.client, bytes(1 << 22), 0.02)
    pids = it.it.forwarder.workers()
    cpu, waits = sum(map(procfs.cpu_s, pids)), sum(map(procfs.switches, pids))
    began = time.monotonic()
    moved = 0
    for link in links:
        link.upstream.setblocking(False)
    while (took := time.monotonic() - began) < 1:
        for link in links:
            try:
                moved += len(link.upstream.recv(1 << 20))
            except BlockingIOError:
                continue
        time.sleep(0.01)
    quanta = took * 50_000 / quantum_of(50_000)
    beats = 2 * 2 * took
    assert moved > 0
    assert sum(map(procfs.switches, pids)) - waits < 10 * quanta + 10 * beats
    assert sum(map(procfs.cpu_s, pids)) - cpu < took / 4


# -- UDP


@pytest.mark.parametrize("protocol", ["udp", "udptotcp", "tcptoudp"])
def test_flows_and_bridges_have_a_bandwidth(limit_any: LimitAny, protocol: str) -> None:
    """Offered faster than it may be. Result: less arrives than was sent, at most what may."""
    it = limit_any(protocol, BANDWIDTH)
    with ExitStack() as stack:
        client = stack.enter_context(
            connect(it.address) if protocol == "tcptoudp" else udp_client(it.address)
        )
        began = time.monotonic()
        client.setblocking(False)
        arrived = 0
        there = it.upstream
        while (took := time.monotonic() - began) < 1:
            for _ in range(20):
                try:
                    client.send(bytes(1000))
                except BlockingIOError:
                    break
            if protocol == "udptotcp" and there is it.upstream:
                there = stack.enter_context(accept(it.upstream))
            arrived += sum(map(len, drain(there)))
        # One read takes a batch of what the queue of a socket holds.
        assert 0 < arrived <= RATE * took + ahead(2) + 64_000
        # What the kernel drops when the queue is full it does not tell us.
        assert it.status()["sessions"] == 1


def test_datagrams_of_new_flows_that_find_no_room_are_dropped_and_counted(
    limit_any: LimitAny,
) -> None:
    """300 clients with a question each, which is what the listener itself hands on."""
    it = limit_any("udp", 'bandwidth = "400kbit"', workers=1)
    began = time.monotonic()
    for _ in range(300):
        with udp_client(it.address) as client:
            client.send(bytes(1000))
    arrived = 0

    def is_all_told() -> bool:
        nonlocal arrived
        arrived += len(drain(it.upstream))
        return arrived + int(str(it.status()["datagrams_dropped"])) == 300

    eventually(is_all_told, lambda: f"{arrived} have arrived, {it.status()}")
    assert 0 < arrived * 1000 <= 50_000 * (time.monotonic() - began) + ahead(1)
