"""Slow readers, silence, exhausted descriptors and pipes, and urgent bytes."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import threading
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import pytest
from support import procfs
from support.configured import rule
from support.ends import (
    Link,
    Talker,
    accept,
    carry,
    connect,
    fill,
    listen,
    receive_exactly,
    receive_to_end,
    receive_to_reset,
    reset,
    seeded,
    talk,
)
from support.forwarder import reserve_port
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import MakeTunnel, StartForwarder, Tunnel

MIB = 1 << 20
SESSIONS = 12
BOTH = pytest.mark.parametrize("first", ["client", "upstream"])
IN_USE_S = 3
"""A timeout that must not end what is in use: longer than a busy machine keeps a test waiting."""
TIMES = 30
RELAYS = pytest.mark.parametrize("relay", ["splice", "copy"])


# -- backpressure


@BOTH
def test_a_slow_reader_stops_the_sender_and_then_gets_every_byte(
    tunnel: Tunnel, first: str
) -> None:
    near, far = tunnel.link().end(first)
    before = {pid: procfs.resident_kib(pid) for pid in tunnel.forwarder.workers()}
    data = seeded(64 * MIB, 20)
    taken = fill(near, data)
    assert taken < len(data), "nothing stopped the sender"
    for pid, kib in before.items():
        assert procfs.resident_kib(pid) - kib < 4096
    near.shutdown(socket.SHUT_WR)
    assert receive_to_end(far) == data[:taken]


@RELAYS
def test_memory_of_many_clogged_sessions_is_bounded(make_tunnel: MakeTunnel, relay: str) -> None:
    """Sessions wait for readers that do not read; then each gets its bytes."""
    with listen(receive_buffer=16 * 1024) as listener:
        tunnel = make_tunnel("--workers", "1", "--relay", relay, listener=listener)
        (worker,) = tunnel.forwarder.workers()
        data = seeded(32 * MIB, 21)
        before = procfs.resident_kib(worker)
        links = [tunnel.link() for _ in range(SESSIONS)]
        taken = [fill(link.client, data, 0.02) for link in links]
        assert max(taken) < len(data), "not clogged"
        # What a copying session keeps in memory is at most one read of 256 KiB.
        assert procfs.resident_kib(worker) - before < SESSIONS * 256 + 4096
        for link, count in zip(links, taken, strict=True):
            link.client.shutdown(socket.SHUT_WR)
            assert receive_to_end(link.upstream) == data[:count]


def test_when_pipes_run_out_sessions_are_copied(make_tunnel: MakeTunnel) -> None:
    """The worker may not open one more descriptor when bulk begins, so there is no pipe."""
    with listen(receive_buffer=16 * 1024) as listener:
        tunnel = make_tunnel("--workers", "1", "--relay", "splice", listener=listener)
        (worker,) = tunnel.forwarder.workers()
        links = [tunnel.link() for _ in range(SESSIONS)]
        old = limit_descriptors(worker, 0)
        data = seeded(8 * MIB, 22)
        pipes = procfs.pipe_count(worker)
        taken = [fill(link.client, data, 0.02) for link in links]
        assert procfs.pipe_count(worker) == pipes
        resource.prlimit(worker, resource.RLIMIT_NOFILE, old)
        for link, count in zip(links, taken, strict=True):
            link.client.shutdown(socket.SHUT_WR)
            assert receive_to_end(link.upstream) == data[:count]


def test_when_the_pipe_budget_is_used_up_bytes_stay_exact(make_tunnel: MakeTunnel) -> None:
    """More clogged bulk sessions than a worker's share of the pages has pipes for.

    With 40 workers a worker has 307 pages: room for 4 pipes of 256 KiB and some of 64 KiB.
    """
    with listen(receive_buffer=16 * 1024) as listener:
        tunnel = make_tunnel("--workers", "40", "--relay", "splice", listener=listener)
        data = seeded(2 * MIB, 23)
        links = [tunnel.link() for _ in range(200)]
        for link in links:
            fill(link.client, data, 0.0)
        talkers = []
        for link in links:
            talkers += [Talker(link.client, b"end"), Talker(link.upstream, seeded(50_000, 24))]
        talk(*talkers)
        for up, down in zip(talkers[::2], talkers[1::2], strict=True):
            body = bytes(down.received)
            assert body.endswith(b"end")
            assert data.startswith(body[:-3])
            assert up.received == down.outgoing


@BOTH
def test_a_saturating_session_does_not_starve_another(tunnel: Tunnel, first: str) -> None:
    """While one session moves bulk for as long as the test lasts, another makes 200 exchanges."""
    near, far = tunnel.link().end(first)
    stop = threading.Event()

    def send() -> None:
        block = bytes(4 * MIB)
        while not stop.is_set():
            near.sendall(block)
        near.shutdown(socket.SHUT_WR)

    count = 0

    def receive() -> None:
        nonlocal count
        while part := far.recv(MIB):
            count += len(part)

    threads = [threading.Thread(target=send), threading.Thread(target=receive)]
    for thread in threads:
        thread.start()
    try:
        ping = tunnel.link()
        for _ in range(200):
            carry(ping.client, ping.upstream, b"ping")
            carry(ping.upstream, ping.client, b"pong")
        moved = count
        eventually(lambda: count > moved, "bulk goes on")
    finally:
        stop.set()
        for thread in threads:
            thread.join()


# -- silence


@BOTH
@RELAYS
def test_a_silent_session_ends_at_the_idle_timeout(
    make_tunnel: MakeTunnel, relay: str, first: str
) -> None:
    tunnel = make_tunnel("--relay", relay, rule='idle_timeout = "1s"')
    link = tunnel.link()
    carry(*link.end(first), b"something")
    assert link.client.recv(1) == b""
    assert link.upstream.recv(1) == b""


@BOTH
def test_the_idle_timeout_does_not_end_a_session_in_use(
    make_tunnel: MakeTunnel, first: str
) -> None:
    """A byte now and then in one direction only, for longer than the timeout."""
    tunnel = make_tunnel(rule=f'idle_timeout = "{IN_USE_S}s"')
    near, far = tunnel.link().end(first)
    for _ in now_and_then():
        carry(near, far, b".")


@BOTH
def test_a_half_closed_session_in_silence_is_reset(make_tunnel: MakeTunnel, first: str) -> None:
    tunnel = make_tunnel(rule='half_close_timeout = "300ms"')
    near, far = tunnel.link().end(first)
    near.shutdown(socket.SHUT_WR)
    assert receive_to_end(far) == b""
    assert receive_to_reset(near) == b""
    assert_reset(far)


def now_and_then() -> Iterator[int]:
    """``TIMES`` numbers from 1, over a time and a half of the timeout."""
    pace = threading.Event()
    for number in range(1, TIMES + 1):
        yield number
        pace.wait(1.5 * IN_USE_S / TIMES)


def assert_reset(sock: socket.socket) -> None:
    """An end of file has been read already; the reset shows as the socket's error."""
    eventually(
        lambda: sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == b"\x07",  # TCP_CLOSE
        "the socket is reset",
    )


