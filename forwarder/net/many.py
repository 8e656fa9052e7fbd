"""Datagrams for many: to a multicast group (RFC 1112, RFC 4291 section 2.7) or a broadcast address.

The kernel gives a copy of these to every socket that they match, to each of a SO_REUSEPORT group,
too (Linux, __udp4_lib_mcast_deliver). So one socket of the group is appointed to take them. It is
marked by an option of the socket itself, which goes with the socket to a process that inherits or
adopts it, and keeps the kernel from copying multicast to the others. (Of IPv4 multicast that
matches one socket only, the kernel then chooses one of the group, as for unicast:
udp_v4_early_demux and inet_steal_sock, Linux 6.18.) Broadcasts still come to all; sockets that are
not appointed skip them.
"""

from __future__ import annotations

import errno
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from forwarder.net.sockets import Target

# linux/in.h and linux/in6.h; Python has no names for them. Whether a socket gets what comes for
# groups that others have joined; by default it does.
_IP_MULTICAST_ALL: Final = 49
_IPV6_MULTICAST_ALL: Final = 29  # Linux 4.20
# linux/in.h: let a barred source into a group again, with a struct group_source_req.
_MCAST_UNBLOCK_SOURCE: Final = 44
_ANY_SOURCE: Final[dict[int, str]] = {  # of no host
    socket.AF_INET: "192.0.2.1",
    socket.AF_INET6: "2001:db8::1",
}
_MAPPED: Final = bytes(10) + b"\xff\xff"  # an IPv4 address as an IPv6 one, RFC 4291 2.5.5.2
_LIMITED_BROADCAST: Final = b"\xff\xff\xff\xff"
_ANY_PORT: Final = 9  # nothing is sent


def share(sock: socket.socket, target: Target, device: str | None, *, is_taker: bool) -> None:
    """Let a socket take datagrams for many, or leave them to another of its SO_REUSEPORT group.

    ``target`` is where it is bound, ``device`` what it is bound to. Raises OSError as :func:`join`.
    """
    with suppress(OSError):  # an old kernel: multicast comes to all, as broadcasts do
        sock.setsockopt(socket.IPPROTO_IP, _IP_MULTICAST_ALL, is_taker)
    if sock.family == socket.AF_INET6:
        with suppress(OSError):
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MULTICAST_ALL, is_taker)
    if is_taker:
        join(sock, target, device)


def is_appointed(sock: socket.socket) -> bool:
    """Whether it takes datagrams for many; asked each time, as other processes may appoint."""
    try:
        return bool(sock.getsockopt(socket.IPPROTO_IP, _IP_MULTICAST_ALL))
    except OSError:
        return True


def is_multicast(packed: bytes) -> bool:
    """Whether an address, of 4 or 16 bytes, is that of a group."""
    address = packed[12:] if len(packed) == 16 and packed.startswith(_MAPPED) else packed
    return address[0] == 0xFF if len(address) == 16 else 224 <= address[0] < 240


def is_group(target: Target) -> bool:
    """Whether a socket address is that of a group."""
    return not target.is_unix and is_multicast(_packed(target))


def _packed(target: Target) -> bytes:
    return socket.inet_pton(target.family, str(target.sockaddr[0]).partition("%")[0])


def is_copied(packed: bytes) -> bool:
    """Whether all sockets of a group may get a copy of datagrams for many to this address."""
    is_ipv4 = len(packed) == 4 or packed.startswith(_MAPPED)
    return not (is_ipv4 and is_multicast(packed))


def is_for_many(packed: bytes) -> bool:
    """Whether an address of a datagram, of 4 or 16 bytes, is a group's or a broadcast address.

    Only the kernel knows which IPv4 addresses are broadcast addresses. Never blocks. Raises OSError
    when no descriptor is left to ask it with.
    """
    if is_multicast(packed):
        return True
    address = packed[-4:]
    if len(packed) == 16 and not packed.startswith(_MAPPED):
        return False
    return address == _LIMITED_BROADCAST or _is_broadcast(socket.inet_ntoa(address))


def _is_broadcast(host: str) -> bool:
    """Whether the kernel wants SO_BROADCAST before it sends there, socket(7)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((host, _ANY_PORT))
        except OSError as err:
            return err.errno == errno.EACCES
    return False


def join(sock: socket.socket, target: Target, device: str | None) -> None:
    """Join the group that a socket is bound to, if it is one, on a device.

    Without a device, on that of the zone or of the route to the group. Harmless for a member.
    Raises OSError: ENODEV if there is no such device or route.
    """
    packed = _packed(target)
    if not is_multicast(packed):
        return
    index = socket.if_nametoindex(device) if device else 0
    if target.family == socket.AF_INET:
        level, name = socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP
        member = struct.pack("=4s4si", packed, bytes(4), index)
    else:
        scope = target.sockaddr[3] if len(target.sockaddr) == 4 else 0
        level, name = socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP
        member = struct.pack("=16si", packed, index or int(scope))
    try:
        sock.setsockopt(level, name, member)
    except OSError as err:
        if err.errno != errno.EADDRINUSE:  # a member already
            raise


def joined_on(sock: socket.socket, target: Target) -> tuple[int, ...]:
    """The indexes of the interfaces on which a socket is in the group that it is bound to.

    Empty if it is bound to none, or where the system does not tell. Asks the kernel for each
    interface there is. Never blocks, never raises.
    """
    if not is_group(target):
        return ()
    with suppress(OSError):
        return tuple(index for index, _ in socket.if_nameindex() if _is_in(sock, target, index))
    return ()


def _is_in(sock: socket.socket, target: Target, index: int) -> bool:
    """Whether a socket is a member on one interface.

    A member is told that the source was not barred, others that they are no members (EINVAL).
    Neither changes anything. (The kernel can be asked for the sources of a group, too, but by
    getsockopt with an argument, which Python does not have.)
    """
    level = socket.IPPROTO_IP if target.family == socket.AF_INET else socket.IPPROTO_IPV6
    group = _storage(target.family, _packed(target))
    source = _storage(target.family, socket.inet_pton(target.family, _ANY_SOURCE[target.family]))
    try:
        sock.setsockopt(level, _MCAST_UNBLOCK_SOURCE, struct.pack("@I4x", index) + group + source)
    except OSError as err:
        return err.errno == errno.EADDRNOTAVAIL
    return False


def _storage(family: int, packed: bytes) -> bytes:
    """A struct sockaddr_storage without a port."""
    name = struct.pack("=HH", family, 0) + (packed if len(packed) == 4 else bytes(4) + packed)
    return name.ljust(128, b"\0")


def why_left(joined: Iterable[int]) -> str:
    """Why a socket that joined on some interfaces gets nothing for its group; "" if it does.

    A recreated interface has another index, and is not joined.
    """
    for index in joined:
        try:
            socket.if_indextoname(index)
        except OSError:
            return "the network interface on which it joined its group has gone"
    return ""
