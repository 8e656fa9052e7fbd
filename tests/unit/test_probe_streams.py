"""Checks over TCP and unix sockets, and servers that do not do what a server should."""

from __future__ import annotations

import errno
import re
import select
import socket
import struct
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import pytest
from support.ends import has_mptcp
from support.forwarder import reserve_port
from support.probing import SHORT_S, accept, ask, asking, check, target, target_of

from forwarder.checker.outcome import Advice
from forwarder.checker.probes import stream
from forwarder.config.model import Sides, SocketOptions
from forwarder.net import options as socket_options

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from forwarder.checker.probes.readers import Reader
    from forwarder.config.model import Check

RESET = struct.pack("ii", 1, 0)
NOWHERE = target(("127.0.0.1", 1))
STATUS = b"HTTP/1.1 200 OK\r\n"


@pytest.fixture(params=["IPv4", "IPv6", "unix", "abstract"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[socket.socket]:
    """Where a server listens."""
    families = {"IPv4": socket.AF_INET, "IPv6": socket.AF_INET6}
    family = families.get(request.param, socket.AF_UNIX)
    addresses: dict[str, tuple[str, int] | str] = {
        "IPv4": ("127.0.0.1", 0),
        "IPv6": ("::1", 0),
        "unix": str(tmp_path / "s"),
        "abstract": f"\0forwarder-test-{tmp_path}",
    }
    with socket.socket(family) as sock:
        sock.bind(addresses[request.param])
        sock.listen(8)
        yield sock


@pytest.fixture
def tcp() -> Iterator[socket.socket]:
    """Where a server listens, by IPv4."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


def heard(peer: socket.socket) -> bytes:
    """All that comes until the end, which is no reset."""
    data = b""
    while piece := peer.recv(65536):
        data += piece
    return data


def reset(peer: socket.socket) -> None:
    """Close by RST."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    peer.close()


def test_an_expression_without_end_says_nothing_of_the_server(tcp: socket.socket) -> None:
    it = check("tcp", expect=rb"(x+x+)+y", is_pattern=True)
    with asking(it, target_of(tcp)) as asked, accept(asked, tcp) as peer:
        peer.sendall(b"x" * 100)
        assert asked.outcome().is_ours


# -- only a handshake


def test_a_server_that_is_connected_to_is_good(listener: socket.socket) -> None:
    outcome = ask(check(), target_of(listener))
    assert (outcome.is_good, outcome.why, outcome.advice) == (True, "", None)
    assert outcome.took_s > 0


@pytest.mark.parametrize("mptcp", [Sides.OFF, Sides.CONNECT])
def test_a_program_does_not_notice_that_its_port_is_checked(
    tcp: socket.socket, mptcp: Sides
) -> None:
    """Not in its queue, which else its own checks would fill while it does not accept."""
    how = socket_options.to_connect(SocketOptions(mptcp=mptcp), is_udp=False)[socket.AF_INET]
    count = 20
    for _ in range(count):
        assert ask(check(), target_of(tcp), how=how).is_good
    tcp.setblocking(False)
    seen = 0
    with suppress(BlockingIOError):
        while True:
            tcp.accept()[0].close()
            seen += 1
    assert seen < count  # 0, unless this process had to wait for a processor for 0.2 s


@pytest.mark.skipif(not has_mptcp(), reason="no MPTCP")
def test_a_program_that_is_asked_is_asked_by_the_protocol_of_the_rule(tcp: socket.socket) -> None:
    options = SocketOptions(mptcp=Sides.CONNECT)
    how = socket_options.to_connect(options, is_udp=False)[socket.AF_INET]
    with asking(talk("tcp"), target_of(tcp), how=how) as it, accept(it, tcp) as peer:
        assert socket_options.is_mptcp(it.probe._sock)  # type: ignore[attr-defined]
        peer.sendall(b"+PONG")
        assert it.outcome().is_good


@pytest.mark.parametrize(
    ("address", "why"),
    [
        (("127.0.0.1", 1), "connection refused"),
        (("::1", 1), "connection refused"),
        ("/nonexistent/socket", "no such file or directory"),
        ("\0forwarder-nobody", "connection refused"),
        (("255.255.255.255", 1), "network is unreachable"),
    ],
)
@pytest.mark.parametrize("kind", ["tcp", "http", "agent", "tls"])
def test_a_server_that_is_not_there_is_bad(
    kind: str, address: tuple[str, int] | str, why: str
) -> None:
    outcome = ask(check(kind), target(address))
    assert (outcome.is_good, outcome.why, outcome.is_ours) == (False, why, False)


@pytest.mark.parametrize("kind", ["tcp", "http", "udp"])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_check_that_meets_itself_has_found_nobody(kind: str, host: str) -> None:
    """The kernel may choose the port that is checked for its own end of the connection."""
    with reserve_port(host) as holder:
        address = holder.getsockname()[:2]
    outcome = ask(check(kind), target(address), source=address)
    assert (outcome.is_good, outcome.why) == (False, "connection refused")


def test_a_server_whose_queue_is_full_is_bad(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(tmp_path / "s"))
        listener.listen(0)
        client.connect(str(tmp_path / "s"))
        outcome = ask(check(), target_of(listener))
        assert (outcome.is_good, outcome.why) == (False, "its queue of connections is full")


def test_a_server_that_is_not_reached_in_time_is_bad() -> None:
    with socket.socket() as full, socket.socket() as client:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        client.connect(full.getsockname())  # the kernel drops what comes now
        outcome = ask(check(timeout_s=SHORT_S), target_of(full))
        assert (outcome.is_good, outcome.why) == (False, "no connection within 0.2 s")


# -- a text, and an answer


def test_what_is_expected_may_come_unasked(listener: socket.socket) -> None:
    with asking(check(expect=b"220 "), target_of(listener)) as it, accept(it, listener) as peer:
        peer.sendall(b"22")
        it.turn()
        peer.sendall(b"0 mail.example ESMTP\r\n")
        assert it.outcome()[:2] == (True, "")
        assert heard(peer) == b""  # and no reset, of which servers complain


@pytest.mark.parametrize("expect", [b"+PONG", b""])
def test_a_text_is_sent_and_answered(listener: socket.socket, expect: bytes) -> None:
    with (
        asking(check(send=b"PING\r\n", expect=expect), target_of(listener)) as it,
        accept(it, listener) as peer,
    ):
        it.turn()
        assert peer.recv(100) == b"PING\r\n"
        assert it.outcomes == []
        peer.sendall(b"+PONG\r\n")
        assert it.outcome().is_good
        assert heard(peer) == b""


def test_a_long_text_is_sent_while_the_answer_is_read(tcp: socket.socket) -> None:
    """To a server that reads only when it has said what it has to say."""
    text = b"x" * 4_000_000
    with asking(check(send=text, expect=b"done"), target_of(tcp)) as it, accept(it, tcp) as peer:
        it.turn()
        peer.sendall(b"wait ")
        peer.setblocking(False)
        read = 0

        def read_some() -> bool:
            nonlocal read
            if select.select([peer], [], [], 0)[0]:
                read += len(peer.recv(1 << 20))
            return read == len(text)

        it.until(read_some)
        peer.sendall(b"done")
        assert it.outcome().is_good


@pytest.mark.parametrize(
    ("kind", "answer", "why"),
    [
        ("tcp", b"", "no answer within 0.2 s"),
        ("http", b"", "no answer within 0.2 s"),
        ("agent", b"", "no answer within 0.2 s"),
        ("tcp", b"-ERR unknown\r\n", "got '-ERR unknown', and no more within 0.2 s"),
        ("http", b"HTTP/1.1 20", "got 'HTTP/1.1 20', and no more within 0.2 s"),
        ("agent", b"75", "got '75', and no more within 0.2 s"),
    ],
)
def test_an_answer_that_is_not_complete_in_time_is_bad(
    tcp: socket.socket, kind: str, answer: bytes, why: str
) -> None:
    with asking(talk(kind, timeout_s=SHORT_S), target_of(tcp)) as it, accept(it, tcp) as peer:
        peer.sendall(answer)
        outcome = it.outcome()
        assert (outcome.is_good, outcome.why, outcome.is_ours) == (False, why, False)
        with pytest.raises(ConnectionResetError):
            heard(peer)


def talk(kind: str, **fields: object) -> Check:
    """A check that waits for an answer."""
    return check(kind, **({"expect": b"+PONG"} if kind == "tcp" else {}), **fields)


def has_heard(reader: Reader, count: int) -> bool:
    """Whether so much of an answer was read."""
    return len(reader.heard) == count


ANSWERS = {"tcp": b"-- +PONG", "http": STATUS, "agent": b"up 75%\n"}


@pytest.mark.parametrize("kind", ANSWERS)
@pytest.mark.parametrize("ends", ["closed", "connection reset by peer"])
def test_a_server_may_go_at_each_point(tcp: socket.socket, kind: str, ends: str) -> None:
    """Each byte of an answer comes by itself; the check is good exactly if all of them come."""
    answer = ANSWERS[kind]
    for count in range(len(answer) + 1):
        with asking(talk(kind), target_of(tcp)) as it:
            peer = accept(it, tcp)
            for byte in answer[:count]:
                peer.sendall(bytes([byte]))
                it.turn()
            reader = it.probe._reader  # type: ignore[attr-defined]
            it.until(partial(has_heard, reader, count))
            if ends == "closed":
                peer.shutdown(socket.SHUT_WR)
                outcome = it.outcome()
                peer.close()
            else:
                reset(peer)
                outcome = it.outcome()
            assert outcome.is_good is (count == len(answer)), (count, outcome)
            if count == 0:
                assert outcome.why in (f"{ends} without an answer", "connection reset by peer")
            elif count < len(answer):
                shown = answer[:count].decode().strip().replace("\r", "\\r")
                assert outcome.why.startswith(f"got '{shown}"), outcome
                assert outcome.why.endswith(f", then {ends}")


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_huge_answer_is_not_read_to_its_end(tcp: socket.socket, kind: str) -> None:
    """A server that sends as long as it is let."""
    with asking(talk(kind), target_of(tcp)) as it, accept(it, tcp) as peer:
        peer.setblocking(False)

        def flood() -> object:
            if not it.outcomes and select.select([], [peer], [], 0)[1]:
                peer.send(b"HTTP/1.1 100 C\r\n" * 4096)
            return it.outcomes

        it.until(flood)
        outcome = it.outcomes[0]
        assert not outcome.is_good
        assert re.match("got 'HTTP/1.1 100 C", outcome.why), outcome


def test_an_answer_before_the_question_counts(tcp: socket.socket) -> None:
    """A server that is full says so and closes, and does not read what is sent."""
    with asking(check("http"), target_of(tcp)) as it:
        peer = accept(it, tcp)
        peer.sendall(b"HTTP/1.0 503 Full\r\n\r\n")
        peer.shutdown(socket.SHUT_RD)
        assert it.outcome().why == "http 503"
        peer.close()


# -- http


@pytest.mark.parametrize(
    ("fields", "server", "host"),
    [
        ({}, "web.example:{port}", "web.example:{port}"),
        ({"host": "app.example"}, "web.example:80", "app.example:{port}"),
        ({"host": "2001:db8::1"}, "web.example:80", "[2001:db8::1]:{port}"),
        ({}, "[fe80::1%eth0]:{port}", "[fe80::1]:{port}"),
        ({}, "10.0.0.1:{port}", "10.0.0.1:{port}"),
    ],
)
def test_a_get_is_asked(tcp: socket.socket, fields: dict[str, str], server: str, host: str) -> None:
    port = tcp.getsockname()[1]
    given = check("http", path="/health?deep=1", **fields)
    with (
        asking(given, target_of(tcp), server=server.format(port=port)) as it,
        accept(it, tcp) as peer,
    ):
        it.turn()
        lines = peer.recv(1000).decode().split("\r\n")
        peer.sendall(STATUS)
        assert it.outcome().is_good
    assert lines == [
        "GET /health?deep=1 HTTP/1.1",
        f"Host: {host.format(port=port)}",
        "User-Agent: forwarder",
        "Accept: */*",
        "Connection: close",
        "",
        "",
    ]


def test_a_get_by_a_unix_socket_has_a_host_as_well(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with (
            asking(check("http"), target_of(listener), server=f"unix:{tmp_path}/s") as it,
            accept(it, listener) as peer,
        ):
            it.turn()
            assert b"\r\nHost: localhost\r\n" in peer.recv(1000)


# -- agents


@pytest.mark.parametrize(
    ("answer", "is_good", "why", "advice"),
    [
        (b"75% up\n", True, "", Advice(percent=75, is_up=True)),
        (b"down#maintenance\n", False, "agent: down 'maintenance'", Advice(is_up=False)),
    ],
)
def test_an_agent_is_asked(
    listener: socket.socket, answer: bytes, is_good: bool, why: str, advice: Advice
) -> None:
    with (
        asking(check("agent", send=b"web1\n"), target_of(listener)) as it,
        accept(it, listener) as peer,
    ):
        it.turn()
        assert peer.recv(100) == b"web1\n"
        peer.sendall(answer)
        outcome = it.outcome()
        assert (outcome.is_good, outcome.why, outcome.advice) == (is_good, why, advice)


# -- the way there


def test_a_check_comes_from_the_source_of_its_rule(tcp: socket.socket) -> None:
    with (
        asking(talk("tcp"), target_of(tcp), source=("127.0.0.9", 0)) as it,
        accept(it, tcp) as peer,
    ):
        assert peer.getpeername()[0] == "127.0.0.9"


def test_the_options_of_its_rule_are_set(tcp: socket.socket) -> None:
    how = socket_options.to_connect(SocketOptions(dscp=46), is_udp=False)[socket.AF_INET]
    with asking(talk("tcp"), target_of(tcp), how=how) as it, accept(it, tcp):
        sock = it.probe._sock  # type: ignore[attr-defined]
        assert sock.getsockopt(socket.IPPROTO_IP, socket.IP_TOS) == 46 << 2


@pytest.mark.parametrize("kind", ["tcp", "tls", "http", "agent", "udp"])
def test_a_source_that_is_not_here_says_nothing_of_the_server(kind: str) -> None:
    outcome = ask(check(kind), NOWHERE, source=("192.0.2.1", 0))
    assert (outcome.is_good, outcome.is_ours) == (False, True)
    assert outcome.why == "cannot make a socket: cannot assign requested address"


def test_local_ports_that_run_out_say_nothing_of_the_server(
    tcp: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(socket.SocketType):
        def connect_ex(self, _address: object) -> int:
            return errno.EADDRNOTAVAIL

    def full(*_: object) -> socket.SocketType:
        return Full(socket.AF_INET, socket.SOCK_STREAM)

    monkeypatch.setattr(stream, "upstream_socket", full)
    outcome = ask(check(), target_of(tcp))
    assert (outcome.why, outcome.is_ours) == ("no local port is free", True)


# -- cancelled, and stopped


@pytest.mark.parametrize("kind", ["tcp", "http", "agent", "tls"])
@pytest.mark.parametrize("turns", range(4))
def test_a_cancelled_check_closes_everything_and_says_nothing(
    tcp: socket.socket, kind: str, turns: int
) -> None:
    with asking(talk(kind), target_of(tcp)) as it:
        for _ in range(turns):
            it.turn()
        it.probe.cancel()
        assert not it.loop._watches
        it.turn()
        assert it.outcomes == []


def test_time_in_which_the_checker_was_stopped_is_no_time_of_a_server(tcp: socket.socket) -> None:
    with asking(check("http", timeout_s=SHORT_S), target_of(tcp)) as it, accept(it, tcp) as peer:
        it.loop.stopped_s = 5.0
        it.probe._on_timeout()  # type: ignore[attr-defined]
        it.loop.stopped_s = 0.0
        peer.sendall(STATUS)
        assert it.outcome().is_good