@BOTH
def test_the_half_close_timeout_does_not_end_a_session_in_use(
    make_tunnel: MakeTunnel, first: str
) -> None:
    tunnel = make_tunnel(rule=f'half_close_timeout = "{IN_USE_S}s"')
    near, far = tunnel.link().end(first)
    near.shutdown(socket.SHUT_WR)
    assert receive_to_end(far) == b""
    for _ in now_and_then():
        carry(far, near, b".")


def read_slowly(sock: socket.socket, data: bytes) -> None:
    """Read ``data`` in parts, for longer than the timeout."""
    done = 0
    for number in now_and_then():
        part = len(data) * number // TIMES - done
        assert receive_exactly(sock, part) == data[done : done + part]
        done += part


@BOTH
@pytest.mark.parametrize("timeout", ["idle_timeout", "half_close_timeout"])
def test_a_slow_reader_gets_all_that_the_kernel_holds_for_it(
    make_tunnel: MakeTunnel, first: str, timeout: str
) -> None:
    """The sender has finished; the rest waits in our send queue and still flows, without events.

    *Result*: bytes that flow keep a session alive, whoever holds them.
    """
    with listen(receive_buffer=32 * 1024) as listener:
        tunnel = make_tunnel(listener=listener, rule=f'{timeout} = "{IN_USE_S}s"')
        near, far = tunnel.link(receive_buffer=32 * 1024).end(first)
        data = seeded(1_500_000, 25)
        near.sendall(data)
        near.shutdown(socket.SHUT_WR)
        read_slowly(far, data)
        assert far.recv(1) == b""


