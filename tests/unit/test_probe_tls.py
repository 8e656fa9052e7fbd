"""Checks over TLS, of a server in this process and of OpenSSL's."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.probing import SHORT_S, Asking, accept, ask, asking, check, target, target_of
from support.waiting import eventually

from forwarder.checker.probes import certificate, tls
from forwarder.config import presets
from forwarder.config.model import Check, CheckKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from forwarder.checker.outcome import Outcome

DAY_S = 86400
VALID = ("-days", "30")


class Keys:
    """Certificates by OpenSSL, each signed by itself, for app.example and ::1."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def make(self, *options: str, host: str = "app.example") -> str:
        """A file with a key and its certificate."""
        file = self._path / f"{len(list(self._path.iterdir()))}.pem"
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt"),
                *("ec_paramgen_curve:prime256v1", "-nodes", "-subj", f"/CN={host}"),
                *("-addext", f"subjectAltName=DNS:{host},IP:::1", *options),
                *("-keyout", str(file), "-out", f"{file}.crt"),
            ],
            check=True,
            capture_output=True,
        )
        with file.open("a") as out:
            out.write((file.parent / f"{file.name}.crt").read_text())
        return str(file)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    if shutil.which("openssl") is None:
        pytest.skip("not installed: openssl")
    return Keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def valid(keys: Keys) -> str:
    return keys.make(*VALID)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


class Server:
    """The server's side of one connection, without a thread: bytes go by way of the test."""

    def __init__(self, pem: str, **options: object) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)
        self.asked_for: list[str | None] = []
        context.sni_callback = lambda _, name, __: self.asked_for.append(name)
        for name, value in options.items():
            setattr(context, name, value)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self.has_ended = False

    def do(self, peer: socket.socket, act: Callable[[], object]) -> object:
        """Do something once it can be done, or None: it cannot yet. Moves bytes both ways."""
        peer.setblocking(False)
        try:
            data = peer.recv(65536)
            self._incoming.write(data)
            self.has_ended = self.has_ended or not data
        except BlockingIOError:
            pass
        try:
            return act() or True
        except ssl.SSLWantReadError:
            return None
        finally:
            if self._outgoing.pending:
                peer.sendall(self._outgoing.read())


def shake_hands(it: Asking, peer: socket.socket, server: Server) -> None:
    """Do the handshake with a check."""
    it.until(lambda: server.do(peer, server.tls.do_handshake))


def ask_server(it: Asking, listener: socket.socket, server: Server) -> Outcome:
    """How a check ends with a server that only shakes hands."""
    with accept(it, listener) as peer:

        def go_on() -> object:
            with suppress(ssl.SSLError, OSError):  # the check has refused it
                server.do(peer, server.tls.do_handshake)
            return it.outcomes

        it.until(go_on)
    return it.outcome()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_handshake_is_good_whatever_the_certificate(
    listener: socket.socket, valid: str, version: ssl.TLSVersion
) -> None:
    server = Server(valid, maximum_version=version)
    with asking(check("tls"), target_of(listener), server="db.example:5432") as it:
        outcome = ask_server(it, listener, server)
    assert outcome[:2] == (True, "its certificate ends in 29 days")
    assert server.asked_for == ["db.example"]


@pytest.mark.parametrize(
    ("fields", "server", "name"),
    [
        ({"host": "app.example"}, "10.0.0.1:443", "app.example"),
        ({}, "app.example.:443", "app.example"),
        ({}, "10.0.0.1:443", None),
        ({}, "[::1]:443", None),
        ({}, "unix:/run/x", None),
    ],
)
def test_the_name_in_the_handshake(
    listener: socket.socket, valid: str, fields: dict[str, str], server: str, name: str | None
) -> None:
    end = Server(valid)
    with asking(check("tls", **fields), target_of(listener), server=server) as it:
        assert ask_server(it, listener, end).is_good
    assert end.asked_for == [name]


