"""The address a rule names: a host (literal or name) and ports, or a unix socket.

Parsing and formatting only: does not resolve names and knows no sockets.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import TypeAlias

MAX_PORT = 65535

# RFC 952/1123 labels, with the underscore that real networks use; the last label may not be all
# digits, or 1.2.3.400 would pass as a name.
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOSTNAME = re.compile(rf"(?:{_LABEL}\.)*(?![0-9]+\.?$){_LABEL}\.?")

# ipaddress takes ten times as long, which shows in a file of ten thousand rules.
_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4 = re.compile(rf"{_OCTET}\.{_OCTET}\.{_OCTET}\.{_OCTET}")

# What Linux lets an interface be called (15 characters, no blank, no slash), less the characters
# that would make an address ambiguous in a log line or a configuration.
_SCOPE = re.compile(r"[A-Za-z0-9_.@+=~-]{1,15}")

# A transport where an address belongs, as other programs write it: udp://HOST:PORT, HOST:PORT/udp.
_BEFORE = re.compile(r"(tcp|udp):(?://)?", re.IGNORECASE)
_BEHIND = re.compile(r"(?:/(tcp|udp)|/)$", re.IGNORECASE)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://([^/]*).*", re.DOTALL)
PORTS = re.compile(r"[0-9]+(?:-[0-9]+)?")

_UNIX = "unix:"
# Before the name of a service, whose records say which hosts and ports have it (RFC 2782).
SRV = "srv:"
SERVICE_FORMS = "srv:_SERVICE._PROTOCOL.DOMAIN"
# What sun_path takes, less the NUL at the end of a path or at the beginning of a name (unix(7)).
MAX_UNIX_BYTES = 107

ADDRESS_FORMS = (
    "HOST:PORT, IPv4:PORT, [IPv6]:PORT, *:PORT or PORT, with FIRST-LAST for a range of ports, "
    "unix:/PATH or unix:@NAME"
)
UPSTREAM_FORMS = (
    "HOST:PORT, IPv4:PORT or [IPv6]:PORT, with FIRST-LAST for a range of ports, "
    "unix:/PATH or unix:@NAME"
)


class AddressError(ValueError):
    """A text that is no address; the message says what is wrong with it, ``hint`` what to write."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True, slots=True, order=True)
class Address:
    """A host and a port, or a range of ports.

    ``host`` is an IPv4 or IPv6 literal (without brackets, perhaps with a ``%scope``) in its one
    spelling, or a name.
    ``port`` is 1 to 65535; 0 is left to the caller, who may mean "any free port".
    ``ports`` is how many ports there are, from ``port`` on; more than one is a range.
    A service, whose hosts and ports others have to be asked for, is a host ``srv:NAME`` and port 0.
    """

    host: str
    port: int
    ports: int = 1

    def __str__(self) -> str:
        if self.is_service:
            return self.host
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{format_ports(self.port, self.ports)}"

    @property
    def is_literal(self) -> bool:
        """Whether the host is an IP address and needs no resolver."""
        return is_ip(self.host)

    @property
    def is_service(self) -> bool:
        """Whether it is the name of a service, not of a host."""
        return self.host.startswith(SRV)

    @property
    def last_port(self) -> int:
        """The last port of the range, or the only one."""
        return self.port + self.ports - 1


