"""Many datagrams per system call: what one worker receives and sends at once. Linux, by ctypes.

Holds datagrams only between a receive and the sends that follow it. Makes no socket, knows no flow.

Theory of operation
-------------------
A batch is SLOTS buffers, with the tables that recvmmsg(2) and sendmmsg(2) want in front of them.
All of it is made once. The tables are used as arrays of 64-bit words, so that "send what was
received" is one strided copy of the lengths, whatever the number of datagrams: Python does nothing
per datagram.

Runs of datagrams of one size leave by a single sendmsg with UDP_SEGMENT (udp(7), Linux 4.18): they
pass the stack as one packet and are cut apart behind it. With UDP_GRO (Linux 5.0) the same happens
on the way in: a slot then holds several datagrams, all but the last of the size that a control
message gives; the last may be shorter. Both keep the boundaries of datagrams.

The kernel reports an ICMP error of an earlier datagram in the next call, which does nothing else;
the error is counted, ``on_report`` is called, and the call is repeated.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket
import struct
import sys
from typing import TYPE_CHECKING, Final

from forwarder.net.peers import IP_PKTINFO, SOCKADDR_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

# 32, 64 and 128 slots gave the same rate within noise; the kernel takes at least 64 segments.
SLOTS: Final = 64
# The largest UDP payload is 65,507 bytes over IPv4, 65,527 over IPv6. Untouched pages cost nothing.
SLOT_BYTES: Final = 65536
MAX_DATAGRAM: Final = 65507

SOL_UDP: Final = 17
UDP_SEGMENT: Final = 103  # linux/udp.h
UDP_GRO: Final = 104
_IPV6_PKTINFO: Final = 50  # linux/in6.h

# struct mmsghdr on 64-bit Linux, in words: name, namelen, iov, iovlen, control, controllen, flags,
# len. The fields of 4 bytes have 4 bytes of padding behind them, so they can be used as words.
_WORDS: Final = 8
_NAME, _NAMELEN, _IOV, _IOVLEN, _CONTROL, _CONTROLLEN, _FLAGS, _LEN = range(_WORDS)
_NAME_BYTES: Final = 32  # sockaddr_in6 has 28
_CONTROL_BYTES: Final = 64  # two control messages of 40 and 24 bytes

# A cmsghdr (length, level, type) and what follows it, cmsg(3).
_HEADER: Final = struct.Struct("=Qii")
_SEGMENT: Final = struct.Struct("=QiiH6x")
_PKTINFO4: Final = struct.Struct("=Qiii4s4s4x")  # interface, local address, destination
_PKTINFO6: Final = struct.Struct("=Qii16sI4x")  # local address, interface

# How many errors of earlier datagrams one call may report before it is given up.
MAX_REPORTS: Final = 4
FULL: Final = frozenset({errno.EAGAIN, errno.EWOULDBLOCK})
# ICMP errors of earlier datagrams, reported by a call that has done nothing else.
REPORTED: Final = frozenset(
    {
        errno.ECONNREFUSED,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.EHOSTDOWN,
        errno.ENOPROTOOPT,
        errno.EPROTO,
    }
)
# Also what a send reports when nothing can be sent there now: a firewall, a route that forbids it
# or has gone with its device.
REFUSED: Final = REPORTED | {errno.EACCES, errno.EPERM, errno.ENETDOWN, errno.ENODEV}
# What a receive reports of a datagram sent before; EMSGSIZE: a link was too narrow for it.
ICMP: Final = REFUSED | {errno.EMSGSIZE}
# What a send reports of this datagram, or of an earlier one: a second send shows which.
DOUBTFUL: Final = frozenset({errno.EMSGSIZE, errno.EACCES})
# What a system or a device reports that cannot cut segments, or none of this size.
_UNSEGMENTABLE: Final = frozenset({errno.EINVAL, errno.EIO, errno.EMSGSIZE, errno.EOPNOTSUPP})


def _load() -> ctypes.CDLL:
    # PyDLL keeps the GIL: no call here blocks, and releasing it costs more than some of them.
    # Without argtypes, whose conversions cost 0.3 us a call: ints are passed as C ints, which all
    # numbers here are, and tables as the pointers that were made for them.
    return ctypes.PyDLL(None, use_errno=True)


_libc: Final = _load()
_DONTWAIT: Final = int(socket.MSG_DONTWAIT)  # an enum's member is not a plain int to ctypes


def is_supported() -> bool:
    """Whether this system has the calls, and tables that look as they are written here."""
    has_layout = ctypes.sizeof(ctypes.c_void_p) == 8 and sys.byteorder == "little"
    return sys.platform.startswith("linux") and has_layout and hasattr(_libc, "recvmmsg")


class Destination:
    """Where datagrams go: a socket, and the peer if it is not connected.

    ``peer`` is as in ``net.peers``; None for a connected socket. ``segment_bytes`` is the largest
    size of datagrams that are sent as a run; it shrinks when the path turns out to be narrower.
    """

    __slots__ = ("fd", "peer", "segment_bytes")

    def __init__(self, fd: int = -1, peer: bytes | None = None) -> None:
        """``fd`` stays the caller's."""
        self.fd = fd
        self.peer = peer
        self.segment_bytes = MAX_DATAGRAM


