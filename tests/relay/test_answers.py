"""Rules that know how their upstream answers: by hand, and with dnsmasq, dig and curl."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from support import control
from support.by_hand import UdpBench, target_of
from support.configured import rule
from support.datagrams import drain, free_udp_address, numbered, udp, udp_client
from support.dns import ADDRESS, NAME, dig, dns_server
from support.ends import accept, listen, receive_exactly
from support.namespaces import network
from support.programs import debian
from support.waiting import PATIENCE_S, eventually

from forwarder.config.model import Answers, RelayMode
from forwarder.net.datagrams import SLOTS, SOL_UDP, UDP_SEGMENT
from forwarder.relay.udp.directions import BATCHES_PER_TURN
from forwarder.stats.rows import ATTEMPTS_FAILED, DATAGRAMS_DROPPED

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import StartForwarder
    from support.forwarder import Forwarder

ONE, ANY_PORT = Answers.ONE, Answers.ANY_PORT
HOSTS = ["127.0.0.1", "0.0.0.0", "::1"]


@pytest.fixture(params=["batched", "plain"])
def bench(request: pytest.FixtureRequest) -> Iterator[UdpBench]:
    bench = UdpBench(RelayMode.COPY if request.param == "plain" else RelayMode.AUTO)
    yield bench
    bench.close()


# -- one


@pytest.mark.parametrize("questions", [1, 2, 5])
def test_a_flow_ends_with_the_last_answer(bench: UdpBench, questions: int) -> None:
    upstream = bench.upstream()
    listener = bench.listen(bench.pool(upstream, answers=ONE))
    client = bench.client(listener)
    for round_ in range(3):
        for number in range(questions):
            client.send(b"%d %d" % (round_, number))
        bench.turn()
        for left in range(questions, 0, -1):
            assert bench.flows() == 1, left
            question, flow = upstream.recvfrom(100)
            upstream.sendto(question, flow)
            bench.turn()
            assert client.recv(100) == question
        assert bench.flows() == 0


def test_a_question_without_an_answer_keeps_the_flow_until_the_timeout(bench: UdpBench) -> None:
    upstream = bench.upstream()
    listener = bench.listen(bench.pool(upstream, answers=ONE, udp_timeout_s=5))
    client = bench.client(listener)
    client.send(b"lost")
    client.send(b"answered")
    bench.turn()
    upstream.sendto(b"answer", upstream.recvfrom(100)[1])
    bench.turn()
    assert bench.flows() == 1
    bench.loop.pass_time(6)
    assert bench.flows() == 0


def test_answers_of_equal_size_that_come_at_once_are_counted_each(bench: UdpBench) -> None:
    """As those of a socket with GRO would not be."""
    upstream = bench.upstream()
    listener = bench.listen(bench.pool(upstream, answers=ONE))
    client = bench.client(listener)
    for _ in range(40):
        client.send(b"question")
    bench.turn()
    flow = upstream.recvfrom(100)[1]
    for _ in range(39):
        upstream.sendto(b"answer", flow)
    bench.turn()
    assert bench.flows() == 1
    upstream.sendto(b"last", flow)
    bench.turn()
    assert drain(client) == [b"answer"] * 39 + [b"last"]
    assert bench.flows() == 0


def test_what_a_client_asks_while_its_last_answer_passes_is_asked(bench: UdpBench) -> None:
    """It has asked twice from its port, and asks again before the flow has gone."""
    upstream = bench.upstream()
    listener = bench.listen(bench.pool(upstream, answers=ONE))
    client = bench.client(listener)
    for _ in range(3):
        for content in (b"one", b"two"):
            client.send(content)
        bench.turn()
        flow = upstream.recvfrom(100)[1]
        assert drain(upstream) == [b"two"]
        for content in (b"1", b"2"):
            upstream.sendto(content, flow)
        client.send(b"three")
        bench.turn()
        question, flow = upstream.recvfrom(100)
        assert question == b"three"
        upstream.sendto(b"3", flow)
        bench.turn()
        assert drain(client) == [b"1", b"2", b"3"]
    assert bench.flows() == 0


def test_what_a_client_asks_of_a_listener_that_goes_is_asked(bench: UdpBench) -> None:
    """Also while the last answer to what it has asked before passes; then silence is the end."""
    upstream = bench.upstream()
    listener = bench.listen(bench.pool(upstream, answers=ONE))
    client = bench.client(listener)
    client.send(b"question")
    bench.turn()
    listener.stop()
    listener.sock.close()
    upstream.sendto(b"answer", upstream.recvfrom(100)[1])
    client.send(b"another")
    bench.turn()
    question, flow = upstream.recvfrom(100)
    assert question == b"another"
    upstream.sendto(b"another answer", flow)
    bench.turn()
    assert drain(client) == [b"answer", b"another answer"]
    bench.loop.pass_time(2)
    bench.relay.end_silent_flows(1.0)
    assert bench.flows() == 0


# -- any port


def first_question(
    bench: UdpBench, client: socket.socket, upstream: socket.socket
) -> tuple[str, int]:
    """Have a client ask; returns the address that its flow asks from."""
    client.send(b"read")
    bench.turn()
    question, flow = upstream.recvfrom(100)
    assert question == b"read"
    return flow[0], flow[1]


def other_port(bench: UdpBench, upstream: socket.socket) -> socket.socket:
    """Another socket at the address of an upstream."""
    return bench.own(udp(upstream.getsockname()[0]))


@pytest.mark.parametrize("host", HOSTS)
def test_who_answers_from_another_port_is_spoken_to_there(bench: UdpBench, host: str) -> None:
    """As TFTP: the answer, and what follows, both ways; strangers are dropped before and after."""
    upstream = bench.upstream()
    pool = bench.pool(upstream, answers=ANY_PORT)
    listener = bench.listen(pool, host)
    client = bench.client(listener)
    client.send(b"read")
    bench.turn()
    question, flow = upstream.recvfrom(100)
    assert question == b"read"
    answerer = other_port(bench, upstream)
    stranger = bench.own(udp("127.0.0.2"))
    stranger.sendto(b"evil", flow)
    answerer.sendto(b"block 1", flow)
    stranger.sendto(b"evil", flow)
    other_port(bench, upstream).sendto(b"too late", flow)
    bench.turn()
    stranger.sendto(b"evil", flow)
    for number in range(1, 5):
        assert drain(client) == [b"block %d" % number]
        client.send(b"ack %d" % number)
        bench.turn()
        assert answerer.recvfrom(100) == (b"ack %d" % number, flow)
        answerer.sendto(b"block %d" % (number + 1), flow)
        bench.turn()
    assert bench.flows() == 1
    assert drain(upstream) == []
    assert pool.counts[DATAGRAMS_DROPPED] == 3


def test_one_that_answers_from_its_own_port_is_a_flow_like_others(bench: UdpBench) -> None:
    upstream = bench.upstream()
    client = bench.client(bench.listen(bench.pool(upstream, answers=ANY_PORT)))
    for number in range(3):
        client.send(b"%d" % number)
        client.send(b"again")
        bench.turn()
        question, flow = upstream.recvfrom(100)
        assert (question, upstream.recv(100)) == (b"%d" % number, b"again")
        for text in (b"a", b"b"):
            upstream.sendto(text, flow)
        bench.turn()
        assert drain(client) == [b"a", b"b"]


def test_a_port_that_is_closed_ends_the_flow_and_the_next_one_begins_anew(bench: UdpBench) -> None:
    upstream = bench.upstream()
    client = bench.client(bench.listen(bench.pool(upstream, answers=ANY_PORT)))
    client.send(b"read")
    bench.turn()
    answerer = udp(upstream.getsockname()[0])
    answerer.sendto(b"block", upstream.recvfrom(100)[1])
    bench.turn()
    assert client.recv(100) == b"block"
    answerer.close()
    client.send(b"ack")
    bench.turn()
    assert bench.flows() == 0
    client.send(b"read again")
    bench.turn()
    assert upstream.recv(100) == b"read again"


def test_more_answers_than_a_turn_takes_end_nothing(bench: UdpBench) -> None:
    upstream = bench.upstream()
    client = bench.client(bench.listen(bench.pool(upstream, answers=ANY_PORT)))
    flow = first_question(bench, client, upstream)
    answerer = other_port(bench, upstream)
    answerer.sendto(b"first", flow)
    bench.turn()
    assert client.recv(100) == b"first"
    sent = numbered(BATCHES_PER_TURN * SLOTS + 10)
    for content in sent:
        answerer.sendto(content, flow)
    bench.turn()
    assert drain(client) == sent
    assert bench.flows() == 1


def test_first_answers_that_leave_as_one_stay_many(bench: UdpBench) -> None:
    """The upstream's UDP_SEGMENT, udp(7), meets a socket that looks who has sent what."""
    upstream = bench.upstream()
    client = bench.client(bench.listen(bench.pool(upstream, answers=ANY_PORT)))
    flow = first_question(bench, client, upstream)
    answerer = other_port(bench, upstream)
    sent = numbered(3, [500])
    size = struct.pack("=H", 500)
    answerer.sendmsg([b"".join(sent)], [(SOL_UDP, UDP_SEGMENT, size)], 0, flow)
    bench.turn()
    assert drain(client) == sent


