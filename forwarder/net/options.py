"""Socket options as the kernel takes them, and putting them on sockets.

Theory of operation
-------------------
Accepted TCP sockets inherit all of these options from their listener, except the queue of fast open
(seen on Linux 6.18 with IPv4, IPv6 and MPTCP; ``tests/process/test_options.py`` checks it). So
those of the clients' side are set where the master makes a listening socket, and an accept costs
nothing. Towards upstreams every socket is new: the options of a rule are worked out once, as a
tuple.

An existing listening socket is made equal to a *template*: a fresh socket that got the options of
the rule. So an option that a rule no longer has goes back to the kernel's default, whatever that is
here; and an impossible option fails on the template, before anything is touched.
"""

from __future__ import annotations

import socket
import struct
import sys
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from forwarder.config.model import SocketOptions

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

# Python 3.11 has no names for the first ones: linux/in.h, linux/in6.h, asm-generic/socket.h,
# linux/tcp.h. The others are missing on other systems, which refuse these numbers.
_IP_TRANSPARENT: Final = 19
_IPV6_TRANSPARENT: Final = 75
_SO_BUF_LOCK: Final = 72  # Linux 5.14
FAST_OPEN_CONNECT: Final = 30
_SO_MARK: Final = getattr(socket, "SO_MARK", 36)
SO_BINDTODEVICE: Final = getattr(socket, "SO_BINDTODEVICE", 25)
_TCP_KEEPIDLE: Final = getattr(socket, "TCP_KEEPIDLE", 4)
_TCP_KEEPINTVL: Final = getattr(socket, "TCP_KEEPINTVL", 5)
_TCP_KEEPCNT: Final = getattr(socket, "TCP_KEEPCNT", 6)
_TCP_USER_TIMEOUT: Final = getattr(socket, "TCP_USER_TIMEOUT", 18)
_TCP_CONGESTION: Final = getattr(socket, "TCP_CONGESTION", 13)
_TCP_FASTOPEN: Final = getattr(socket, "TCP_FASTOPEN", 23)
IPPROTO_MPTCP: Final = 262  # linux/in.h
_SO_PROTOCOL: Final = 38

_BUFFERS: Final = (socket.SO_RCVBUF, socket.SO_SNDBUF)
_TEXT_BYTES: Final = 16  # IFNAMSIZ, TCP_CA_NAME_MAX


@dataclass(frozen=True, slots=True)
class Setting:
    """One setsockopt(2), and the key of the configuration that it comes from; "" if it is ours."""

    key: str
    level: int
    name: int
    value: int | bytes


@dataclass(frozen=True, slots=True)
class How:
    """How sockets of one kind are made: their protocol, and what is set on them, in order."""

    protocol: int = 0
    settings: tuple[tuple[int, int, int | bytes], ...] = ()

    def apply(self, sock: socket.SocketType) -> None:
        """Set everything. Raises OSError."""
        for level, name, value in self.settings:
            sock.setsockopt(level, name, value)


PLAIN: Final = How()


def listening(options: SocketOptions, family: int, *, is_udp: bool) -> list[Setting]:
    """What a new socket for clients gets: a listener of TCP, or any socket of UDP."""
    if family == socket.AF_UNIX:
        return []
    found = list(_common(options, family))
    found += _own("mark", options.mark, "device", options.device)
    if not is_udp:
        found += _tcp(options, is_mptcp=options.mptcp.on_listen)
        if options.fast_open.on_listen:
            queue = options.fast_open_queue
            found.append(Setting("fast_open", socket.IPPROTO_TCP, _TCP_FASTOPEN, queue))
    return found


