"""Finding an upstream: refused, slow, absent, named, by IPv6, from an address, or not allowed."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from support import procfs, sockdiag
from support.clogged import CloggedUpstream
from support.ends import (
    Link,
    accept,
    be_reset,
    carry,
    connect,
    listen,
    receive_exactly,
    receive_to_end,
    receive_to_reset,
    reset,
    seeded,
)
from support.forwarder import reserve_port
from support.processes import queued
from support.waiting import PATIENCE_S, eventually

from forwarder.net.sockets import unsent_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import MakeTunnel, StartForwarder, Tunnel

RELAYS = pytest.mark.parametrize("relay", ["splice", "copy"])


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")


def works(link: Link) -> None:
    carry(link.client, link.upstream, b"request")
    carry(link.upstream, link.client, b"reply")


@pytest.mark.expects_log("connect.failed")
def test_a_refused_client_is_reset_and_the_next_is_served(make_tunnel: MakeTunnel) -> None:
    with reserve_port() as closed:
        tunnel = make_tunnel(upstream=f'"127.0.0.1:{closed.getsockname()[1]}"')
        for _ in range(20):
            be_reset(tunnel.address)
        closed.listen()
        with connect(tunnel.address) as client, accept(closed) as upstream:
            works(Link(client, upstream))


def test_an_upstream_that_closes_at_once(tunnel: Tunnel) -> None:
    for _ in range(50):
        with connect(tunnel.address) as client:
            accept(tunnel.listener).close()
            assert receive_to_end(client) == b""


def test_an_upstream_that_resets_at_accept(tunnel: Tunnel) -> None:
    for _ in range(50):
        with connect(tunnel.address) as client:
            reset(accept(tunnel.listener))
            assert receive_to_reset(client) == b""


def test_clients_that_close_or_reset_at_once_leave_nothing(tunnel: Tunnel) -> None:
    """What the upstream sees of them is an end or a reset, and no session stays."""
    for number in range(100):
        client = connect(tunnel.address)
        if number % 2:
            client.sendall(b"bye")
            client.close()
        else:
            reset(client)
    address = tunnel.address
    assert isinstance(address, tuple)

    def are_over() -> bool:
        tunnel.listener.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                with accept(tunnel.listener) as upstream, suppress(ConnectionResetError):
                    assert receive_to_end(upstream) in (b"", b"bye")
        return not queued(address) and tunnel.leaks.is_idle()

    eventually(are_over)
    tunnel.listener.settimeout(PATIENCE_S)


def syns(tunnel: Tunnel) -> int:
    (worker,) = tunnel.forwarder.workers()
    return sockdiag.states(worker).count(sockdiag.SYN_SENT)


@RELAYS
def test_what_a_client_sent_before_the_upstream_answered_arrives(
    make_tunnel: MakeTunnel, relay: str
) -> None:
    with CloggedUpstream() as clogged:
        tunnel = make_tunnel("--workers", "1", "--relay", relay, listener=clogged.listener)
        with connect(tunnel.address) as client:
            client.sendall(b"early")
            client.shutdown(socket.SHUT_WR)
            eventually(lambda: syns(tunnel) == 1, "connecting")
            clogged.open()
            with accept(clogged.listener) as upstream:
                assert receive_to_end(upstream) == b"early"
                upstream.sendall(b"late")
                upstream.close()
            assert receive_to_end(client) == b"late"


def test_a_client_that_resets_before_the_upstream_answered_ends_the_attempt(
    make_tunnel: MakeTunnel,
) -> None:
    with CloggedUpstream() as clogged:
        tunnel = make_tunnel("--workers", "1", listener=clogged.listener)
        client = connect(tunnel.address)
        eventually(lambda: syns(tunnel) == 1, "connecting")
        reset(client)
        eventually(lambda: syns(tunnel) == 0, "the attempt is given up")


@RELAYS
@pytest.mark.parametrize("has_ended", [True, False])
def test_what_a_client_said_before_it_reset_arrives_when_the_upstream_answers(
    make_tunnel: MakeTunnel, relay: str, *, has_ended: bool
) -> None:
    """As senders of log lines do: connect, say it, go. We have acknowledged it.

    *Result*: all of it, then an end of file if the client had sent one, else the reset.
    """
    with CloggedUpstream() as clogged:
        tunnel = make_tunnel("--workers", "1", "--relay", relay, listener=clogged.listener)
        client = connect(tunnel.address)
        client.sendall(b"a line")
        if has_ended:
            client.shutdown(socket.SHUT_WR)
        eventually(lambda: syns(tunnel) == 1 and not unsent_bytes(client), "connecting")
        reset(client)
        clogged.open()
        with accept(clogged.listener) as upstream:
            receive = receive_to_end if has_ended else receive_to_reset
            assert receive(upstream) == b"a line"


@RELAYS
def test_an_urgent_byte_in_the_first_words_of_an_upstream_stays_in_the_stream(
    make_tunnel: MakeTunnel, relay: str
) -> None:
    """It is there when the worker learns that it is connected: the worker is held meanwhile."""
    with CloggedUpstream() as clogged:
        tunnel = make_tunnel("--workers", "1", "--relay", relay, listener=clogged.listener)
        (worker,) = tunnel.forwarder.workers()
        with connect(tunnel.address) as client:
            eventually(lambda: syns(tunnel) == 1, "connecting")
            os.kill(worker, signal.SIGSTOP)
            try:
                clogged.open()
                upstream = accept(clogged.listener)
                upstream.sendall(b"before")
                upstream.send(b"!", socket.MSG_OOB)
                upstream.sendall(b"after")
                upstream.close()
            finally:
                os.kill(worker, signal.SIGCONT)
            assert receive_to_end(client) == b"before!after"


@pytest.mark.expects_log("connect.failed.*timed out")
def test_a_connect_that_is_not_answered_in_time_resets_the_client(make_tunnel: MakeTunnel) -> None:
    with CloggedUpstream() as clogged:
        tunnel = make_tunnel(
            "--workers", "1", listener=clogged.listener, rule='connect_timeout = "1s"'
        )
        be_reset(tunnel.address)


@pytest.mark.expects_log("upstream.failed")
@pytest.mark.parametrize("first", ["refuses", "does not answer"])
def test_the_second_upstream_serves_when_the_first(make_tunnel: MakeTunnel, first: str) -> None:
    with CloggedUpstream() as clogged, reserve_port() as closed, listen() as listener:
        dead = closed if first == "refuses" else clogged.listener
        ports = (dead.getsockname()[1], listener.getsockname()[1])
        tunnel = make_tunnel(
            "--workers",
            "1",
            listener=listener,
            upstream='["127.0.0.1:{}", "127.0.0.1:{}"]'.format(*ports),
            rule='connect_timeout = "500ms"',
        )
        for _ in range(3):
            works(tunnel.link())


def test_upstreams_are_used_in_turn(make_tunnel: MakeTunnel) -> None:
    with listen() as one, listen() as two:
        ports = (one.getsockname()[1], two.getsockname()[1])
        tunnel = make_tunnel(
            "--workers",
            "1",
            listener=one,
            upstream='["127.0.0.1:{}", "127.0.0.1:{}"]'.format(*ports),
        )
        for _ in range(4):
            for listener in (one, two):
                with connect(tunnel.address) as client, accept(listener) as upstream:
                    works(Link(client, upstream))


def test_a_host_name_is_resolved(make_tunnel: MakeTunnel) -> None:
    with listen() as listener:
        tunnel = make_tunnel(listener=listener, upstream=f'"localhost:{listener.getsockname()[1]}"')
        for _ in range(3):
            works(tunnel.link())


def test_the_source_address_is_used(make_tunnel: MakeTunnel) -> None:
    tunnel = make_tunnel(rule='source_address = "127.0.0.2"')
    link = tunnel.link()
    assert link.upstream.getpeername()[0] == "127.0.0.2"
    works(link)


@needs_ipv6
def test_ipv6_on_both_sides(start_forwarder: StartForwarder) -> None:
    with reserve_port("::1") as holder, listen("::1") as listener:
        port, target = holder.getsockname()[1], listener.getsockname()[1]
        start_forwarder("-l", f"[::1]:{port}", "-r", f"[::1]:{target}")
        with connect(("::1", port)) as client, accept(listener) as upstream:
            works(Link(client, upstream))


@needs_ipv6
def test_the_ipv6_wildcard_serves_both_families(start_forwarder: StartForwarder) -> None:
    with reserve_port("::") as holder, listen() as listener:
        port, target = holder.getsockname()[1], listener.getsockname()[1]
        start_forwarder("-l", f"[::]:{port}", "-r", f"127.0.0.1:{target}")
        for host in ("127.0.0.1", "::1"):
            with connect((host, port)) as client, accept(listener) as upstream:
                works(Link(client, upstream))


def test_a_denied_client_gets_nothing_and_the_upstream_does_not_hear_of_it(
    make_tunnel: MakeTunnel,
) -> None:
    tunnel = make_tunnel(rule='rules = [{ type = "deny", pattern = "127.0.0.5" }]')
    for _ in range(5):
        denied = socket.socket()
        denied.settimeout(30)
        denied.bind(("127.0.0.5", 0))
        with denied:
            try:
                denied.connect(tunnel.address)
                assert denied.recv(1) == b""
            except ConnectionResetError:
                continue
    # The first that arrives is the one that is allowed.
    link = tunnel.link()
    assert link.upstream.getpeername()[0] == "127.0.0.1"
    link.client.sendall(b"allowed")
    assert receive_exactly(link.upstream, 7) == b"allowed"


def test_sessions_spread_over_the_workers(make_tunnel: MakeTunnel) -> None:
    tunnel = make_tunnel("--workers", "3")
    idle = {pid: procfs.socket_count(pid) for pid in tunnel.forwarder.workers()}
    for _ in range(300):
        tunnel.link()
    served = {pid: procfs.socket_count(pid) - count for pid, count in idle.items()}
    assert len(served) == 3
    assert sum(served.values()) == 600
    assert all(served.values()), served


def test_several_rules_lead_to_their_own_upstreams(
    start_forwarder: StartForwarder, tmp_path: Path
) -> None:
    holders = [reserve_port() for _ in range(5)]
    listeners = [listen() for _ in range(5)]
    pairs = list(zip(holders, listeners, strict=True))
    rules = ""
    for holder, listener in pairs:
        ports = holder.getsockname()[1], listener.getsockname()[1]
        rules += "[[forwarding_rules]]\n"
        rules += 'listen = "127.0.0.1:{}"\nupstream = "127.0.0.1:{}"\n'.format(*ports)
    path = tmp_path / "several.toml"
    path.write_text(rules)
    try:
        start_forwarder("-c", str(path))
        for number, (holder, listener) in enumerate(pairs):
            with connect(holder.getsockname()) as client, accept(listener) as upstream:
                carry(client, upstream, seeded(1000, number))
    finally:
        for sock in (*holders, *listeners):
            sock.close()
