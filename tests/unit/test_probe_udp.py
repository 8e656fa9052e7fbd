"""Checks over UDP: answers, refusals, and silence."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest
from support.dns import dns_server
from support.namespaces import Namespace, needs_network
from support.probing import SHORT_S, Asking, ask, asking, check, target, target_of
from support.programs import debian
from support.waiting import PATIENCE_S

from forwarder.config import presets
from forwarder.config.model import SocketOptions
from forwarder.net.options import to_connect

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(params=["127.0.0.1", "::1"])
def server(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    """A server that the test answers for."""
    family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.bind((request.param, 0))
        sock.settimeout(PATIENCE_S)
        yield sock


def answer(server: socket.socket, *datagrams: bytes) -> bytes:
    """Take a question, and answer it."""
    question, client = server.recvfrom(65536)
    for datagram in datagrams:
        server.sendto(datagram, client)
    return question


@pytest.mark.parametrize("data", [b"pong", b"", b"x" * 60000])
def test_any_answer_will_do_where_none_is_expected(server: socket.socket, data: bytes) -> None:
    with asking(check("udp", send=b"ping"), target_of(server)) as it:
        assert answer(server, data) == b"ping"
        assert it.outcome()[:2] == (True, "")


def test_an_expression_without_end_says_nothing_of_the_server(server: socket.socket) -> None:
    it = check("udp", send=b"ping", expect=rb"(y+y+)+z", is_pattern=True)
    with asking(it, target_of(server)) as asked:
        answer(server, b"y" * 100)
        assert asked.outcome().is_ours


def test_a_question_may_be_empty(server: socket.socket) -> None:
    with asking(check("udp"), target_of(server)) as it:
        assert answer(server, b"x") == b""
        assert it.outcome().is_good


def test_the_answer_may_be_one_of_several(server: socket.socket) -> None:
    with asking(check("udp", send=b"ping", expect=b"pong"), target_of(server)) as it:
        answer(server, b"po", b"ng", b"pong")
        assert it.outcome().is_good


def test_a_datagram_of_somebody_else_is_no_answer(server: socket.socket) -> None:
    with asking(check("udp", expect=b"pong", timeout_s=SHORT_S), target_of(server)) as it:
        _, client = server.recvfrom(100)
        with socket.socket(server.family, socket.SOCK_DGRAM) as other:
            other.sendto(b"pong", client)
        assert it.outcome()[:2] == (False, "no answer within 0.2 s")


def test_another_answer_is_shown(server: socket.socket) -> None:
    with asking(check("udp", expect=b"pong", timeout_s=SHORT_S), target_of(server)) as it:
        answer(server, b"what?\n", b"\x1b[2Jwhat?\n")
        assert it.outcome()[:2] == (False, "got '\\x1b[2Jwhat?'")


def test_a_server_that_does_not_stop_is_bad(server: socket.socket) -> None:
    with asking(check("udp", expect=b"pong"), target_of(server)) as it:
        _, client = server.recvfrom(100)

        def go_on() -> object:
            server.sendto(b"ping", client)
            return it.outcomes

        it.until(go_on)
        assert it.outcomes[0][:2] == (False, "got 'ping'")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("expect", [b"", b"pong"])
def test_a_refusal_is_bad(host: str, expect: bytes) -> None:
    outcome = ask(check("udp", expect=expect), target((host, 1)))
    assert (outcome.is_good, outcome.why, outcome.is_ours) == (False, "connection refused", False)


def test_a_refusal_of_a_later_datagram_counts(server: socket.socket) -> None:
    """Of the first one the server was still there; a program is restarted, say."""
    with asking(check("udp", expect=b"pong"), target_of(server)) as it:
        it.turn()
        server.close()
        it.probe._sock.send(b"again")  # type: ignore[attr-defined]
        assert it.outcome().why == "connection refused"


def test_silence_is_bad_only_where_an_answer_is_expected(server: socket.socket) -> None:
    outcome = ask(check("udp", send=b"x", timeout_s=SHORT_S), target_of(server))
    assert outcome[:2] == (True, "no answer, and none is expected")
    outcome = ask(check("udp", send=b"x", expect=b"y", timeout_s=SHORT_S), target_of(server))
    assert outcome[:2] == (False, "no answer within 0.2 s")


@needs_network
def test_a_host_that_is_not_there_is_bad() -> None:
    """Its router says so, or this host itself, by ARP: silence would be good."""
    with Namespace() as namespace:
        namespace.ip(
            "link add va type veth peer name vb",
            "link set va up",
            "link set vb up",
            "addr add 10.0.0.1/24 dev va",
        )
        asked = namespace.call(lambda: Asking(check("udp", send=b"x"), target(("10.0.0.9", 53))))
        outcome = asked.outcome()
        asked.loop.close()
        assert outcome[:2] == (False, "no route to host")


def test_the_way_there_is_that_of_the_rule(server: socket.socket) -> None:
    if server.family == socket.AF_INET6:
        return
    how = to_connect(SocketOptions(dscp=46), is_udp=True)[socket.AF_INET]
    with asking(check("udp"), target_of(server), how=how, source=("127.0.0.9", 0)) as it:
        _, client = server.recvfrom(100)
        assert client[0] == "127.0.0.9"
        sock = it.probe._sock  # type: ignore[attr-defined]
        assert sock.getsockopt(socket.IPPROTO_IP, socket.IP_TOS) == 46 << 2


@debian("dnsmasq", "dig")
def test_a_name_server_is_asked() -> None:
    with dns_server() as address:
        for is_udp in (True, False):
            assert ask(presets.dns(is_udp=is_udp), target(address)).is_good