class _Area:
    """Memory with a fixed address, zero at first. Its pages exist once they are touched."""

    __slots__ = ("_memory", "address", "view", "words")

    def __init__(self, size: int) -> None:
        self._memory = mmap.mmap(-1, size)
        self.view = memoryview(self._memory)
        self.words = self.view.cast("Q")
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))


class _Table:
    """One mmsghdr per slot, and one for the scratch slot behind them."""

    __slots__ = ("_area", "controllens", "lens", "namelens", "pointers")

    def __init__(
        self, iovecs: _Area, names: _Area | None, controls: _Area, *, shared: bool
    ) -> None:
        """``shared``: all slots have the same name and control message, else each its own."""
        self._area = _Area((SLOTS + 1) * _WORDS * 8)
        words = self._area.words
        for slot in range(SLOTS + 1):
            own = 0 if shared else slot
            at = slot * _WORDS
            words[at + _NAME] = names.address + own * _NAME_BYTES if names else 0
            words[at + _CONTROL] = controls.address + own * _CONTROL_BYTES
            words[at + _IOV] = iovecs.address + 16 * slot
            words[at + _IOVLEN] = 1
        # Where the header of each slot is.
        self.pointers = [
            ctypes.c_void_p(self._area.address + slot * _WORDS * 8) for slot in range(SLOTS + 1)
        ]
        self.namelens = words[_NAMELEN::_WORDS]
        self.controllens = words[_CONTROLLEN::_WORDS]
        self.lens = words[_LEN::_WORDS]


def _every_slot(value: int) -> memoryview:
    words = _Area((SLOTS + 1) * 8).words
    for slot in range(SLOTS + 1):
        words[slot] = value
    return words


# A length for all slots, to be copied in one go.
_SAME: Final = {
    length: _every_slot(length)
    for length in (0, 16, 28, _NAME_BYTES, _PKTINFO4.size, _PKTINFO6.size, _CONTROL_BYTES)
}
_FULL_NAMES: Final = _SAME[_NAME_BYTES]
_FULL_CONTROLS: Final = _SAME[_CONTROL_BYTES]


