"""Checks in short: names of protocols and URLs, for what is sent and has to come back. Pure."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from forwarder.config.address import AddressError, parse_host, parse_port
from forwarder.config.model import Check, CheckKind

if TYPE_CHECKING:
    from collections.abc import Iterator

# RFC 1035 4.1: an id, RD, one question, and no other records; the root, NS, IN.
_DNS_QUESTION: Final = b"\x66\x77\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\x01"
# The same id, a response, any code but SERVFAIL: a server that refuses to recurse answers, too.
_DNS_ANSWER: Final = rb"fw[\x80-\xff][^" + b"".join(b"\\x%x2" % high for high in range(16)) + b"]"

PRESETS: Final = {
    # One that asks for a password first is alive; one that still loads is not.
    "redis": Check(
        kind=CheckKind.TCP, send=b"PING\r\n", expect=rb"\A(?:\+PONG|-NOAUTH )", is_pattern=True
    ),
    # RFC 5321 3.1. A greeting may have several lines.
    "smtp": Check(kind=CheckKind.TCP, expect=rb"\A220[ -]", is_pattern=True),
    # SSLRequest, whose answer is one byte before any authentication (PostgreSQL, "SSL Session
    # Encryption"). An E for an error comes from a server that cannot start another process.
    "pgsql": Check(
        kind=CheckKind.TCP,
        send=b"\x00\x00\x00\x08\x04\xd2\x16\x2f",
        expect=rb"\A[SN]",
        is_pattern=True,
    ),
    # No more than a handshake: MySQL counts each connection that ends before a login against its
    # host, and refuses the host after max_connect_errors of them (100), the clients' as well.
    # MariaDB 10.11 blocked a checker that only read its greeting; it sees nothing of this one.
    "mysql": Check(kind=CheckKind.TCP),
}
"""Checks by the name of a protocol, but :data:`DNS`, which has two."""

DNS: Final = "dns"
HTTPS: Final = "https"
KINDS: Final = (*(kind.value for kind in CheckKind), HTTPS, *PRESETS, DNS)
"""All that a check may be called."""

_SHORT: Final = [f'"{kind}"' for kind in KINDS if kind not in {"agent", "command", HTTPS}]
SHORT_FORMS: Final = f'{", ".join(_SHORT)}, a URL such as "http://:8008/health", or a table'

_HTTPS_PORT: Final = 443
_BY_TLS: Final = Check(kind=CheckKind.TLS)
_URL: Final = re.compile(
    r"(https?)://(\[[^\]/?#]*\]|[^:/?#\[\]]*)(?::([0-9]*))?((?:/[^#]*)?)", re.ASCII
)
# What may stand in the first line of a request; RFC 9112 3.
_PATH: Final = re.compile(r"/[!-~]*")
_MOST_PATH: Final = 2000  # arbitrary
PATH_FORMS: Final = "a path from / on, without blanks, such as /health"


def dns(*, is_udp: bool) -> Check:
    """The check of a name server by its answer to the question for the root's own servers."""
    if is_udp:
        return Check(
            kind=CheckKind.UDP, send=_DNS_QUESTION, expect=rb"\A" + _DNS_ANSWER, is_pattern=True
        )
    # RFC 1035 4.2.2: two bytes of length before each message.
    return Check(
        kind=CheckKind.TCP,
        send=len(_DNS_QUESTION).to_bytes(2, "big") + _DNS_QUESTION,
        expect=rb"\A[\x00-\xff]{2}" + _DNS_ANSWER,
        is_pattern=True,
    )


def parse_path(value: object) -> str:
    """Read the path of a request. Raises ValueError."""
    if not isinstance(value, str) or not _PATH.fullmatch(value) or len(value) > _MOST_PATH:
        raise ValueError("is not a path")
    return value


def parse_url(text: str) -> Check:
    """Read ``http://[HOST][:PORT][/PATH]``: HOST is said and not looked up. Raises ValueError.

    ``https`` is the same on a TLS connection: :func:`by_tls`.
    """
    found = _URL.fullmatch(text)
    if found is None:
        raise ValueError("is not a URL of the form http://[HOST][:PORT][/PATH]")
    scheme, host, port_text, path = found[1], found[2], found[3], found[4] or "/"
    try:
        host = parse_host(host) if host else ""
        port = parse_port(port_text) if port_text else 0
    except AddressError as error:
        raise ValueError(f"has a mistake: {error}") from None
    check = Check(kind=CheckKind.HTTP, port=port, host=host, path=parse_path(path))
    return check if scheme == "http" else by_tls(check)


def by_tls(check: Check) -> Check:
    """A check of kind HTTP as one of kind TLS, with its request as text. Raises ValueError.

    It has to have a host: one text is sent to all servers.
    """
    if not check.host:
        raise ValueError("does not say which host to ask for, which https needs")
    host = f"[{check.host}]" if ":" in check.host else check.host
    if check.port not in (0, _HTTPS_PORT):
        host += f":{check.port}"  # RFC 9110 7.2
    request = f"GET {check.path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    return replace(
        check,
        kind=CheckKind.TLS,
        path=_BY_TLS.path,
        status=_BY_TLS.status,
        send=request.encode(),
        expect=rb"\AHTTP/1\.[01] (?:%b)[ \r]" % b"|".join(_codes(check.status)),
        is_pattern=True,
    )


def _codes(status: tuple[tuple[int, int], ...]) -> Iterator[bytes]:
    """Patterns of the codes, with one for each hundred that is complete."""
    good = {code for first, last in status for code in range(first, last + 1)}
    for hundred in range(1, 6):
        codes = range(100 * hundred, 100 * hundred + 100)
        if good.issuperset(codes):
            yield b"%d[0-9]{2}" % hundred
        else:
            yield from (b"%d" % code for code in codes if code in good)
