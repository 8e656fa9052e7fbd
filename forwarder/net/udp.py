"""Making UDP sockets: listeners, the own socket of a flow, and upstream sockets. Moves no bytes.

A flow's own socket is bound to the listener's address and connected to its client. The kernel then
prefers it for that client's datagrams over every listener (udp(7)), so the flow stays with its
process whatever becomes of the SO_REUSEPORT group: a resize, a reload, an upgrade.

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
from forwarder.net.proc import local_addresses
from forwarder.net.sockets import is_v6only, set_v6only

if TYPE_CHECKING:
    from forwarder.config.model import SocketOptions
    from forwarder.net.options import How
    from forwarder.net.sockets import IpSockAddr, SockAddr, Target

# Asked for on every socket; the kernel grants twice net.core.rmem_max (212,992 by default) at most.
# A burst that comes while the worker is busy elsewhere waits there.
BUFFER_BYTES: Final = 4 * 1024 * 1024

_NONBLOCKING_DATAGRAM: Final = socket.SOCK_DGRAM | getattr(socket, "SOCK_NONBLOCK", 0)
_IP_PKTINFO: Final = 8  # linux/in.h
_WILDCARDS: Final = frozenset({"0.0.0.0", "::"})
_UDP_TABLES: Final = (Path("/proc/net/udp"), Path("/proc/net/udp6"))


def finds_flows_by_hash() -> bool:
    """Whether the kernel finds connected UDP sockets by a hash of all four parts (Linux 6.13)."""
    numbers = os.uname().release.split(".")[:2]
    return os.uname().sysname == "Linux" and [int(text) for text in numbers] >= [6, 13]


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
    try:
        if owner is not None:
            os.fchown(sock.fileno(), *owner)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        set_v6only(sock, target.family, v6only)
        prepare_listener(sock, str(target.sockaddr[0]))
        _set_buffers(sock)
        socket_options.to_listen(options, target.family, is_udp=True).apply(sock)
        sock.bind(target.sockaddr)
    except BaseException:
        sock.close()
        raise
    return sock


def prepare_listener(sock: socket.socket, host: str) -> None:
    """Set non-blocking mode, and whether to tell which address a client wrote to."""
    sock.setblocking(False)
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


def flow_socket(listener: socket.socket, peer: bytes, how: How) -> socket.SocketType:
    """Make the own socket of a flow: bound where ``listener`` is, connected to the client.

    Between the two steps it is one more listener, and may be given datagrams of others: the caller
    reads it dry and looks who sent what. The caller owns it. Raises OSError; EACCES when the port
    is below 1024 and the process may not bind there.
    """
    host, port = peers.local_host(peer) or listener.getsockname()[0], listener.getsockname()[1]
    client = peers.address_of(peer)
    local: IpSockAddr = (host, port) if len(client) == 2 else (host, port, 0, client[3])
    sock = socket.SocketType(listener.family, _NONBLOCKING_DATAGRAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        set_v6only(sock, listener.family, is_v6only(listener))
        _set_buffers(sock)
        how.apply(sock)
        sock.bind(local)
        sock.connect(client)
    except BaseException:
        sock.close()
        raise
    return sock


def upstream_socket(target: Target, source: SockAddr | None, how: How) -> socket.SocketType:
    """Make a non-blocking UDP socket connected to ``target``, bound to ``source`` if there is one.

    The caller owns it. Raises OSError: EMFILE and the like, ENETUNREACH, EADDRNOTAVAIL.
    """
    sock = socket.SocketType(target.family, _NONBLOCKING_DATAGRAM)
    try:
        sock.setblocking(False)
        _set_buffers(sock)
        how.apply(sock)
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