class Batch:
    """The datagrams of one receive. Slots count from 0 and are good until the next receive.

    ``errors`` counts ICMP errors, ``dropped`` the datagrams that could not be sent. ``on_report``
    is called with a descriptor and an errno when it leads to no peer. That happens within a send or
    receive, so it must not touch sockets.
    """

    def __init__(self) -> None:
        self.errors = 0
        self.dropped = 0
        self.on_report: Callable[[int, int], None] = lambda _fd, _number: None
        self._data = _Area((SLOTS + 1) * SLOT_BYTES)
        self._iovecs = _Area((SLOTS + 1) * 16)
        self._send_iovecs = _Area((SLOTS + 1) * 16)
        for slot in range(SLOTS + 1):
            for iovecs in (self._iovecs, self._send_iovecs):
                iovecs.words[2 * slot] = self._data.address + slot * SLOT_BYTES
                iovecs.words[2 * slot + 1] = SLOT_BYTES
        self._send_lens = self._send_iovecs.words[1::2]
        self._names = _Area((SLOTS + 1) * _NAME_BYTES)
        self._controls = _Area((SLOTS + 1) * _CONTROL_BYTES)
        # A receive from a connected socket wants no names, so there are two tables.
        self._connected = _Table(self._iovecs, None, self._controls, shared=False)
        self._connected.controllens[:] = _FULL_CONTROLS
        self._unconnected = _Table(self._iovecs, self._names, self._controls, shared=False)
        self._unconnected.namelens[:] = _FULL_NAMES
        self._unconnected.controllens[:] = _FULL_CONTROLS
        self._lens = self._connected.lens
        self._namelens: list[int] = []
        self._told: list[int] = []  # bytes of control messages, by slot
        self._segments: dict[int, int] = {}  # slot to size of its datagrams, where it has several
        self._to = _Area(_NAME_BYTES)
        self._ancillary = _Area(_CONTROL_BYTES)
        self._send_table = _Table(self._send_iovecs, self._to, self._ancillary, shared=True)
        self._run = _Area(_WORDS * 8)  # the header of a run that leaves as one
        self._run_pointer = ctypes.c_void_p(self._run.address)
        self._run.words[_NAME] = self._to.address
        self._run.words[_CONTROL] = self._ancillary.address
        self._peer: bytes | None = None  # whose address is in the send table and the run
        self._namelen = self._controllen = 0

    # -- receiving

    def prepare(self, sock: socket.SocketType) -> None:
        """Let the kernel hand over several datagrams of a connected socket as one, if it can."""
        try:
            sock.setsockopt(SOL_UDP, UDP_GRO, 1)
        except OSError:  # before Linux 5.0: they come one by one
            return

    def receive(self, fd: int) -> int:
        """Receive what a connected socket has. Returns how many slots were filled.

        Fewer than SLOTS: the socket was empty, or had only errors, which are counted. ``fd`` is
        non-blocking.
        """
        table = self._connected
        count = self._receive(fd, table)
        if self._segments:
            self._segments = {}
        if count == 1:
            if table.controllens[0]:
                self._note_segments([table.controllens[0]])
            table.controllens[0] = _CONTROL_BYTES
        elif count:
            told = table.controllens[:count].tolist()
            if any(told):
                self._note_segments(told)
            table.controllens[:count] = _FULL_CONTROLS[:count]
        return count

    def receive_from(self, fd: int) -> int:
        """Receive from a socket that is not connected; :meth:`peer` gives the senders."""
        table = self._unconnected
        if self._segments:
            self._segments = {}
        count = self._receive(fd, table)
        self._told = table.controllens[:count].tolist()
        self._namelens = table.namelens[:count].tolist()
        table.namelens[:count] = _FULL_NAMES[:count]
        table.controllens[:count] = _FULL_CONTROLS[:count]
        return count

    def _receive(self, fd: int, table: _Table) -> int:
        self._lens = table.lens
        for _ in range(MAX_REPORTS):
            count: int = _libc.recvmmsg(fd, table.pointers[0], SLOTS, _DONTWAIT, None)
            if count >= 0:
                return count
            number = ctypes.get_errno()
            if number in FULL:
                break
            self.errors += number in ICMP
            if number in REFUSED:
                self.on_report(fd, number)
        return 0

    def peer(self, slot: int) -> bytes:
        """The sender of a slot, and the address of ours it wrote to, if the socket reports that."""
        start = slot * _NAME_BYTES
        name = bytes(self._names.view[start : start + self._namelens[slot]])
        told = self._told[slot]
        if not told:
            return name
        start = slot * _CONTROL_BYTES
        control = self._controls.view[start : start + told]
        at = 0
        while at + _HEADER.size <= told:  # an inherited socket may report more than we asked for
            length, level, kind = _HEADER.unpack_from(control, at)
            if (level, kind) == (socket.IPPROTO_IP, IP_PKTINFO):
                return name + bytes(control[at + 24 : at + 28])  # not where to answer from
            if (level, kind) == (socket.IPPROTO_IPV6, _IPV6_PKTINFO):
                return name + bytes(control[at + 16 : at + 32])
            at += length + 7 & ~7
        return name

    def total(self, first: int, last: int) -> int:
        """How many bytes the slots from ``first`` to before ``last`` hold."""
        return self._lens[first] if last - first == 1 else sum(self._lens[first:last])

    def datagrams(self, first: int, last: int) -> list[bytes]:
        """Copies of the datagrams in the slots from ``first`` to before ``last``."""
        found = []
        for slot in range(first, last):
            start = slot * SLOT_BYTES
            content = bytes(self._data.view[start : start + self._lens[slot]])
            size = self._segments.get(slot, 0) or len(content) or 1
            found += [content[at : at + size] for at in range(0, len(content) or 1, size)]
        return found

    def _note_segments(self, told: list[int]) -> None:
        """Note which slots hold several datagrams."""
        for slot, length in enumerate(told):
            if length >= _SEGMENT.size - 6:
                at = slot * _CONTROL_BYTES
                _, level, kind, size = _SEGMENT.unpack_from(self._controls.view, at)
                if (level, kind) == (SOL_UDP, UDP_GRO) and 0 < size < self._lens[slot]:
                    self._segments[slot] = size

    # -- sending

    def send(self, to: Destination, first: int, last: int) -> int:
        """Send the slots from ``first`` to before ``last`` on, in order.

        Returns the first slot that was not taken because the socket is full, ``last`` if there is
        none. What cannot be sent for other reasons is dropped and counted.
        """
        count = last - first
        if count == 1:
            if to.peer is None and self._send_alone(to.fd, first):
                return last
            self._send_lens[first] = self._lens[first]
        else:
            self._send_lens[first:last] = self._lens[first:last]
        if to.peer != self._peer:
            self._address(to.peer)
        if self._segments:
            return self._send_segmented(to, first, last)
        if count > 1:
            lens = self._lens[first:last].tolist()
            size = lens[0]
            alike = lens.count(size)
            is_run = alike == count or (alike == count - 1 and 0 < lens[-1] < size)
            if is_run and 0 < size <= to.segment_bytes:
                return self._send_runs(to, first, last, size)
        return self._send_each(to, first, last)

    def _send_alone(self, fd: int, slot: int) -> bool:
        """Send one datagram in the cheapest way, 0.8 us less than as a batch. False: use that."""
        size = self._lens[slot]
        if not size or self._segments:
            return False
        start = slot * SLOT_BYTES
        try:
            os.write(fd, self._data.view[start : start + size])
        except OSError as err:
            # An error of an earlier datagram is reported only once.
            if err.errno in REPORTED:
                self.errors += 1
                self.on_report(fd, err.errno)
            return False
        return True

    def send_copy(self, to: Destination, content: bytes | memoryview) -> bool:
        """Send one datagram that is in no slot. False if the socket is full."""
        if to.peer != self._peer:
            self._address(to.peer)
        if len(content) > SLOT_BYTES:
            self.dropped += 1
            return True
        start = SLOTS * SLOT_BYTES
        self._data.view[start : start + len(content)] = content
        self._send_lens[SLOTS] = len(content)
        return self._send_each(to, SLOTS, SLOTS + 1) > SLOTS

    def _address(self, peer: bytes | None) -> None:
        """Write the peer, and which of our addresses to send from, into the send table."""
        self._peer = peer
        namelen = controllen = 0
        if peer:
            namelen = SOCKADDR_BYTES[peer[0] | peer[1] << 8]
            self._to.view[:namelen] = peer[:namelen]
            controllen = self._write_local(peer[namelen:])
        if (namelen, controllen) != (self._namelen, self._controllen):
            self._namelen, self._controllen = namelen, controllen
            self._send_table.namelens[:] = _SAME[namelen]
            self._send_table.controllens[:] = _SAME[controllen]
            self._run.words[_NAMELEN] = namelen

    def _write_local(self, local: bytes) -> int:
        """Write the control message that sets the source address. Returns its length."""
        view = self._ancillary.view
        if len(local) == 4:
            kind = (socket.IPPROTO_IP, IP_PKTINFO)
            _PKTINFO4.pack_into(view, 0, 28, *kind, 0, local, bytes(4))
            return _PKTINFO4.size
        if local:
            kind = (socket.IPPROTO_IPV6, _IPV6_PKTINFO)
            _PKTINFO6.pack_into(view, 0, 36, *kind, local, 0)
            return _PKTINFO6.size
        return 0

    def _send_runs(self, to: Destination, first: int, last: int, size: int) -> int:
        """Send datagrams of one size, the last perhaps shorter, in as few calls as possible."""
        most = MAX_DATAGRAM // size
        while first < last:
            count = min(most, last - first)
            sent = self._send_run(to, first, count, size)
            if sent is None:
                return self._send_each(to, first, last)
            if not sent:
                return first
            first += count
        return last

    def _send_run(self, to: Destination, slot: int, count: int, size: int) -> bool | None:
        """One call for ``count`` slots: True if sent, False if full, None if impossible."""
        words = self._run.words
        words[_IOV] = self._send_iovecs.address + 16 * slot
        words[_IOVLEN] = count
        words[_CONTROLLEN] = self._controllen + _SEGMENT.size
        at = self._controllen
        _SEGMENT.pack_into(self._ancillary.view, at, 18, SOL_UDP, UDP_SEGMENT, size)
        for _ in range(MAX_REPORTS):
            if _libc.sendmsg(to.fd, self._run_pointer, _DONTWAIT) >= 0:
                return True
            number = ctypes.get_errno()
            if number in FULL:
                return False
            if number in _UNSEGMENTABLE:
                to.segment_bytes = size - 1
                return None
            if number not in REPORTED:
                return None
            self.errors += 1
            self.on_report(to.fd, number)
        return None

    def _send_each(self, to: Destination, first: int, last: int) -> int:
        """Send slot by slot. An error is of the first slot, or of an earlier datagram."""
        reports = 0
        while first < last:
            at = self._send_table.pointers[first]
            sent: int = _libc.sendmmsg(to.fd, at, last - first, _DONTWAIT)
            if sent > 0:
                first += sent
                reports = 0
                continue
            number = ctypes.get_errno()
            if number in FULL:
                break
            reports += 1
            if number in REFUSED:
                self.on_report(to.fd, number)
            if number in REPORTED and reports < MAX_REPORTS:
                self.errors += 1
                continue
            if number in DOUBTFUL and reports == 1:
                continue
            self.dropped += 1
            first += 1
            reports = 0
        return first

    def _send_segmented(self, to: Destination, first: int, last: int) -> int:
        """Send slots of which some hold several datagrams; these leave as they came."""
        for slot in range(first, last):
            size = self._segments.get(slot)
            if size is None:
                sent: bool | None = self._send_each(to, slot, slot + 1) > slot
            elif size <= to.segment_bytes:
                sent = self._send_run(to, slot, 1, size)
            else:
                sent = None
            if sent is None:
                sent = self._send_apart(to, slot)
            if not sent:
                return slot
        return last

    def _send_apart(self, to: Destination, slot: int) -> bool:
        """Send the datagrams of a slot one by one. False if full: the slot then holds the rest."""
        found = self.datagrams(slot, slot + 1)
        for nth, content in enumerate(found):
            if not self.send_copy(to, content):
                rest = b"".join(found[nth:])
                self._data.view[slot * SLOT_BYTES : slot * SLOT_BYTES + len(rest)] = rest
                self._lens[slot] = self._send_lens[slot] = len(rest)
                if nth == len(found) - 1:
                    self._segments.pop(slot, None)
                return False
        return True
