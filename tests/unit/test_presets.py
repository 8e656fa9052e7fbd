"""Checks in short: what they send, and which answers of real servers are good."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder.config import presets
from forwarder.config.check_values import parse_bytes
from forwarder.config.model import Check, CheckKind

DNS_UDP, DNS_TCP = presets.dns(is_udp=True), presets.dns(is_udp=False)
# As recorded: redis 7.0, PostgreSQL 15, Postfix 3.7, unbound 1.17, dnsmasq 2.90 without a server.
UNBOUND = b"fw\x85\x80\x00\x01\x00\x01\x00\x00\x00\x00\x00\x00\x02\x00\x01"
REFUSED = b"fw\x81\x85\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\x01"
SERVFAIL = b"fw\x81\x82\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\x01"


def is_good(check: Check, answer: bytes) -> bool:
    assert check.is_pattern
    return re.search(check.expect, answer) is not None


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (
            presets.PRESETS["redis"],
            [b"+PONG\r\n", b"-NOAUTH Authentication required.\r\n"],
            [b"-LOADING Redis is loading the dataset in memory\r\n", b"-DENIED Redis is", b"+PON"],
        ),
        (
            presets.PRESETS["smtp"],
            [b"220 mail.example ESMTP Postfix\r\n", b"220-mail.example\r\n220 ESMTP\r\n"],
            [b"421 4.3.2 too busy\r\n", b"554 no\r\n220 x", b"220"],
        ),
        (presets.PRESETS["pgsql"], [b"N", b"S"], [b"E\x00\x00\x00(could not fork", b"HTTP", b""]),
        (DNS_UDP, [UNBOUND, REFUSED], [SERVFAIL, DNS_UDP.send, UNBOUND[1:], UNBOUND[:3]]),
        (
            DNS_TCP,
            [b"\x00\x11" + UNBOUND, b"\x00\x11" + REFUSED],
            [b"\x00\x11" + SERVFAIL, DNS_TCP.send, UNBOUND],
        ),
    ],
    ids=["redis", "smtp", "pgsql", "dns by UDP", "dns by TCP"],
)
def test_an_answer_is_good_or_bad(check: Check, good: list[bytes], bad: list[bytes]) -> None:
    assert [is_good(check, answer) for answer in good] == [True] * len(good)
    assert [is_good(check, answer) for answer in bad] == [False] * len(bad)


def test_what_is_sent_is_as_the_protocols_have_it() -> None:
    assert presets.PRESETS["redis"].send == b"PING\r\n"
    # SSLRequest: eight bytes, of which the last four are 80877103.
    sent = presets.PRESETS["pgsql"].send
    assert (int.from_bytes(sent[:4]), int.from_bytes(sent[4:])) == (8, 80877103)
    assert presets.PRESETS["smtp"].send == b""  # its servers speak first
    # One question, for the root, of type NS and class IN; recursion is desired.
    question = DNS_UDP.send
    assert (question[2:12], question[12:]) == (
        bytes([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]),
        bytes([0, 0, 2, 0, 1]),
    )
    assert DNS_TCP.send == len(question).to_bytes(2) + question


def test_a_check_of_mysql_is_not_seen_by_the_server() -> None:
    """It would block this host, and so all clients."""
    assert presets.PRESETS["mysql"] == Check(kind=CheckKind.TCP)


def test_the_login_of_the_documentation_is_one() -> None:
    """As MariaDB has it: a response to its greeting, of a user without a password, and goodbye."""
    page = (Path(__file__).parents[2] / "docs/configuration.md").read_text()
    found = re.search(r"^send = '(\+.*)'$", page, re.MULTILINE)
    assert found is not None
    sent = parse_bytes(found[1])
    long_password, protocol_41, secure_connection, utf8 = 0x1, 0x200, 0x8000, 33
    flags = long_password | protocol_41 | secure_connection
    login = struct.pack("<IIB23x", flags, 1 << 24, utf8) + b"forwarder\0\0"
    assert sent == struct.pack("<I", len(login) | 1 << 24) + login + b"\x01\0\0\0\x01"


@given(st.integers(0, 255))
def test_of_all_codes_only_servfail_is_bad(flags: int) -> None:
    answer = b"fw\x81" + bytes([flags]) + UNBOUND[4:]
    assert is_good(DNS_UDP, answer) is (flags & 15 != 2)


@pytest.mark.parametrize(
    ("url", "port", "host", "path"),
    [
        ("http://:8008/primary", 8008, "", "/primary"),
        ("http://:8008", 8008, "", "/"),
        ("http://", 0, "", "/"),
        ("http:///health?deep=1", 0, "", "/health?deep=1"),
        ("http://app.example/health", 0, "app.example", "/health"),
        ("http://[::1]:80/", 80, "::1", "/"),
    ],
)
def test_a_url_says_what_is_asked_for(url: str, port: int, host: str, path: str) -> None:
    check = presets.parse_url(url)
    assert check == Check(kind=CheckKind.HTTP, port=port, host=host, path=path)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("ftp://:21/", "is not a URL of the form"),
        ("http://:8008/a#b", "is not a URL of the form"),
        ("http://:8008/a b", "is not a path"),
        ("http://:8008/\r\nX: y", "is not a path"),
        ("http://:99999/", "'99999' is not a port number"),
        ("http://user@app.example/", "is neither an IP address nor a host name"),
        ("https://:8443/", "does not say which host to ask for"),
    ],
)
def test_a_url_that_is_none_says_why(url: str, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        presets.parse_url(url)


def test_https_is_the_same_request_by_tls() -> None:
    check = presets.parse_url("https://app.example:8443/health")
    assert (check.kind, check.port, check.host) == (CheckKind.TLS, 8443, "app.example")
    rest = b"\r\nConnection: close\r\n\r\n"
    assert check.send == b"GET /health HTTP/1.1\r\nHost: app.example:8443" + rest
    for url in ("https://[::1]/health", "https://[::1]:443/health"):
        assert presets.parse_url(url).send == b"GET /health HTTP/1.1\r\nHost: [::1]" + rest
    assert is_good(check, b"HTTP/1.1 200 OK\r\n")
    assert is_good(check, b"HTTP/1.0 299 \r\n")
    assert not is_good(check, b"HTTP/1.1 503 Service Unavailable\r\n\r\nHTTP/1.1 200 OK")


@given(
    st.lists(st.tuples(st.integers(100, 599), st.integers(100, 599)), min_size=1, max_size=3),
    st.integers(100, 599),
)
def test_codes_of_https_are_those_that_were_said(status: list[tuple[int, int]], code: int) -> None:
    ranges = tuple((min(two), max(two)) for two in status)
    check = presets.by_tls(Check(kind=CheckKind.HTTP, host="x", status=ranges))
    answer = f"HTTP/1.1 {code} X\r\n".encode()
    assert is_good(check, answer) is any(first <= code <= last for first, last in ranges)