@pytest.mark.parametrize(
    ("server", "why"),
    [
        ("app.example:443", ""),
        ("[::1]:443", ""),
        ("db.example:443", "tls: hostname mismatch, certificate is not valid for 'db.example'"),
        ("10.0.0.1:443", "tls: IP address mismatch, certificate is not valid for '10.0.0.1'"),
    ],
)
def test_a_certificate_that_is_verified_has_to_be_the_servers(
    listener: socket.socket,
    valid: str,
    monkeypatch: pytest.MonkeyPatch,
    server: str,
    why: str,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", f"{valid}.crt")
    tls.context.cache_clear()
    with asking(check("tls", is_verified=True), target_of(listener), server=server) as it:
        outcome = ask_server(it, listener, Server(valid))
    tls.context.cache_clear()
    assert (outcome.is_good, outcome.is_ours) == (not why, False)
    assert outcome.why == (why or "its certificate ends in 29 days")


def test_a_certificate_of_nobody_is_bad_where_it_is_verified(
    listener: socket.socket, valid: str
) -> None:
    given = check("tls", is_verified=True)
    with asking(given, target_of(listener), server="app.example:443") as it:
        outcome = ask_server(it, listener, Server(valid))
    assert outcome[:2] == (False, "tls: self-signed certificate")


def test_a_text_is_sent_and_answered_by_tls(listener: socket.socket, valid: str) -> None:
    server = Server(valid)
    with (
        asking(check("tls", send=b"PING\r\n", expect=b"+PONG"), target_of(listener)) as it,
        accept(it, listener) as peer,
    ):
        shake_hands(it, peer, server)
        heard: list[object] = []

        def hear() -> object:
            heard.append(server.do(peer, lambda: server.tls.read(100)))
            return heard[-1]

        it.until(hear)
        assert heard[-1] == b"PING\r\n"
        for piece in (b"+PO", b"NG"):
            assert it.outcomes == []
            server.do(peer, partial(server.tls.write, piece))
        assert it.outcome()[:2] == (True, "its certificate ends in 29 days")
        # An end that a server takes for one, and then no reset.
        it.until(lambda: server.do(peer, lambda: server.tls.read(1) == b""))
        it.until(lambda: server.do(peer, lambda: server.has_ended) and server.has_ended)


def test_another_answer_by_tls_is_shown(listener: socket.socket, valid: str) -> None:
    server = Server(valid)
    with (
        asking(check("tls", expect=b"+PONG"), target_of(listener)) as it,
        accept(it, listener) as peer,
    ):
        shake_hands(it, peer, server)
        server.do(peer, lambda: server.tls.write(b"-ERR\r\n"))
        it.turn()
        server.do(peer, server.tls.unwrap)
        assert it.outcome()[:2] == (False, "got '-ERR', then closed")


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "no TLS: got 'HTTP/1.1 400 Bad Request'"),
        (b"220 mail.example ESMTP\r\n", "no TLS: got '220 mail.example ESMTP'"),
        (b"\x15\x03\x01\x00\x02\x02\x46", "tls: tlsv1 alert protocol version"),
        (b"\x15\x03\x01\x00\x02\x02\x28", "tls: sslv3 alert handshake failure"),
    ],
)
def test_a_server_that_shakes_no_hands_is_bad(
    listener: socket.socket, answer: bytes, why: str
) -> None:
    with asking(check("tls"), target_of(listener)) as it, accept(it, listener) as peer:
        peer.sendall(answer)
        assert it.outcome()[:2] == (False, why)


def test_a_server_that_is_silent_or_goes_is_bad(listener: socket.socket) -> None:
    given = check("tls", timeout_s=SHORT_S)
    with asking(given, target_of(listener)) as it, accept(it, listener):
        assert it.outcome()[:2] == (False, "no handshake of TLS within 0.2 s")
    with asking(check("tls"), target_of(listener)) as it:
        accept(it, listener).close()
        why = it.outcome().why
        assert why in (
            "closed in the handshake of TLS",
            "connection reset by peer in the handshake of TLS",
        )


def test_a_server_may_go_at_each_point_of_the_handshake(
    listener: socket.socket, valid: str
) -> None:
    """Each time some bytes later, until it has sent enough."""
    is_complete = False
    count = 0
    while not is_complete:
        server = Server(valid)
        with (
            asking(check("tls", expect=b"x"), target_of(listener)) as it,
            accept(it, listener) as peer,
        ):
            hello: list[bytes] = []
            it.until(partial(take, peer, hello))
            server._incoming.write(b"".join(hello))
            with pytest.raises(ssl.SSLWantReadError):
                server.tls.do_handshake()
            flight = server._outgoing.read()
            peer.setblocking(True)
            peer.sendall(flight[:count])
            peer.shutdown(socket.SHUT_WR)
            outcome = it.outcome()
        is_complete = count >= len(flight)
        ends = "closed without an answer" if is_complete else "closed in the handshake of TLS"
        assert outcome[:2] == (False, ends)
        count += 97