def connecting(options: SocketOptions, family: int, *, is_udp: bool) -> list[Setting]:
    """What a new socket towards an upstream gets."""
    if family == socket.AF_UNIX:
        return []
    found = list(_common(options, family))
    mark_key = "mark" if options.upstream_mark is None else "upstream_mark"
    device = options.upstream_device
    found += _own(mark_key, options.mark_of_upstreams, "upstream_device", device)
    if not is_udp:
        found += _tcp(options, is_mptcp=options.mptcp.on_connect)
    if options.transparent:
        found.append(
            Setting("transparent", socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
            if family == socket.AF_INET6
            else Setting("transparent", socket.IPPROTO_IP, _IP_TRANSPARENT, 1)
        )
    return found


@lru_cache(maxsize=1024)
def to_listen(options: SocketOptions, family: int, *, is_udp: bool) -> How:
    """How sockets for clients are made."""
    is_mptcp = options.mptcp.on_listen and not is_udp and family != socket.AF_UNIX
    settings = listening(options, family, is_udp=is_udp)
    return How(IPPROTO_MPTCP if is_mptcp else 0, _bare(settings))


@lru_cache(maxsize=1024)
def to_connect(options: SocketOptions, *, is_udp: bool) -> Mapping[int, How]:
    """How sockets towards upstreams are made, by family; one for all pools that have the same."""
    protocol = IPPROTO_MPTCP if options.mptcp.on_connect and not is_udp else 0
    found: dict[int, How] = {socket.AF_UNIX: PLAIN}
    for family in (socket.AF_INET, socket.AF_INET6):
        found[family] = How(protocol, _bare(connecting(options, family, is_udp=is_udp)))
    return found


def _bare(settings: Iterable[Setting]) -> tuple[tuple[int, int, int | bytes], ...]:
    return tuple((setting.level, setting.name, setting.value) for setting in settings)


def _tcp(options: SocketOptions, *, is_mptcp: bool) -> Iterator[Setting]:
    tcp = socket.IPPROTO_TCP
    if options.nodelay:
        yield Setting("nodelay", tcp, socket.TCP_NODELAY, 1)
    if options.keepalive:
        yield Setting("keepalive", socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for key, name, value in (
            ("keepalive_idle", _TCP_KEEPIDLE, options.keepalive_idle_s),
            ("keepalive_interval", _TCP_KEEPINTVL, options.keepalive_interval_s),
            ("keepalive_count", _TCP_KEEPCNT, options.keepalive_count),
        ):
            if value is not None:
                yield Setting(key, tcp, name, value)
    if not is_mptcp:
        # Keeps an urgent byte in the stream; splice and recv would drop it. MPTCP has none.
        yield Setting("", socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        if options.user_timeout_ms is not None:
            yield Setting("user_timeout", tcp, _TCP_USER_TIMEOUT, options.user_timeout_ms)
    if options.congestion is not None:
        yield Setting("congestion", tcp, _TCP_CONGESTION, options.congestion.encode())


def _own(mark_key: str, mark: int, device_key: str, device: str | None) -> Iterator[Setting]:
    """Options for which each side has its own key."""
    if mark:
        yield Setting(mark_key, socket.SOL_SOCKET, _SO_MARK, struct.pack("I", mark))
    if device is not None:
        yield Setting(device_key, socket.SOL_SOCKET, SO_BINDTODEVICE, device.encode())


def _common(options: SocketOptions, family: int) -> Iterator[Setting]:
    """What TCP and UDP, and both sides, have in common."""
    if options.rcvbuf_bytes is not None:
        yield Setting("rcvbuf", socket.SOL_SOCKET, socket.SO_RCVBUF, options.rcvbuf_bytes)
    if options.sndbuf_bytes is not None:
        yield Setting("sndbuf", socket.SOL_SOCKET, socket.SO_SNDBUF, options.sndbuf_bytes)
    if options.dscp is not None:
        # The upper six bits of the byte (RFC 2474). An IPv6 socket has a value for IPv4, too.
        yield Setting("dscp", socket.IPPROTO_IP, socket.IP_TOS, options.dscp << 2)
        if family == socket.AF_INET6:
            yield Setting("dscp", socket.IPPROTO_IPV6, socket.IPV6_TCLASS, options.dscp << 2)


# -- sockets that exist already

_SOL: Final = socket.SOL_SOCKET
_TCP: Final = socket.IPPROTO_TCP
_FIELDS: Final[dict[str, tuple[tuple[int, int], ...]]] = {
    "keepalive": ((_SOL, socket.SO_KEEPALIVE),),
    "keepalive_idle_s": ((_TCP, _TCP_KEEPIDLE),),
    "keepalive_interval_s": ((_TCP, _TCP_KEEPINTVL),),
    "keepalive_count": ((_TCP, _TCP_KEEPCNT),),
    "nodelay": ((_TCP, socket.TCP_NODELAY),),
    "user_timeout_ms": ((_TCP, _TCP_USER_TIMEOUT),),
    "rcvbuf_bytes": ((_SOL, socket.SO_RCVBUF),),
    "sndbuf_bytes": ((_SOL, socket.SO_SNDBUF),),
    "fast_open": ((_TCP, _TCP_FASTOPEN),),
    "fast_open_queue": ((_TCP, _TCP_FASTOPEN),),
    "congestion": ((_TCP, _TCP_CONGESTION),),
    "mark": ((_SOL, _SO_MARK),),
    "device": ((_SOL, SO_BINDTODEVICE),),
    "dscp": ((socket.IPPROTO_IP, socket.IP_TOS), (socket.IPPROTO_IPV6, socket.IPV6_TCLASS)),
}
_ALWAYS: Final = ("keepalive", "nodelay")


class Template:
    """A socket with the options of a rule and no address, that others are made equal to."""

    def __init__(self, sock: socket.socket, options: SocketOptions, *, buffer_bytes: int) -> None:
        """Of the kind of ``sock``; for UDP with ``buffer_bytes`` by default. Raises OSError."""
        is_udp = sock.type == socket.SOCK_DGRAM
        self._has_tcp = not is_udp
        self._like = socket.socket(sock.family, sock.type, sock.proto)
        try:
            if is_udp:
                for name in _BUFFERS:
                    self._like.setsockopt(_SOL, name, buffer_bytes)
            to_listen(options, sock.family, is_udp=is_udp).apply(self._like)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the socket."""
        self._like.close()

    def put_on(self, sock: socket.socket, names: Iterable[str]) -> None:
        """Make some options of ``sock``, by the names of the model, equal. Raises OSError."""
        for level, name in _of(names):
            if level == _TCP and not self._has_tcp:
                continue
            wanted = _get(self._like, level, name)
            if wanted is None or wanted == _get(sock, level, name):
                continue  # some take a right to set, even to the same value
            if level == _SOL and name in _BUFFERS and isinstance(wanted, int):
                sock.setsockopt(level, name, wanted // 2)  # the kernel doubles it: socket(7)
                self._unlock_buffers(sock)
            else:
                sock.setsockopt(level, name, wanted)

    def _unlock_buffers(self, sock: socket.socket) -> None:
        """A size that was set stays; one that was not grows by itself again."""
        locked = _get(self._like, _SOL, _SO_BUF_LOCK)
        if locked is not None:
            sock.setsockopt(_SOL, _SO_BUF_LOCK, locked)


def _of(names: Iterable[str]) -> Iterator[tuple[int, int]]:
    return iter(dict.fromkeys(pair for name in names for pair in _FIELDS.get(name, ())))


def _get(sock: socket.socket, level: int, name: int) -> int | bytes | None:
    """The value of an option; None where this socket has none of that kind."""
    is_text = (level, name) in ((_TCP, _TCP_CONGESTION), (_SOL, SO_BINDTODEVICE))
    try:
        if is_text:
            return sock.getsockopt(level, name, _TEXT_BYTES).rstrip(b"\0")
        return sock.getsockopt(level, name)
    except OSError:
        return None


def all_names() -> tuple[str, ...]:
    """Every option of a listening socket."""
    return tuple(_FIELDS)


def asked_for(options: SocketOptions) -> tuple[str, ...]:
    """The options that a rule sets for its listening socket, and those of every TCP listener."""
    default = SocketOptions()
    return tuple(
        name
        for name in _FIELDS
        if name in _ALWAYS or getattr(options, name) != getattr(default, name)
    )


def changed(old: SocketOptions, new: SocketOptions) -> tuple[str, ...]:
    """The options that differ, by the names of the model."""
    return tuple(
        field.name
        for field in fields(SocketOptions)
        if field.compare and getattr(old, field.name) != getattr(new, field.name)
    )


def is_mptcp(sock: socket.SocketType) -> bool:
    """Whether a socket was made for MPTCP."""
    if not sys.platform.startswith("linux") or sock.type != socket.SOCK_STREAM:
        return False
    return sock.family != socket.AF_UNIX and sock.getsockopt(_SOL, _SO_PROTOCOL) == IPPROTO_MPTCP
