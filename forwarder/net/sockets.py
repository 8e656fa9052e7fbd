"""Making and setting up sockets, and what their errors mean. Moves no bytes, keeps no state.

Stream sockets are ``socket.SocketType``, the C type under ``socket.socket``: it has every
operation the relay needs, is half the size and skips the Python-level constructor.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import os
import socket
import struct
import sys
import termios
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final, TypeAlias

from forwarder.net import diverting
from forwarder.net import options as socket_options
from forwarder.net.owning import ClosedOnFailure
from forwarder.system.kernel import setting

if TYPE_CHECKING:
    from forwarder.config.model import SocketOptions
    from forwarder.net.options import How

IpSockAddr: TypeAlias = tuple[str, int] | tuple[str, int, int, int]
SockAddr: TypeAlias = IpSockAddr | str
"""An IPv4 or IPv6 address with its port; a unix path, or a NUL and an abstract name (unix(7))."""

NUL: Final = "\0"

_NONBLOCKING_STREAM: Final = socket.SOCK_STREAM | getattr(socket, "SOCK_NONBLOCK", 0)
_LINGER_ABORT: Final = struct.pack("ii", 1, 0)
_UNSPEC: Final = bytes(16)  # a struct sockaddr of AF_UNSPEC
_NOTHING: Final = b"\0\0\0\0"
_libc: Final = ctypes.CDLL(None)
# linux/in.h; Python 3.11 has no name for it. The port is then chosen at connect(), by the whole
# 4-tuple, so that one source address can hold more than 28,000 connections.
_IP_BIND_ADDRESS_NO_PORT: Final = 24
_TCP_INFO: Final = getattr(socket, "TCP_INFO", 0)
_BYTES_RECEIVED_AT: Final = 128  # in struct tcp_info, linux/tcp.h
_SO_MEMINFO: Final = 55  # asm-generic/socket.h; nine numbers, linux/sock_diag.h
_NAME_BYTES: Final = 16  # IFNAMSIZ, linux/if.h
_CLOSED: Final = 7  # TCP_CLOSE, linux/tcp.h; the first byte of struct tcp_info is the state

# Of net.ipv4.ip_local_port_range; its default where it cannot be read (ip(7)).
_FIRST_LOCAL_PORT: Final = int((setting("net/ipv4/ip_local_port_range") or "32768").split()[0])

_SO_ATTACH_FILTER: Final = 26  # asm-generic/socket.h; Python has no names for them
_SO_DETACH_FILTER: Final = 27
Program: TypeAlias = tuple[tuple[int, int, int, int], ...]
"""Classic BPF, struct sock_filter (linux/filter.h): code, jump if true, jump if false, operand."""
# For TCP the packet begins at the TCP header, whose byte 13 holds the flags (RFC 9293 section 3.1).
_SYN_FILTER: Final[Program] = (
    (0x30, 0, 0, 13),  # load byte 13
    (0x45, 0, 1, 0x02),  # SYN set? else skip one
    (0x06, 0, 0, 0),  # drop
    (0x06, 0, 0, 0xFFFFFFFF),  # pass all of it
)

# accept(2): errors of the connection that was being accepted, or of the network below it. The
# listener is fine, the next one may be.
ACCEPT_IGNORE: Final = frozenset(
    {
        errno.ECONNABORTED,  # the client reset while it was queued
        errno.EPROTO,
        errno.ENETDOWN,
        errno.ENOPROTOOPT,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.EOPNOTSUPP,
        errno.EPERM,  # a firewall rule forbids this one
        errno.ETIMEDOUT,
        errno.EINTR,
    }
)
# The process or the system is short of something that comes back when sessions end.
# ENOSPC: the user's limit of what epoll watches, epoll_ctl(2).
OUT_OF_RESOURCES: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ENOSPC}
)
# The other end of a connection is gone, or the way to it: RFC 9293, ICMP, tcp(7). With any other
# error it is still there, and waits.
PEER_GONE: Final = frozenset(
    {
        errno.ECONNRESET,
        errno.EPIPE,
        errno.ETIMEDOUT,
        errno.ENOTCONN,
        errno.ESHUTDOWN,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.EHOSTUNREACH,
        errno.EHOSTDOWN,
        errno.ENETUNREACH,
        errno.ENETDOWN,
        errno.ENETRESET,
        errno.EPROTO,
        errno.ENOPROTOOPT,
        errno.EOPNOTSUPP,
    }
)


# Stands for what Linux reports when no local port is free: EAGAIN or EADDRINUSE for UDP,
# EADDRNOTAVAIL for TCP, each of which may mean something else. No other error of a connect here has
# this number.
NO_PORT: Final = errno.EADDRINUSE


@dataclass(frozen=True, slots=True)
class Target:
    """A socket address that can be connected to."""

    family: int
    sockaddr: SockAddr

    def __str__(self) -> str:
        if isinstance(self.sockaddr, str):
            return f"unix:{self.sockaddr.replace(NUL, '@', 1)}"
        return ip_text(self.sockaddr)

    @property
    def port(self) -> int:
        """The port; 0 for a unix socket."""
        return 0 if isinstance(self.sockaddr, str) else self.sockaddr[1]

    @property
    def is_unix(self) -> bool:
        """Whether it is a unix socket."""
        return self.family == socket.AF_UNIX

    @property
    def is_abstract(self) -> bool:
        """Whether it is a unix socket without a file."""
        return isinstance(self.sockaddr, str) and self.sockaddr.startswith(NUL)


class LentSocket(socket.socket):
    """A listening socket of a service manager, which alone may remove its address."""


@lru_cache(maxsize=1024)  # the same few upstreams recur
def ip_text(address: IpSockAddr) -> str:
    """Host and port as they are written."""
    host, port = address[0], address[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def unix_target(path: str) -> Target:
    """The socket address of a path, or of an ``@name`` in the abstract namespace."""
    return Target(socket.AF_UNIX, NUL + path[1:] if path.startswith("@") else path)


def with_port(address: SockAddr, port: int) -> SockAddr:
    """An IP address with another port; a unix socket has none and stays as it is."""
    if isinstance(address, str):
        return address
    return (address[0], port, *address[2:])


def packed_host(address: SockAddr) -> bytes:
    """The host of a client as bytes, without its zone; empty for a client of a unix socket."""
    if not isinstance(address, tuple):
        return b""
    host = address[0]
    if ":" in host:
        return socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
    return socket.inet_pton(socket.AF_INET, host)


def client_text(address: SockAddr) -> str:
    """A client as text for people. One of a unix socket has no name, or one it chose."""
    if isinstance(address, tuple):
        return f"{address[0]}:{address[1]}"
    return "unix"


def listen_tcp(
    target: Target,
    *,
    v6only: bool,
    options: SocketOptions,
    apart: list[tuple[socket.socket, int]] | None = None,
) -> socket.socket:
    """Bind and listen on a TCP address with SO_REUSEPORT. The caller owns the socket.

    Options of accepted sockets are set here, once, instead of on every connection: they inherit
    them. ``apart``: this socket shares no clients with those that have the address already, if this
    process has the right to that. It is put there with its interface, and gets no clients before it
    arrives there (see ``diverting``). Raises OSError.
    """
    how = socket_options.to_listen(options, target.family, is_udp=False)
    sock = socket.socket(target.family, _NONBLOCKING_STREAM, how.protocol)
    with ClosedOnFailure(sock):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.setblocking(False)
        how.apply(sock)
        set_v6only(sock, target.family, v6only)
        sock.bind(target.sockaddr)
        if apart is None:
            sock.listen(options.backlog)
            return sock
        interface = diverting.listen_apart(sock, options.backlog)
        if interface is None:
            sock.close()
            return listen_tcp(target, v6only=v6only, options=options)
        apart.append((sock, interface))
    return sock


def has_ipv6() -> bool:
    """Whether this system has IPv6 at all; True also if addresses are off (``disable_ipv6``)."""
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).close()
    except OSError as err:
        return err.errno != errno.EAFNOSUPPORT
    return True


def listen_abstract(target: Target, backlog: int) -> socket.socket:
    """Bind and listen on a name in the abstract namespace. The caller owns it. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, _NONBLOCKING_STREAM)
    with ClosedOnFailure(sock):
        sock.setblocking(False)
        sock.bind(target.sockaddr)
        sock.listen(backlog)
    return sock