@dataclass(frozen=True, slots=True, order=True)
class UnixAddress:
    """A unix stream socket: an absolute path, or ``@name`` in the abstract namespace (unix(7))."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"

    @property
    def is_literal(self) -> bool:
        """Whether it needs no resolver, as it never does."""
        return True

    @property
    def is_service(self) -> bool:
        """Whether it is the name of a service, as it never is."""
        return False


Endpoint: TypeAlias = Address | UnixAddress
"""What a rule may listen on or lead to."""


def is_ip(host: str) -> bool:
    """Whether ``host`` is an IPv4 or IPv6 literal (a ``%scope`` is allowed on IPv6)."""
    return bool(_IPV4.fullmatch(host)) or _ipv6(host) is not None


def _ipv6(text: str) -> ipaddress.IPv6Address | None:
    if ":" not in text:
        return None
    try:
        ip = ipaddress.IPv6Address(text)
    except ValueError:
        return None
    _, percent, scope = text.partition("%")
    return ip if not percent or _SCOPE.fullmatch(scope) else None


def _spell(ip: ipaddress.IPv6Address) -> str:
    """The one spelling of an address, however it was written. Raises AddressError.

    An IPv4 address mapped to IPv6 (RFC 4291 section 2.5.5.2) is that IPv4 address: sockets of IPv6
    only cannot be bound to it.
    """
    scope = ip.scope_id
    if scope is None:
        return str(ip.ipv4_mapped or ip)
    if ip.ipv4_mapped is not None:
        raise AddressError(f"'{ip}': an IPv4 address has no interface; write {ip.ipv4_mapped}")
    if ip.is_unspecified:  # the kernel would listen on all interfaces
        raise AddressError(f"'{ip}': write :: and device = \"{scope}\"")
    return str(ip)


def parse_host(text: str) -> str:
    """Check a host and return it in the form the model keeps: of a literal, its one spelling.

    ``*`` becomes ``::`` (every address, IPv4 and IPv6), ``0`` becomes ``0.0.0.0`` as in rinetd,
    ``::ffff:10.0.0.1`` becomes ``10.0.0.1``; brackets around an IPv6 literal are taken off. Raises
    AddressError.
    """
    if text == "*":
        return "::"
    if text == "0":
        return "0.0.0.0"
    if _IPV4.fullmatch(text):
        return text
    is_bracketed = text.startswith("[") and text.endswith("]")
    ip = _ipv6(text[1:-1] if is_bracketed else text)
    if ip is not None:
        return _spell(ip)
    if is_bracketed:
        raise AddressError(f"{text[1:-1]!r} in brackets is not an IPv6 address")
    if len(text) <= 253 and _HOSTNAME.fullmatch(text):
        return text
    raise AddressError(f"{text!r} is neither an IP address nor a host name")


def canonical_host(host: str) -> str:
    """One spelling for hosts that are the same without asking a resolver.

    Literals have theirs already; ``Example.com.`` and ``example.com`` are one name.
    """
    return host if ":" in host else host.lower().rstrip(".")


def parse_port(text: str, *, lowest: int = 1) -> int:
    """Check a decimal port number. Raises AddressError."""
    # The length comes first: int() refuses thousands of digits with an error of its own.
    is_number = len(text) <= 5 and text.isascii() and text.isdigit()
    if not is_number or not lowest <= int(text) <= MAX_PORT:
        raise AddressError(f"{text!r} is not a port number from {lowest} to {MAX_PORT}")
    return int(text)


def format_ports(first: int, count: int) -> str:
    """Ports as they are written: ``80`` or ``8000-8999``."""
    return str(first) if count == 1 else f"{first}-{first + count - 1}"


def parse_ports(text: str) -> tuple[int, int]:
    """Read ``PORT`` or ``FIRST-LAST``; return the first and how many there are.

    Raises AddressError.
    """
    first_text, dash, last_text = text.partition("-")
    first = parse_port(first_text)
    if not dash:
        return first, 1
    last = parse_port(last_text)
    if last < first:
        raise AddressError(f"the range {text} ends before it begins")
    return first, last - first + 1


def parse_address(text: str) -> Address:
    """Read a host and its ports; a bare ``:PORT`` means ``*:PORT``. Raises AddressError."""
    _refuse_url(text)
    host, colon, ports = text.rpartition(":")
    if not colon:
        is_host = is_ip(text) or _HOSTNAME.fullmatch(text) is not None
        raise AddressError(f"{text!r} has no port", f"write {text}:PORT" if is_host else "")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise _colons(text, host, ports)
    return Address(parse_host(host or "*"), *parse_ports(ports))


def _colons(text: str, host: str, ports: str) -> AddressError:
    """What is wrong with a host that has colons and no brackets."""
    if not is_ip(host) and is_ip(text):
        return AddressError(f"{text!r} has no port", f"write [{text}]:PORT")
    hint = f"write [{host}]:{ports}" if is_ip(host) else ""
    return AddressError(f"{text!r}: an IPv6 address needs brackets before its port", hint)


def _refuse_url(text: str) -> None:
    """Raise AddressError for a URL, which is of another layer."""
    url = _URL.fullmatch(text)
    if url is not None:
        address = url[1] if ":" in url[1] else f"{url[1]}:PORT"
        raise AddressError(f"{text!r} is a URL", f"write {address}")


def split_transport(text: str) -> tuple[str, str]:
    """Take ``tcp`` or ``udp`` off an address: ``udp:A``, ``udp://A`` or ``A/udp``.

    Returns the transport, or "", and the address. Raises AddressError if two differ.
    """
    found = _BEFORE.match(text)
    first = found[1].lower() if found else ""
    rest = text[found.end() :] if found else text
    behind = None if rest.startswith(_UNIX) else _BEHIND.search(rest)
    last = (behind[1] or "").lower() if behind else ""
    if not (first or last):
        return "", text
    if first and last and first != last:
        raise AddressError(f"{text!r} says both {first} and {last}")
    return first or last, rest[: behind.start()] if behind else rest


def parse_unix(path: str) -> UnixAddress:
    """Check the path of a unix socket, or its ``@NAME``. Raises AddressError."""
    if not path.isprintable():  # such as bytes of a command line that are not UTF-8
        raise AddressError(f"{path!r} has characters that no path should have")
    if len(path.encode()) - path.startswith("@") > MAX_UNIX_BYTES:
        raise AddressError(
            f"the path {path[:40]!r}... has more than the {MAX_UNIX_BYTES} bytes that a unix socket"
            " may have"
        )
    if path.startswith("@"):
        if path == "@":
            raise AddressError("'unix:@' has no name")
    elif not path.startswith("/"):
        raise AddressError(f"'unix:{path}' is neither an absolute path nor an @NAME")
    elif path.endswith(("/", "/.", "/..")):
        raise AddressError(f"'unix:{path}' names a directory")
    return UnixAddress(path)


def parse_service(text: str) -> Address:
    """Read ``srv:NAME``. Raises AddressError."""
    name = text.removeprefix(SRV)
    if len(name) <= 253 and _HOSTNAME.fullmatch(name):
        return Address(text, 0)
    host, colon, port = name.rpartition(":")
    if colon and PORTS.fullmatch(port):
        what = f"{text!r} has a port, which SRV records say themselves"
        raise AddressError(what, f"write {SRV}{host}")
    raise AddressError(f"{name!r} is no name of a service")


def parse_listen(text: str) -> Endpoint:
    """Read one of ``ADDRESS_FORMS``; a bare ``PORT`` means ``*:PORT``. Raises AddressError."""
    if PORTS.fullmatch(text):
        return Address(parse_host("*"), *parse_ports(text))
    _refuse_transport(text)
    # A host may be called unix, too: then a port follows.
    if text.startswith(_UNIX) and not text[len(_UNIX) :][:1].isdigit():
        return parse_unix(text.removeprefix(_UNIX))
    return parse_address(text)


def parse_upstream(text: str) -> Endpoint:
    """Read one of ``UPSTREAM_FORMS``: as to listen, but not ``*``. Raises AddressError."""
    if text.startswith("*") or (text.startswith(":") and ":" not in text[1:]):
        port = text.lstrip("*:")
        raise AddressError(
            f"{text!r} does not say which host to connect to",
            f"write 127.0.0.1:{port} for this host",
        )
    if PORTS.fullmatch(text):
        raise AddressError(f"{text!r} has no host", f"write 127.0.0.1:{text} for this host")
    return parse_listen(text)


def _refuse_transport(text: str) -> None:
    """Raise AddressError if a transport stands where only an address may stand."""
    kind, address = split_transport(text)
    # A host may be called udp, too: then only a port follows.
    if kind and not PORTS.fullmatch(text[len(kind) + 1 :]):
        raise AddressError(
            f"{text!r} says {kind} with the address", f'write {address}, and protocol = "{kind}"'
        )
