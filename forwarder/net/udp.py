"""Making UDP sockets: listeners, the own socket of a flow, and upstream sockets. Moves no bytes.

A flow's own socket is bound to the listener's address and connected to its client. The kernel then
prefers it for that client's datagrams over every listener (udp(7)), so the flow stays with its
process whatever becomes of the SO_REUSEPORT group: a resize, a reload, an upgrade.

Between bind and connect the new socket is one more listener, and while it is in a group with
connected ones the kernel gives it the datagrams of *every* client (Linux 6.18). Where possible it
is therefore bound so that it joins no listener and ranks below them: IPv4 as an IPv6 socket with
mapped addresses; a wildcard as the other kind of wildcard (IPV6_V6ONLY); another IPv6 address as a
wildcard, from which connect() goes to the address, with a filter that meanwhile drops what does not
come from the client's port. On an IPv4 address the kernel then does not search the connected
sockets for that of an unknown client: with 6,000 flows 1 us instead of 181. (Elsewhere it does:
connect() puts a socket that was bound to a wildcard in front of the others.) All that takes Linux
6.13, which finds connected sockets by a hash before it looks at listeners.

The group admits sockets of one user only, which keeps others from taking datagrams away. So a
listener that a root master makes for workers of another user is given to that user first.
"""

from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from forwarder.net import options as socket_options
from forwarder.net import peers
from forwarder.net.owning import ClosedOnFailure
from forwarder.net.proc import local_addresses
from forwarder.net.sockets import NO_PORT, attach_filter, detach_filter, is_v6only, set_v6only
from forwarder.system import kernel

if TYPE_CHECKING:
    from forwarder.config.model import SocketOptions
    from forwarder.net.options import How
    from forwarder.net.sockets import IpSockAddr, Program, SockAddr, Target

# Requested on every socket; the kernel grants twice net.core.rmem_max (212,992 by default) at most.
# A burst that comes while the worker is busy elsewhere waits there.
BUFFER_BYTES: Final = 4 * 1024 * 1024

_NONBLOCKING_DATAGRAM: Final = socket.SOCK_DGRAM | getattr(socket, "SOCK_NONBLOCK", 0)
_WILDCARDS: Final = frozenset({"0.0.0.0", "::"})
_MAPPED: Final = "::ffff:"  # an IPv4 address as an IPv6 one (RFC 4291 section 2.5.5.2)
# linux/in.h and linux/in6.h; Python 3.11 has no names for them.
_IP_RECVERR: Final = 11
_IPV6_RECVERR: Final = 25
_UDP_TABLES: Final = (Path("/proc/net/udp"), Path("/proc/net/udp6"))


def finds_flows_by_hash() -> bool:
    """Whether the kernel finds connected UDP sockets by a hash of all four parts (Linux 6.13)."""
    return kernel.is_linux((6, 13))


FINDS_FLOWS_BY_HASH: Final = finds_flows_by_hash()


def listen_udp(
    target: Target,
    *,
    v6only: bool,
    options: SocketOptions,
    owner: tuple[int, int] | None = None,
) -> socket.socket:
    """Bind a UDP address with SO_REUSEPORT. The caller owns the socket.

    ``owner``: user and group of the processes that will make flow sockets beside it, if not ours.
    Raises OSError.
    """
    sock = socket.socket(target.family, _NONBLOCKING_DATAGRAM)
    with ClosedOnFailure(sock):
        if owner is not None:
            os.fchown(sock.fileno(), *owner)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        set_v6only(sock, target.family, v6only)
        prepare_listener(sock, str(target.sockaddr[0]))
        _set_buffers(sock)
        socket_options.to_listen(options, target.family, is_udp=True).apply(sock)
        sock.bind(target.sockaddr)
    return sock


def prepare_listener(sock: socket.socket, host: str) -> None:
    """Set non-blocking mode, and at a wildcard report which address a client wrote to."""
    sock.setblocking(False)
    if host in _WILDCARDS:
        if sock.family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_IP, peers.IP_PKTINFO, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)


def probe_bind(target: Target, *, v6only: bool) -> None:
    """Check that no socket listens on a UDP address: bind it without SO_REUSEPORT, and close.

    Connected sockets there are flows that an instance, perhaps ours, lets end; only a socket that
    takes datagrams of any client is in the way. Raises OSError, EADDRINUSE above all.
    """
    with socket.socket(target.family, socket.SOCK_DGRAM) as sock:
        set_v6only(sock, target.family, v6only)
        try:
            sock.bind(target.sockaddr)
        except OSError as err:
            if err.errno != errno.EADDRINUSE or _is_listened_on(target):
                raise


def _is_listened_on(target: Target) -> bool:
    """Whether an unconnected socket has the port at this address or at a wildcard."""
    port = target.sockaddr[1]
    host = str(target.sockaddr[0]).partition("%")[0]
    for is_connected, other_host, other_port in local_addresses(_UDP_TABLES):
        is_same = host == other_host or host in _WILDCARDS or other_host in _WILDCARDS
        if not is_connected and other_port == port and is_same:
            return True
    return False


def has_flat_lookup(listener: socket.socket) -> bool:
    """Whether flow sockets beside this listener cost the datagrams of other clients nothing."""
    is_ipv4 = listener.family == socket.AF_INET
    return FINDS_FLOWS_BY_HASH and is_ipv4 and not is_on_wildcard(listener)