def bound_to(sock: socket.SocketType) -> Target:
    """Where a socket is bound. Raises OSError when it is closed."""
    address = sock.getsockname()
    # Python gives abstract names as bytes.
    return Target(sock.family, os.fsdecode(address) if isinstance(address, bytes) else address)


def prepare_listener(sock: socket.socket) -> None:
    """Set up a socket that another process has bound, except for the options of its rule.

    Raises OSError.
    """
    sock.setblocking(False)
    if not (sock.family == socket.AF_UNIX or socket_options.is_mptcp(sock)):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)


def is_v6only(sock: socket.socket) -> bool:
    """Whether an IPv6 socket takes IPv6 only; False for IPv4."""
    return sock.family == socket.AF_INET6 and bool(
        sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    )


def probe_bind(target: Target, *, v6only: bool) -> None:
    """Check that no socket listens on a TCP address: bind it without SO_REUSEPORT, and close.

    SO_REUSEPORT would let a second instance of the same user share the port unnoticed. SO_REUSEADDR
    passes over connections in TIME_WAIT but not over a listener (socket(7)).
    Raises OSError, EADDRINUSE above all.
    """
    with socket.socket(target.family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        set_v6only(sock, target.family, v6only)
        sock.bind(target.sockaddr)


def set_v6only(sock: socket.SocketType, family: int, v6only: bool) -> None:  # noqa: FBT001 - an on/off socket option
    """Take IPv6 only, or IPv4 too; without effect on an IPv4 socket. Raises OSError."""
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)


