"""Changes of interfaces and addresses, as the kernel reports them: rtnetlink(7). Linux only."""

from __future__ import annotations

import errno
import socket
import struct
from typing import Final

# linux/rtnetlink.h and linux/netlink.h; Python has names for few of them.
_NETLINK_ROUTE: Final = 0
_GROUPS: Final = 0x1 | 0x10 | 0x100  # RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR
_HEADER: Final = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
NEW_LINK, DELETED_LINK, NEW_ADDRESS, DELETED_ADDRESS = 16, 17, 20, 21
_CHANGES: Final = frozenset({NEW_LINK, DELETED_LINK, NEW_ADDRESS, DELETED_ADDRESS})
_MOST_BYTES: Final = 1 << 16
# Messages read at once; the rest comes with the next event. Arbitrary.
_MOST_MESSAGES: Final = 64


def is_change(datagram: bytes) -> bool:
    """Whether messages of the kernel are about an interface or an address. Pure."""
    at = 0
    while at + _HEADER.size <= len(datagram):
        length, kind, _, _, _ = _HEADER.unpack_from(datagram, at)
        if kind in _CHANGES:
            return True
        if length < _HEADER.size:
            return False
        at += length + 3 & ~3  # NLMSG_ALIGN
    return False


class Changes:
    """A socket on which the kernel reports changes. Owns it."""

    def __init__(self) -> None:
        """Raises OSError, or AttributeError on another system."""
        kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        self._sock = socket.socket(socket.AF_NETLINK, kind, _NETLINK_ROUTE)
        try:
            self._sock.bind((0, _GROUPS))
        except BaseException:
            self._sock.close()
            raise

    def fileno(self) -> int:
        """Readable when there is something to read."""
        return self._sock.fileno()

    def read(self) -> bool:
        """Take the reports of the kernel. Returns whether something changed. Never blocks.

        An overflow of the socket (ENOBUFS) counts as a change.
        """
        found = False
        for _ in range(_MOST_MESSAGES):
            try:
                found |= is_change(self._sock.recv(_MOST_BYTES))
            except BlockingIOError:
                return found
            except OSError as err:
                found |= err.errno == errno.ENOBUFS
        return found

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()