def flow_socket(
    listener: socket.socket, peer: bytes, how: How, *, shuns_wildcard: bool = False
) -> tuple[socket.SocketType, bool]:
    """Make the own socket of a flow: bound where ``listener`` is, connected to the client.

    The caller owns it. Returns also whether it may have got datagrams of other clients before it
    was connected: if so the caller reads it dry and checks the senders. Raises OSError; EACCES when
    the port is below 1024 and the process may not bind there. ``shuns_wildcard``: another listener
    is on the IPv6 wildcard and this port.
    """
    apart = None
    if FINDS_FLOWS_BY_HASH:
        apart = _flow_socket_apart(listener, peer, how, shuns_wildcard=shuns_wildcard)
    if apart is not None:
        return apart, False
    host, port = peers.local_host(peer) or listener.getsockname()[0], listener.getsockname()[1]
    client = peers.address_of(peer)
    local: IpSockAddr = (host, port) if len(client) == 2 else (host, port, 0, client[3])
    sock = _new_flow_socket(listener.family, how, v6only=is_v6only(listener))
    with ClosedOnFailure(sock):
        sock.bind(local)
        sock.connect(client)
    return sock, True


def _flow_socket_apart(
    listener: socket.socket, peer: bytes, how: How, *, shuns_wildcard: bool
) -> socket.SocketType | None:
    """The same in a group of its own; None if that is impossible for any reason.

    From a wildcard connect() goes to the address that the kernel would answer from, which need not
    be the one that the client wrote to.
    """
    host, port = listener.getsockname()[:2]
    client = peers.address_of(peer)
    asked = peers.local_host(peer) or host
    is_wildcard = is_on_wildcard(listener)
    v6only = is_filtered = False
    if listener.family == socket.AF_INET or client[0].startswith(_MAPPED):
        host, asked = _mapped("0.0.0.0" if is_wildcard else host), _mapped(asked)
        client = (_mapped(client[0]), client[1], 0, 0)
    elif is_wildcard:
        v6only = not is_v6only(listener)
    elif shuns_wildcard:
        return None
    else:
        host, v6only, is_filtered = "::", True, True
    try:
        sock = _new_flow_socket(socket.AF_INET6, how, v6only=v6only)
    except OSError:  # a system without IPv6; or no descriptor, as the caller will find
        return None
    try:
        if is_filtered:
            attach_filter(sock, _port_filter(client[1]))
        sock.bind((host, port))
        sock.connect(client)
        if is_filtered:
            detach_filter(sock)
        if sock.getsockname()[0].partition("%")[0] == asked:
            return sock
    except OSError:  # another user has the port at another address, say
        pass
    sock.close()
    return None


def _port_filter(port: int) -> Program:
    """Drops what does not come from a port. For UDP the packet begins at the UDP header."""
    return (
        (0x28, 0, 0, 0),  # load the two bytes of the source port
        (0x15, 0, 1, port),  # is it this one? else skip one
        (0x06, 0, 0, 0xFFFFFFFF),  # pass all of it
        (0x06, 0, 0, 0),  # drop
    )


def _mapped(host: str) -> str:
    return host if host.startswith(_MAPPED) else _MAPPED + host


def is_on_wildcard(listener: socket.socket) -> bool:
    """Whether it is bound to all addresses."""
    return listener.getsockname()[0] in _WILDCARDS


def _new_flow_socket(family: int, how: How, *, v6only: bool) -> socket.SocketType:
    sock = socket.SocketType(family, _NONBLOCKING_DATAGRAM)
    with ClosedOnFailure(sock):
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        set_v6only(sock, family, v6only)
        _set_buffers(sock)
        how.apply(sock)
    return sock


def upstream_socket(target: Target, source: SockAddr | None, how: How) -> socket.SocketType:
    """Make a non-blocking UDP socket connected to ``target``, bound to ``source`` if there is one.

    The caller owns it. Raises OSError: EMFILE and the like, ENETUNREACH, EADDRNOTAVAIL, and NO_PORT
    when all local ports are in use.
    """
    sock = socket.SocketType(target.family, _NONBLOCKING_DATAGRAM)
    with ClosedOnFailure(sock):
        sock.setblocking(False)
        _set_buffers(sock)
        how.apply(sock)
        if source is not None:
            sock.bind(source)
        try:
            sock.connect(target.sockaddr)
        except PermissionError:  # a broadcast address, which needs an option: socket(7)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            sock.connect(target.sockaddr)
        except BlockingIOError as err:  # EAGAIN, connect(2)
            raise OSError(NO_PORT, "no local port is free") from err
    return sock


def open_socket(target: Target, source: SockAddr | None, how: How) -> socket.SocketType:
    """Make a UDP socket that takes datagrams of any peer, bound to ``source`` if there is one.

    For the family of ``target``. The caller owns it, and calls :func:`forget_errors` when an ICMP
    error was reported. Raises OSError as :func:`upstream_socket`.
    """
    sock = socket.SocketType(target.family, _NONBLOCKING_DATAGRAM)
    with ClosedOnFailure(sock):
        sock.setblocking(False)
        _set_buffers(sock)
        how.apply(sock)
        # A port now: when ports run out, a send would report that it should be tried again.
        sock.bind(source or ("" if target.family == socket.AF_INET else "::", 0))
        set_error_queue(sock, is_on=True)
    return sock


def set_error_queue(sock: socket.SocketType, *, is_on: bool) -> None:
    """Let the kernel report ICMP errors to a socket that is not connected, or stop that.

    The kernel then queues them as well (IP_RECVERR, ip(7)), until it is switched off.
    """
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, is_on)
    else:
        sock.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, is_on)


def forget_errors(sock: socket.SocketType) -> None:
    """Empty the error queue of a socket that is not connected: answers need its room."""
    set_error_queue(sock, is_on=False)
    set_error_queue(sock, is_on=True)


def _set_buffers(sock: socket.SocketType) -> None:
    with suppress(OSError):  # the default is smaller, and works
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