def accepted_socket(fd: int, family: int) -> socket.SocketType:
    """Take ownership of a descriptor that accept returned, and make it non-blocking."""
    sock = socket.SocketType(family, socket.SOCK_STREAM, 0, fd)
    sock.setblocking(False)
    return sock


def upstream_socket(target: Target, source: SockAddr | None, how: How) -> socket.SocketType:
    """Make a non-blocking stream socket for ``target``, bound to ``source`` if there is one.

    The caller owns it. Raises OSError: EMFILE and the like, EADDRNOTAVAIL for a wrong source.
    """
    sock = socket.SocketType(target.family, _NONBLOCKING_STREAM, how.protocol)
    try:  # not ClosedOnFailure: one object less for each session
        if not sys.platform.startswith("linux"):
            sock.setblocking(False)
        how.apply(sock)
        if source is not None:
            with suppress(OSError):  # best effort: an old kernel takes the port at bind
                sock.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
            sock.bind(source)
    except BaseException:
        sock.close()
        raise
    return sock


def why_no_address(sock: socket.SocketType, target: Target) -> int:
    """What EADDRNOTAVAIL of connect(2) means: NO_PORT, or that there is no address to connect from.

    Only IPv6 can have no address, depending on the destination; a UDP socket, which chooses in the
    same way, shows it. When no descriptor is left for that, EADDRNOTAVAIL stays.
    """
    if target.family != socket.AF_INET6:
        return NO_PORT
    try:
        with socket.socket(target.family, socket.SOCK_DGRAM) as probe:
            probe.bind((*sock.getsockname()[:1], 0, 0, 0))
            probe.connect(target.sockaddr)
    except OSError as err:
        cannot_tell = err.errno in OUT_OF_RESOURCES
        return errno.EADDRNOTAVAIL if cannot_tell or err.errno == errno.EADDRNOTAVAIL else NO_PORT
    return NO_PORT


def has_lost_interface(sock: socket.SocketType) -> bool:
    """Whether the interface that a socket is bound to was removed: then it reaches nothing again.

    Bound by SO_BINDTODEVICE, or by a link-local address of either end. An interface of the same
    name that was made since is another one.
    """
    try:
        sock.getsockopt(socket.SOL_SOCKET, socket_options.SO_BINDTODEVICE, _NAME_BYTES)
    except OSError as err:
        return err.errno == errno.ENODEV
    return False


@dataclass(frozen=True, slots=True)
class Queue:
    """What waits at a listening socket: for TCP clients, for UDP the memory of datagrams in bytes.

    ``dropped``: clients or datagrams that found ``limit`` reached, since the socket was made.
    """

    waiting: int
    limit: int
    dropped: int


def queue_of(sock: socket.socket) -> Queue:
    """The queue of a listening socket; zeros where the kernel does not report it."""
    try:
        memory = struct.unpack("9I", sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 36))
        if sock.type == socket.SOCK_DGRAM:
            return Queue(memory[0], memory[1], memory[8])
        info = sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, 32)
        # Of a listener, tcpi_unacked is the length of its queue and tcpi_sacked the limit, tcp(7).
        waiting, limit = struct.unpack_from("2I", info, 24)
        return Queue(waiting, limit, memory[8])
    except (OSError, struct.error):
        return Queue(0, 0, 0)


def attach_filter(sock: socket.SocketType, program: Program) -> None:
    """Let a program decide what happens to each packet for a socket. Raises OSError."""
    lines = array.array("B", b"".join(struct.pack("HBBI", *line) for line in program))
    address, _ = lines.buffer_info()
    packed = struct.pack("HP", len(program), address)
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, packed)


def detach_filter(sock: socket.SocketType) -> None:
    """Undo :func:`attach_filter`. Raises OSError, ENOENT if there was no filter."""
    sock.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)


def received_bytes(sock: socket.SocketType) -> int:
    """The bytes a TCP socket has ever received, its peer's FIN counted as one byte.

    0 where the kernel does not report it, as for a unix socket. tcpi_bytes_received, linux/tcp.h,
    Linux 4.1.
    """
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _BYTES_RECEIVED_AT + 8)
        return int(struct.unpack_from("=Q", info, _BYTES_RECEIVED_AT)[0])
    except (OSError, struct.error):
        return 0