def take(peer: socket.socket, into: list[bytes]) -> bool:
    """Read what there is, without waiting; returns whether there is something."""
    peer.setblocking(False)
    try:
        into.append(peer.recv(65536))
    except BlockingIOError:
        return False
    return True


def test_a_server_that_does_not_stop_is_bad(listener: socket.socket, valid: str) -> None:
    """It sends records without anything in them, or one letter in each."""
    server = Server(valid)
    with (
        asking(check("tls", expect=b"never"), target_of(listener)) as it,
        accept(it, listener) as peer,
    ):
        shake_hands(it, peer, server)
        for _ in range(tls._MOST_RAW_BYTES // 20):
            server.tls.write(b"x")
        flood = server._outgoing.read()
        sent = 0

        def go_on() -> object:
            nonlocal sent
            try:
                sent += peer.send(flood[sent : sent + 65536])
            except BlockingIOError:
                pass
            except OSError:
                assert it.outcomes
            return it.outcomes

        it.until(go_on)
        assert it.outcome().why in ("sent more than 512 KiB", f"got '{'x' * 80}...'")


def test_a_name_that_tls_cannot_say_is_no_fault_of_a_server(listener: socket.socket) -> None:
    with asking(check("tls", host=".example"), target_of(listener)) as it:
        outcome = it.outcome()
    assert (outcome.is_good, outcome.is_ours) == (False, True)
    assert outcome.why.startswith("cannot ask by TLS: ")


@pytest.mark.parametrize(("status", "why"), [(((200, 299),), ""), (((500, 599),), "got 'HTTP")])
def test_a_check_of_kind_https_asks_openssl(
    valid: str, status: tuple[tuple[int, int], ...], why: str
) -> None:
    """Its s_server answers each GET by 200."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()
    with subprocess.Popen(
        ["openssl", "s_server", "-accept", f"{address[0]}:{address[1]}", "-cert", valid, "-www"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            eventually(lambda: can_connect(address), "s_server does not listen")
            http = Check(kind=CheckKind.HTTP, host="app.example", status=status)
            outcome = ask(presets.by_tls(http), target(address))
            assert outcome.is_good is (not why)
            assert outcome.why.startswith(why or "its certificate ends in 29 days")
        finally:
            process.kill()


def can_connect(address: tuple[str, int]) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(address) == 0


# -- certificates


@pytest.mark.parametrize("days", [1, 30, 365, 9000, 40000])
def test_when_a_certificate_ends(keys: Keys, days: int) -> None:
    """Years from 2050 on are written in another way."""
    pem = keys.make("-days", str(days))
    der = ssl.PEM_cert_to_DER_cert(Path(f"{pem}.crt").read_text())
    printed = subprocess.run(
        ["openssl", "x509", "-in", f"{pem}.crt", "-noout", "-enddate"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert certificate.ends_at(der) == ssl.cert_time_to_seconds(printed.strip().partition("=")[2])
    now = time.time()
    assert certificate.remark(der, now) == f"its certificate ends in {days - 1} days"
    assert certificate.remark(der, now + (days + 3) * DAY_S) == "its certificate ended 4 days ago"


@given(st.binary(max_size=200))
def test_what_is_no_certificate_says_nothing(der: bytes) -> None:
    end = certificate.ends_at(der)
    assert end is None or isinstance(end, float)
    assert certificate.remark(b"", 0.0) == certificate.remark(None, 0.0) == ""


@pytest.mark.parametrize("change", ["cut", "turned"])
def test_a_certificate_that_is_broken_is_no_error(valid: str, change: str) -> None:
    der = ssl.PEM_cert_to_DER_cert(Path(f"{valid}.crt").read_text())
    for at in range(len(der)):
        broken = der[:at] if change == "cut" else der[:at] + bytes([der[at] ^ 0xFF]) + der[at + 1 :]
        assert certificate.remark(broken, 0.0).isprintable()
