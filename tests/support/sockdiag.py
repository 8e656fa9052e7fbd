"""TCP sockets of this network namespace: sock_diag(7).

``/proc/net/tcp`` says the same, but the kernel walks through its whole table of connections for
that, and tells it in pieces: 7 ms if there are none, and rows are missed or told twice while others
come and go.
"""

from __future__ import annotations

import itertools
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from support import procfs

if TYPE_CHECKING:
    from collections.abc import Iterator

ESTABLISHED, SYN_SENT, TIME_WAIT, CLOSE_WAIT, LISTEN = 1, 2, 6, 8, 10  # include/net/tcp_states.h
_SOCK_DIAG: Final = 4  # NETLINK_SOCK_DIAG, linux/netlink.h
_BY_FAMILY: Final = 20  # linux/sock_diag.h
_ONE, _ALL = 0x1, 0x301  # NLM_F_REQUEST, and with it NLM_F_DUMP
_HEADER: Final = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
# struct inet_diag_req_v2, linux/inet_diag.h: family, protocol, extensions, states, which socket.
_REQUEST: Final = struct.Struct("=BBBxI48s")
# Its struct inet_diag_sockid: both ports and addresses; any interface, any cookie.
_WHICH: Final = struct.Struct("!HH16s16sIII")
_ANY: Final = bytes(_WHICH.size)
# struct inet_diag_msg: family, state; which; expiry, queues to read and write, user, inode.
_ANSWER: Final = struct.Struct("=BBxx48sIIIII")


@dataclass(frozen=True)
class Tcp:
    """A socket; ``peer`` is zeros if there is none.

    ``waiting`` is what is in its queue to read: of a listener, who can be accepted.
    """

    state: int
    local: tuple[str, int]
    waiting: int
    inode: int
    peer: tuple[str, int]


def listening() -> list[Tcp]:
    """All listening sockets of IPv4."""
    return list(_ask(_ALL, 1 << LISTEN, _ANY))


def connected(local: tuple[str, int], peer: tuple[str, int]) -> Tcp | None:
    """The socket of a connection of IPv4, accepted or not."""
    hosts = [socket.inet_aton(host) for host, _ in (local, peer)]  # zeros follow
    which = _WHICH.pack(local[1], peer[1], *hosts, 0, 0xFFFFFFFF, 0xFFFFFFFF)
    found = [sock for sock in _ask(_ONE, 0xFFFFFFFF, which) if sock.state == ESTABLISHED]
    return found[0] if found else None


def states(pid: int) -> list[int]:
    """What state each of the sockets of a process is in that has not ended."""
    targets = procfs.descriptors(pid).values()
    inodes = {int(target[8:-1]) for target in targets if target.startswith("socket:")}
    families = (socket.AF_INET, socket.AF_INET6)
    alive = 0xFFFFFFFF & ~(1 << TIME_WAIT)
    found = {sock.inode: sock.state for it in families for sock in _ask(_ALL, alive, _ANY, it)}
    return [state for inode, state in found.items() if inode in inodes]


def owned(pid: int) -> list[Tcp]:
    """The sockets of a process, of TCP and UDP; an IPv4 address may be that of IPv6 for it."""
    targets = procfs.descriptors(pid).values()
    inodes = {int(target[8:-1]) for target in targets if target.startswith("socket:")}
    kinds = itertools.product(
        (socket.AF_INET, socket.AF_INET6), (socket.IPPROTO_TCP, socket.IPPROTO_UDP)
    )
    found = (sock for kind in kinds for sock in _ask(_ALL, 0xFFFFFFFF, _ANY, *kind))
    return [sock for sock in found if sock.inode in inodes]


def _ask(
    flags: int,
    states: int,
    which: bytes,
    family: int = socket.AF_INET,
    protocol: int = socket.IPPROTO_TCP,
) -> Iterator[Tcp]:
    body = _REQUEST.pack(family, protocol, 0, states, which)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _SOCK_DIAG) as sock:
        sock.send(_HEADER.pack(_HEADER.size + len(body), _BY_FAMILY, flags, 1, 0) + body)
        while True:
            answer = sock.recv(1 << 16)
            at = 0
            while at < len(answer):
                length, kind, _, _, _ = _HEADER.unpack_from(answer, at)
                if kind != _BY_FAMILY:  # the end, or an error: there is none
                    return
                yield _read(answer, at + _HEADER.size)
                at += length + 3 & ~3  # NLMSG_ALIGN
            if flags == _ONE:
                return


def _read(answer: bytes, at: int) -> Tcp:
    family, state, which, _, waiting, _, _, inode = _ANSWER.unpack_from(answer, at)
    port, peer_port, host, peer, *_ = _WHICH.unpack(which)
    length = 4 if family == socket.AF_INET else 16
    text, peer_text = (socket.inet_ntop(family, each[:length]) for each in (host, peer))
    return Tcp(state, (text, port), waiting, inode, (peer_text, peer_port))
