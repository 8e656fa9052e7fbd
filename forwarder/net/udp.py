"""Making UDP sockets: listeners, the own socket of a flow, and upstream sockets. Moves no bytes.

A flow's own socket is bound to the listener's address and connected to its client. The kernel then
prefers it for that client's datagrams over every listener (udp(7)), so the flow stays with its
process whatever becomes of the SO_REUSEPORT group: a resize, a reload, an upgrade.

Between bind and connect the new socket is one more listener, and as long as it is in a group with
others that are connected the kernel gives it the datagrams of *every* client (Linux 6.18). Where it
can it is therefore bound so that it joins no listener and ranks below them: IPv4 as an IPv6 socket
with mapped addresses, a wildcard as the other kind of wildcard (IPV6_V6ONLY). The listeners' group
then has no connected sockets either, and the kernel does not look through them for the socket of
an unknown client: with 6,000 flows on an IPv4 address 1 us in place of 181. All that takes Linux
6.13, which finds connected sockets by a hash, before it looks at listeners.

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

from forwarder.net import peers
from forwarder.net.proc import local_addresses
from forwarder.net.sockets import is_v6only, set_v6only

if TYPE_CHECKING:
    from forwarder.net.sockets import IpSockAddr, SockAddr, Target

# Asked for on every socket; the kernel grants twice net.core.rmem_max (212,992 by default) at most.
# A burst that comes while the worker is busy elsewhere waits there.
BUFFER_BYTES: Final = 4 * 1024 * 1024

_NONBLOCKING_DATAGRAM: Final = socket.SOCK_DGRAM | getattr(socket, "SOCK_NONBLOCK", 0)
_IP_PKTINFO: Final = 8  # linux/in.h
_WILDCARDS: Final = frozenset({"0.0.0.0", "::"})
_MAPPED: Final = "::ffff:"  # an IPv4 address as an IPv6 one (RFC 4291 section 2.5.5.2)
_UDP_TABLES: Final = (Path("/proc/net/udp"), Path("/proc/net/udp6"))


def finds_flows_by_hash() -> bool:
    """Whether the kernel finds connected UDP sockets by a hash of all four parts (Linux 6.13)."""
    numbers = os.uname().release.split(".")[:2]
    return os.uname().sysname == "Linux" and [int(text) for text in numbers] >= [6, 13]


FINDS_FLOWS_BY_HASH: Final = finds_flows_by_hash()


def listen_udp(
    target: Target, *, v6only: bool, owner: tuple[int, int] | None = None
) -> socket.socket:
    """Bind a UDP address with SO_REUSEPORT. The caller owns the socket.

    ``owner``: user and group of the processes that will make flow sockets beside it, if not ours.
    Raises OSError.
    """
    sock = socket.socket(target.family, _NONBLOCKING_DATAGRAM)
    try:
        if owner is not None:
            os.fchown(sock.fileno(), *owner)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        set_v6only(sock, target.family, v6only)
        prepare_listener(sock, str(target.sockaddr[0]))
        sock.bind(target.sockaddr)
    except BaseException:
        sock.close()
        raise
    return sock


def prepare_listener(sock: socket.socket, host: str) -> None:
    """Set non-blocking mode, buffers, and whether to tell which address a client wrote to."""
    sock.setblocking(False)
    _set_buffers(sock)
    if host in _WILDCARDS:
        if sock.family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)


def probe_bind(target: Target, *, v6only: bool) -> None:
    """Check that nobody listens on a UDP address: bind it without SO_REUSEPORT, and let go.

    Connected sockets there are flows of an instance that lets them end, perhaps of ours; only one
    that takes datagrams of anybody is in the way. Raises OSError, EADDRINUSE above all.
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
    is_ipv4_host = listener.family == socket.AF_INET and not _is_on_wildcard(listener)
    return FINDS_FLOWS_BY_HASH and is_ipv4_host


def flow_socket(listener: socket.socket, peer: bytes) -> tuple[socket.SocketType, bool]:
    """Make the own socket of a flow: bound where ``listener`` is, connected to the client.

    The caller owns it. Returns also whether it may have been given datagrams of others before it
    was connected: if so the caller reads it dry and looks who sent what. Raises OSError; EACCES
    when the port is below 1024 and the process may not bind there.
    """
    apart = _flow_socket_apart(listener, peer) if FINDS_FLOWS_BY_HASH else None
    if apart is not None:
        return apart, False
    host, port = peers.local_host(peer) or listener.getsockname()[0], listener.getsockname()[1]
    client = peers.address_of(peer)
    local: IpSockAddr = (host, port) if len(client) == 2 else (host, port, 0, client[3])
    sock = _new_flow_socket(listener.family, v6only=is_v6only(listener))
    try:
        sock.bind(local)
        sock.connect(client)
    except BaseException:
        sock.close()
        raise
    return sock, True


def _flow_socket_apart(listener: socket.socket, peer: bytes) -> socket.SocketType | None:
    """The same in a group of its own; None if that is not possible, for whatever reason.

    From a wildcard connect() goes to the address that the kernel would answer from, which need not
    be the one that the client has asked.
    """
    host, port = listener.getsockname()[:2]
    client = peers.address_of(peer)
    asked = peers.local_host(peer) or host
    is_wildcard = _is_on_wildcard(listener)
    v6only = False
    if listener.family == socket.AF_INET or client[0].startswith(_MAPPED):
        host, asked = _mapped("0.0.0.0" if is_wildcard else host), _mapped(asked)
        client = (_mapped(client[0]), client[1], 0, 0)
    elif is_wildcard:
        v6only = not is_v6only(listener)
    else:
        return None
    try:
        sock = _new_flow_socket(socket.AF_INET6, v6only=v6only)
    except OSError:  # a system without IPv6; or no descriptor, as the caller will find
        return None
    try:
        sock.bind((host, port))
        sock.connect(client)
        if sock.getsockname()[0].partition("%")[0] == asked:
            return sock
    except OSError:  # another user has the port at another address, say
        pass
    sock.close()
    return None


def _mapped(host: str) -> str:
    return host if host.startswith(_MAPPED) else _MAPPED + host


def _is_on_wildcard(listener: socket.socket) -> bool:
    return listener.getsockname()[0] in _WILDCARDS


def _new_flow_socket(family: int, *, v6only: bool) -> socket.SocketType:
    sock = socket.SocketType(family, _NONBLOCKING_DATAGRAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        set_v6only(sock, family, v6only)
        _set_buffers(sock)
    except BaseException:
        sock.close()
        raise
    return sock


def upstream_socket(target: Target, source: SockAddr | None) -> socket.SocketType:
    """Make a non-blocking UDP socket connected to ``target``, bound to ``source`` if there is one.

    The caller owns it. Raises OSError: EMFILE and the like, ENETUNREACH, EADDRNOTAVAIL.
    """
    sock = socket.SocketType(target.family, _NONBLOCKING_DATAGRAM)
    try:
        sock.setblocking(False)
        _set_buffers(sock)
        if source is not None:
            sock.bind(source)
        sock.connect(target.sockaddr)
    except BaseException:
        sock.close()
        raise
    return sock


def _set_buffers(sock: socket.SocketType) -> None:
    with suppress(OSError):  # the default is smaller, and works
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