@BOTH
@RELAYS
def test_a_stream_that_a_timeout_cuts_does_not_look_whole(
    make_tunnel: MakeTunnel, relay: str, first: str
) -> None:
    """A reader that stands still is cut off at the idle timeout, with bytes still to come.

    *Result*: what it reads afterwards ends with a reset, or is everything.
    """
    tunnel = make_tunnel("--workers", "1", "--relay", relay, rule='idle_timeout = "3s"')
    (worker,) = tunnel.forwarder.workers()
    idle = procfs.socket_count(worker)
    data = seeded(64 * MIB, 26)
    taken = -1
    while taken < 0:
        near, far = tunnel.link().end(first)
        with suppress(ConnectionError):  # this process was held up, and the timeout came first
            taken = fill(near, data, 0.1)
    assert taken < len(data), "not clogged"
    eventually(lambda: procfs.socket_count(worker) == idle, "the session is cut off")
    try:
        received = receive_to_end(far)
    except ConnectionResetError:
        return
    assert len(received) == taken, "a part of the stream ends as if it were all"


# -- descriptors


def limit_descriptors(pid: int, more: int) -> tuple[int, int]:
    """Let ``pid`` open ``more`` descriptors beyond those it has; returns the old limits."""
    used = procfs.descriptors(pid).keys()
    limit = free = 0
    while free < more or limit in used:
        free += limit not in used
        limit += 1
    old: tuple[int, int] = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, old[1]))
    return old


@pytest.mark.expects_log("accept.paused")
@RELAYS
@pytest.mark.parametrize("spare", [10, 11])
def test_clients_wait_when_descriptors_run_out_and_are_served_later(
    make_tunnel: MakeTunnel, relay: str, spare: int
) -> None:
    """30 clients, room for about 5: the others stay in the queue, with what they have sent.

    *Result*: as sessions end others are served; none is reset, and the log stays short.
    """
    tunnel = make_tunnel("--workers", "1", "--relay", relay)
    (worker,) = tunnel.forwarder.workers()
    limit_descriptors(worker, spare)
    clients = [connect(tunnel.address) for _ in range(30)]
    try:
        for number, client in enumerate(clients):
            client.sendall(b"%02d" % number)
        tunnel.forwarder.wait_logged("accept.paused")
        served = 0
        while served < len(clients):
            with accept(tunnel.listener) as upstream:
                number = int(receive_exactly(upstream, 2))
                upstream.sendall(b"reply%02d" % number)
            assert receive_to_end(clients[number]) == b"reply%02d" % number
            clients[number].close()
            served += 1
    finally:
        for client in clients:
            client.close()
    works_again(tunnel)
    assert len(tunnel.forwarder.trouble()) == 1, tunnel.forwarder.trouble()[:6]


@pytest.mark.expects_log("accept.paused")
@pytest.mark.parametrize("spare", [10, 11])
def test_a_lasting_shortage_of_descriptors_is_logged_once(
    make_tunnel: MakeTunnel, spare: int
) -> None:
    """The listener tries again ten times a second; here for two seconds.

    *Result*: one line, with what is short and what to do; and one when it is over.
    """
    tunnel = make_tunnel("--workers", "1")
    (worker,) = tunnel.forwarder.workers()
    old = limit_descriptors(worker, spare)
    clients = [connect(tunnel.address) for _ in range(20)]
    tunnel.forwarder.wait_logged("accept.paused")
    threading.Event().wait(2)
    resource.prlimit(worker, resource.RLIMIT_NOFILE, old)
    links = [Link(client, accept(tunnel.listener)) for client in clients]
    for link in links:
        link.close()
    works_again(tunnel)
    tunnel.forwarder.wait_logged(r"INFO accept.resumed: after \d+ pauses in [1-9]")
    (line,) = tunnel.forwarder.trouble()
    assert re.search(r"accept.paused: (\d+) of \1 descriptors in use, \d+ sessions; .*ulimit", line)


@pytest.mark.expects_log("accept.paused")
def test_a_shortage_of_descriptors_is_logged_once_for_all_listeners_of_a_worker(
    start_forwarder: StartForwarder, tmp_path: Path
) -> None:
    """Twenty rules, clients of all of them, one served after the other at the limit.

    *Result*: one line of the worker, though each rests and goes on many times.
    """
    rules = 20
    with ExitStack() as stack:
        listener = stack.enter_context(listen())
        at = [stack.enter_context(reserve_port()).getsockname() for _ in range(rules)]
        path = tmp_path / "forwarder.toml"
        path.write_text("workers = 1\n" + "".join(rule(a, listener.getsockname()) for a in at))
        forwarder = start_forwarder("-c", str(path))
        (worker,) = forwarder.workers()
        limit_descriptors(worker, 10)
        clients = [stack.enter_context(connect(address)) for address in at for _ in range(10)]
        for number, client in enumerate(clients):
            client.sendall(b"%03d" % number)
        forwarder.wait_logged("accept.paused")
        for _ in clients:
            with accept(listener) as upstream:
                clients[int(receive_exactly(upstream, 3))].close()
        assert len(forwarder.trouble()) == 1, forwarder.trouble()[:6]