def has_met_itself(sock: socket.SocketType, target: Target) -> bool:
    """Whether a socket that connects is its own peer; call it as soon as it has begun to.

    The kernel may choose the port that is connected to, if nobody listens there, as the local one.
    By TCP both ends are then this socket (RFC 9293 3.5, simultaneous open), by UDP as well: on
    Linux 6.18 some 5 of 100,000 connects to a closed port of this host in the range for local
    ports. Below that range it cannot be, and is not looked at.
    """
    if target.is_unix or target.port < _FIRST_LOCAL_PORT:
        return False
    return bool(sock.getsockname()[:2] == target.sockaddr[:2])


def has_ended(sock: socket.SocketType, read_bytes: int) -> bool:
    """Whether the peer of a broken connection had sent its FIN before, and all it sent was read.

    After a call has reported a reset, further reads report end of file, FIN or no FIN: the kernel
    reports the error once, and shuts a reset socket for reading. A received FIN counts as a byte
    that is never read; ``read_bytes`` are all that were read in the life of the connection. A unix
    socket reports end of file only if it is one. False for MPTCP, which counts differently.
    """
    return sock.family == socket.AF_UNIX or received_bytes(sock) == read_bytes + 1


def drop_syn(sock: socket.socket) -> bool:
    """Make the kernel drop only the SYN segments for a listener. Returns whether it does.

    Closing a listener resets what is queued on it, and between the last accept and the close more
    may come. With this filter nothing new can: a client's SYN is lost, and its retransmission a
    second later meets the closed port. Handshakes that have begun are completed. Sockets accepted
    meanwhile inherit the filter, which does them no harm. socket(7), SO_ATTACH_FILTER; on TCP it
    needs CAP_NET_ADMIN since Linux 6.18.
    """
    with suppress(OSError):
        attach_filter(sock, _SYN_FILTER)
        return True
    return False


def pass_syn(sock: socket.socket) -> None:
    """Undo :func:`drop_syn`."""
    with suppress(OSError):  # there was no filter
        detach_filter(sock)


def peer_credentials(sock: socket.SocketType) -> tuple[int, int]:
    """Process and user at the other end of a unix socket: unix(7), SO_PEERCRED. Raises OSError."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", raw)
    return pid, uid


def set_abort_on_close(sock: socket.SocketType) -> None:
    """Make close() send RST in place of FIN (SO_LINGER with 0 seconds, socket(7))."""
    with suppress(OSError):  # a socket that is gone needs no RST
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ABORT)


def end_for_all(sock: socket.SocketType) -> None:
    """Close a socket, and end its connection as close(2) does where nobody else has it.

    By RST if :func:`set_abort_on_close` was called, or if something was not read. Others that have
    it have to close it as well, but its peer does not wait for that: it gets FIN or RST now. One
    for datagrams is only closed: without its peer it would take the datagrams of others.
    """
    if sock.type == socket.SOCK_DGRAM:
        sock.close()
        return
    try:
        linger = sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, len(_LINGER_ABORT))
        if linger != _LINGER_ABORT and not waiting_bytes(sock.fileno()):
            sock.shutdown(socket.SHUT_RDWR)
        elif sock.family != socket.AF_UNIX:  # which has no reset
            # connect(2): AF_UNSPEC dissolves the association, for TCP as the ABORT of RFC 9293.
            _libc.connect(sock.fileno(), _UNSPEC, len(_UNSPEC))
    except OSError:
        pass  # it is gone already
    sock.close()


def waiting_bytes(fd: int) -> int:
    """The bytes to be read from a socket, or in a pipe by its read end. Raises OSError."""
    return _number(fd, termios.FIONREAD)


def unacknowledged_bytes(fd: int) -> int:
    """The bytes in the send queue of a socket, FIN included (SIOCOUTQ, tcp(7)). Raises OSError."""
    return _number(fd, termios.TIOCOUTQ)


def _number(fd: int, request: int) -> int:
    return int(struct.unpack("i", fcntl.ioctl(fd, request, _NOTHING))[0])


def unsent_bytes(sock: socket.SocketType) -> int:
    """Bytes that a live peer has not acknowledged yet (SIOCOUTQ, tcp(7)); 0 if unknown.

    A TCP socket that was reset keeps its count forever, so its state is checked (TCP_INFO). For a
    unix socket: the memory of what the peer has not read, 0 once the peer has closed.
    """
    try:
        unsent = unacknowledged_bytes(sock.fileno())
        if unsent and _TCP_INFO and sock.family != socket.AF_UNIX:
            state = sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, 1)[0]
            return 0 if state == _CLOSED else unsent
    except OSError:
        return 0
    return unsent