def test_strangers_hold_up_no_other_flow_and_what_they_say_stays_out(
    bench: UdpBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than a turn takes, before and after the answer."""
    upstream = bench.upstream()
    pool = bench.pool(upstream, answers=ANY_PORT)
    client = bench.client(bench.listen(pool))
    flow = first_question(bench, client, upstream)
    stranger = bench.own(udp("127.0.0.2"))
    before, after = BATCHES_PER_TURN * SLOTS + 4, 2 * SLOTS
    for _ in range(before):
        stranger.sendto(b"evil", flow)
    other_port(bench, upstream).sendto(b"answer", flow)
    for _ in range(after):
        stranger.sendto(b"evil", flow)
    receives: list[int] = []
    receive_from = bench.relay.bench.batch.receive_from

    def counted(fd: int) -> int:
        receives.append(fd)
        return receive_from(fd)

    monkeypatch.setattr(bench.relay.bench.batch, "receive_from", counted)
    bench.relay.poller.turn()
    assert len(receives) <= BATCHES_PER_TURN
    bench.turn()
    assert drain(client) == [b"answer"]
    assert pool.counts[DATAGRAMS_DROPPED] == before + after


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a network namespace")
def test_an_answer_from_an_address_that_has_gone_is_no_bug(
    bench: UdpBench, caplog: pytest.LogCaptureFixture
) -> None:
    with network("10.9.9.1"):
        upstream = bench.upstream("10.9.9.1")
        pool = bench.pool(upstream, answers=ANY_PORT)
        client = bench.client(bench.listen(pool))
        flow = first_question(bench, client, upstream)
        upstream.sendto(b"answer", flow)
        subprocess.run(["ip", "address", "del", "10.9.9.1/32", "dev", "lo"], check=True)
        bench.turn()
        assert drain(client) == []
        assert pool.counts[DATAGRAMS_DROPPED] == 1
        assert bench.flows() == 1
        assert not caplog.records


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_dead_upstream_is_left_for_the_next_before_anybody_has_answered(
    bench: UdpBench, host: str
) -> None:
    """With what the client has said, as elsewhere; the socket is not connected yet."""
    alive = bench.upstream()
    pool = bench.pool(answers=ANY_PORT)
    with udp(host) as dead:
        pool.resolved = (target_of(dead), target_of(alive))
    client = bench.client(bench.listen(pool))
    flow = first_question(bench, client, alive)
    other_port(bench, alive).sendto(b"block", flow)
    bench.turn()
    assert client.recv(100) == b"block"
    assert pool.counts[ATTEMPTS_FAILED] == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_refusals_take_no_room_of_answers(bench: UdpBench, host: str) -> None:
    """Those of an upstream that is not left, being the only one."""
    with udp(host) as dead:
        pool = bench.pool(dead, answers=ANY_PORT)
    client = bench.client(bench.listen(pool))
    for _ in range(5):
        client.send(b"anybody?")
        bench.turn()
    assert pool.counts[ATTEMPTS_FAILED] == 5
    (flow,) = bench.relay.sessions
    assert flow.upstream is not None
    with pytest.raises(BlockingIOError), socket.socket(fileno=os.dup(flow.upstream.fileno())) as it:
        it.recvmsg(100, 100, socket.MSG_ERRQUEUE)


def test_strangers_do_not_vouch_for_an_upstream(bench: UdpBench) -> None:
    upstream = bench.upstream()
    pool = bench.pool(upstream, answers=ANY_PORT)
    pool.failures.note(target_of(upstream), "does not answer", 0.0)
    client = bench.client(bench.listen(pool))
    flow = first_question(bench, client, upstream)
    bench.own(udp("127.0.0.2")).sendto(b"evil", flow)
    bench.turn()
    assert pool.failures.known
    other_port(bench, upstream).sendto(b"block", flow)
    bench.turn()
    assert not pool.failures.known
    assert client.recv(100) == b"block"


# -- real servers and clients


def start(
    start_forwarder: StartForwarder, tmp_path: Path, upstream: tuple[str, int], more: str
) -> tuple[Forwarder, tuple[str, int]]:
    address = free_udp_address()
    path = tmp_path / "forwarder.toml"
    path.write_text(f'control = "{path}.sock"\n' + rule(address, upstream, more))
    return start_forwarder("-c", str(path)), address


DNS_OVER_TCP = 'protocol = "udptotcp"\nframing = "length"\nanswers = "one"'


@debian("dnsmasq", "dig")
@pytest.mark.parametrize("more", [DNS_OVER_TCP, 'protocol = "udp"\nanswers = "one"'])
def test_clients_of_a_name_server_that_allows_few_connections_are_all_answered(
    start_forwarder: StartForwarder, tmp_path: Path, more: str
) -> None:
    """dnsmasq serves 20 connections at once. A hundred clients, each of which stays."""
    with dns_server() as server, ExitStack() as stack:
        _, address = start(start_forwarder, tmp_path, server, more)
        assert dig(address, NAME) == ADDRESS
        name = b"".join(bytes([len(part)]) + part.encode() for part in NAME.split("."))
        for number in range(100):
            client = stack.enter_context(udp_client(address, "127.0.0.1"))
            query = number.to_bytes(2, "big") + b"\1\0\0\1\0\0\0\0\0\0" + name + b"\0\0\1\0\1"
            client.settimeout(PATIENCE_S)
            client.send(query)
            answer = client.recv(512)
            assert answer.startswith(number.to_bytes(2, "big"))
            assert answer.endswith(socket.inet_aton(ADDRESS))
        path = tmp_path / "forwarder.toml.sock"

        def totals() -> dict[str, int]:
            found = control.ask(path, "status")["totals"]
            assert isinstance(found, dict)
            return found

        eventually(lambda: totals()["sessions_total"] == 101, totals)
        eventually(lambda: totals()["sessions"] == 0, totals)


def test_a_connection_ends_with_the_last_answer(
    start_forwarder: StartForwarder, tmp_path: Path
) -> None:
    """Two questions, one answer: it stays. The other, in two pieces: it ends, by FIN."""
    with listen() as upstream:
        _, address = start(start_forwarder, tmp_path, upstream.getsockname(), DNS_OVER_TCP)
        with udp_client(address, "127.0.0.1") as client:
            client.send(b"one")
            client.send(b"two")
            with accept(upstream) as peer:
                assert receive_exactly(peer, 10) == b"\0\3one\0\3two"
                peer.sendall(b"\0\1b")
                assert client.recv(100) == b"b"
                client.send(b"three")
                assert receive_exactly(peer, 7) == b"\0\5three"
                peer.sendall(b"\0\1a\0")
                assert client.recv(100) == b"a"
                peer.sendall(b"\1c")
                assert client.recv(100) == b"c"
                assert peer.recv(1) == b""


@debian("dnsmasq", "curl")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can serve TFTP at its port")
def test_files_pass_by_tftp(start_forwarder: StartForwarder, tmp_path: Path) -> None:
    """dnsmasq serves, curl fetches: from other ports, block by block. Result: every byte."""
    server = "127.0.0.69"
    root = tmp_path / "tftp"
    root.mkdir(mode=0o755)
    content = os.urandom(300_000)
    (root / "boot").write_bytes(content)
    for directory in (tmp_path, *tmp_path.parents[:2], root):
        directory.chmod(0o755)
    with network():
        command = ["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--pid-file="]
        command += ["--port=0", "--user=root", f"--listen-address={server}", "--bind-interfaces"]
        command += ["--enable-tftp", f"--tftp-root={root}"]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as dnsmasq:
            try:
                _, address = start(
                    start_forwarder,
                    tmp_path,
                    (server, 69),
                    'protocol = "udp"\nanswers = "any-port"\ntimeout = 10',
                )
                url = "tftp://{}:{}/boot".format(*address)
                for _ in range(3):
                    fetched = subprocess.run(
                        [
                            "curl",
                            "--silent",
                            "--show-error",
                            "--retry",
                            "9",
                            "--max-time",
                            "60",
                            url,
                        ],
                        capture_output=True,
                        check=True,
                    )
                    assert fetched.stdout == content
            finally:
                dnsmasq.terminate()
