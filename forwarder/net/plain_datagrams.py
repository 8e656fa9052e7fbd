"""What ``net.datagrams`` does, one datagram per call and with Python's sockets only.

For systems without recvmmsg(2) or with other tables, and as the yardstick of the batched way: both
pass the same tests.
"""

from __future__ import annotations

import socket
import struct
import sys
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from forwarder.net import peers
from forwarder.net.datagrams import (
    DOUBTFUL,
    FULL,
    ICMP,
    MAX_REPORTS,
    REFUSED,
    REPORTED,
    SLOT_BYTES,
    SLOTS,
    SOL_UDP,
    UDP_GRO,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from forwarder.net.datagrams import Destination

T = TypeVar("T")

_PKTINFO4: Final = struct.Struct("=I4s4s")
_PKTINFO6: Final = struct.Struct("=16sI")
_CONTROL_BYTES: Final = 128


@contextmanager
def _borrowed(fd: int) -> Iterator[socket.socket]:
    """The socket of a descriptor that stays the caller's."""
    sock = socket.socket(fileno=fd)
    try:
        yield sock
    finally:
        sock.detach()


class PlainBatch:
    """As :class:`forwarder.net.datagrams.Batch`; see there for what its methods promise."""

    def __init__(self) -> None:
        self.errors = 0
        self.dropped = 0
        self.on_report: Callable[[int, int], None] = lambda _fd, _number: None
        self._view = memoryview(bytearray(SLOT_BYTES))
        self._slots: list[bytes] = []
        self._peers: list[bytes] = []
        self._joining: set[int] = set()  # descriptors

    def prepare(self, sock: socket.SocketType) -> None:
        """Notice whether the kernel hands over several datagrams of this socket as one.

        It does if the socket comes from a worker that goes the batched way.
        """
        try:
            is_joining = sock.getsockopt(SOL_UDP, UDP_GRO) != 0
        except OSError:  # a system that has no such thing
            is_joining = False
        if is_joining:
            self._joining.add(sock.fileno())
        else:  # the number may have been another one's
            self._joining.discard(sock.fileno())

    def receive(self, fd: int) -> int:
        """Receive what a connected socket has. Returns how many slots were filled."""
        self._slots = []
        with _borrowed(fd) as sock:
            if fd in self._joining:
                return self._receive_joined(sock)
            receive = partial(sock.recv_into, self._view)
            while len(self._slots) < SLOTS and (count := self._receive(fd, receive)) is not None:
                self._slots.append(bytes(self._view[:count]))
        return len(self._slots)

    def _receive_joined(self, sock: socket.socket) -> int:
        receive = partial(sock.recvmsg_into, [self._view], _CONTROL_BYTES)
        while len(self._slots) < SLOTS:
            found = self._receive(sock.fileno(), receive)
            if found is None:
                break
            content, ancillary = bytes(self._view[: found[0]]), found[1]
            size = _segment_bytes(ancillary) or len(content) or 1
            self._slots += (content[at : at + size] for at in range(0, len(content) or 1, size))
        return len(self._slots)

    def _receive(self, fd: int, receive: Callable[[], T]) -> T | None:
        """One datagram; None if there is none, or only errors, which are counted."""
        for _ in range(MAX_REPORTS):
            try:
                return receive()
            except BlockingIOError:
                return None
            except OSError as err:
                number = err.errno or 0
                self.errors += number in ICMP
                if number in REFUSED:
                    self.on_report(fd, number)
        return None

    def receive_from(self, fd: int) -> int:
        """Receive from a socket that is not connected; :meth:`peer` gives the senders."""
        self._slots, self._peers = [], []
        with _borrowed(fd) as sock:
            receive = partial(sock.recvmsg_into, [self._view], _CONTROL_BYTES)
            while len(self._slots) < SLOTS and (found := self._receive(fd, receive)) is not None:
                count, ancillary, _, address = found
                self._slots.append(bytes(self._view[:count]))
                self._peers.append(peers.pack(sock.family, address, _local(ancillary)))
        return len(self._slots)

    def peer(self, slot: int) -> bytes:
        """The sender of a slot, and the address of ours it wrote to, if the socket reports that."""
        return self._peers[slot]

    def total(self, first: int, last: int) -> int:
        """How many bytes the slots from ``first`` to before ``last`` hold."""
        return sum(map(len, self._slots[first:last]))

    def datagrams(self, first: int, last: int) -> list[bytes]:
        """The datagrams in the slots from ``first`` to before ``last``."""
        return self._slots[first:last]

    def send(self, to: Destination, first: int, last: int) -> int:
        """Send slots on, in order. Returns the first one that was not taken, else ``last``."""
        for slot in range(first, last):
            if not self.send_copy(to, self._slots[slot]):
                return slot
        return last

    def send_copy(self, to: Destination, content: bytes | memoryview) -> bool:
        """Send one datagram. False if the socket is full."""
        with _borrowed(to.fd) as sock:
            for reports in range(MAX_REPORTS):
                try:
                    _send(sock, to.peer, content)
                except OSError as err:
                    if err.errno in FULL:
                        return False
                    if err.errno in REFUSED:
                        self.on_report(to.fd, err.errno)
                    if err.errno in REPORTED:
                        self.errors += 1
                    elif reports or err.errno not in DOUBTFUL:
                        break
                else:
                    return True
        self.dropped += 1
        return True


def _send(sock: socket.socket, peer: bytes | None, content: bytes | memoryview) -> None:
    if peer is None:
        sock.send(content)
        return
    local = peers.split(peer)[1]
    ancillary: list[tuple[int, int, bytes]] = []
    if len(local) == 4:
        ancillary = [(socket.IPPROTO_IP, peers.IP_PKTINFO, _PKTINFO4.pack(0, local, bytes(4)))]
    elif local:
        ancillary = [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, _PKTINFO6.pack(local, 0))]
    sock.sendmsg([content], ancillary, 0, peers.address_of(peer))


def _segment_bytes(ancillary: list[tuple[int, int, bytes]]) -> int:
    """The size of all datagrams that were received as one but the last; 0: it is one."""
    for level, kind, content in ancillary:
        if (level, kind) == (SOL_UDP, UDP_GRO):
            return int.from_bytes(content, sys.byteorder)
    return 0


def _local(ancillary: list[tuple[int, int, bytes]]) -> bytes:
    """The address of ours that a datagram was sent to, if the socket reports it."""
    for level, kind, content in ancillary:
        if (level, kind) == (socket.IPPROTO_IP, peers.IP_PKTINFO):
            return bytes(_PKTINFO4.unpack_from(content)[2])
        if (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
            return bytes(_PKTINFO6.unpack_from(content)[0])
    return b""