def works_again(tunnel: Tunnel) -> None:
    link = tunnel.link()
    carry(link.client, link.upstream, b"request")
    carry(link.upstream, link.client, b"reply")


@pytest.mark.expects_log
@pytest.mark.parametrize("spare", [1, 2])
def test_the_second_upstream_is_reached_with_the_last_descriptor(
    make_tunnel: MakeTunnel, spare: int
) -> None:
    """The first upstream refuses; its descriptor is free for the second one."""
    with socket.socket() as closed, listen() as listener:
        closed.bind(("127.0.0.1", 0))
        ports = (closed.getsockname()[1], listener.getsockname()[1])
        tunnel = make_tunnel(
            "--workers",
            "1",
            listener=listener,
            upstream='["127.0.0.1:{}", "127.0.0.1:{}"]'.format(*ports),
        )
        (worker,) = tunnel.forwarder.workers()
        limit_descriptors(worker, spare)
        works_again(tunnel)


# -- urgent bytes


@BOTH
def test_an_urgent_byte_alone_stays_in_the_stream(tunnel: Tunnel, first: str) -> None:
    near, far = tunnel.link().end(first)
    carry(near, far, b"before")
    near.send(b"!", socket.MSG_OOB)
    assert receive_exactly(far, 1) == b"!"
    carry(near, far, b"after")


@BOTH
def test_urgent_bytes_between_bulk_stay_in_the_stream(tunnel: Tunnel, first: str) -> None:
    near, far = tunnel.link().end(first)
    for number in range(4):
        bulk = seeded(2 * MIB, number)
        carry(near, far, bulk)
        near.sendall(b"x")
        near.send(b"!", socket.MSG_OOB)
        assert receive_exactly(far, 2) == b"x!"
    carry(near, far, seeded(2 * MIB, 9))
    near.close()
    assert receive_to_end(far) == b""


@BOTH
@RELAYS
def test_an_urgent_byte_behind_unread_bulk_stays_in_the_stream(
    make_tunnel: MakeTunnel, relay: str, first: str
) -> None:
    """The worker is held until bulk, urgent byte, more bulk and the end have all arrived."""
    tunnel = make_tunnel("--workers", "1", "--relay", relay)
    (worker,) = tunnel.forwarder.workers()
    near, far = tunnel.link().end(first)
    carry(near, far, b"hello")
    before, after = seeded(60_000, 30), seeded(30_000, 31)
    os.kill(worker, signal.SIGSTOP)
    try:
        near.sendall(before)
        near.send(b"!", socket.MSG_OOB)
        near.sendall(after)
        near.shutdown(socket.SHUT_WR)
    finally:
        os.kill(worker, signal.SIGCONT)
    assert receive_to_end(far) == before + b"!" + after


@BOTH
def test_an_urgent_byte_to_a_clogged_reader_stays_in_the_stream(tunnel: Tunnel, first: str) -> None:
    near, far = tunnel.link().end(first)
    data = seeded(64 * MIB, 32)
    taken = fill(near, data)
    assert taken < len(data), "not clogged"
    end = Talker(near, b"after")
    received = bytearray(receive_exactly(far, taken // 2))
    sent = 0
    near.setblocking(False)
    while not sent:
        received += far.recv(MIB)
        try:
            sent = near.send(b"!", socket.MSG_OOB)
        except BlockingIOError:
            continue
    rest = Talker(far, b"")
    talk(end, rest)
    assert received + rest.received == data[:taken] + b"!after"


@BOTH
def test_a_reset_behind_an_urgent_byte_is_a_reset(tunnel: Tunnel, first: str) -> None:
    near, far = tunnel.link().end(first)
    carry(near, far, b"before")
    near.send(b"!", socket.MSG_OOB)
    assert receive_exactly(far, 1) == b"!"
    reset(near)
    assert receive_to_reset(far) == b""
