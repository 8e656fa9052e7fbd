"""Both ends of a forwarded connection, and talking over them without threads."""

from __future__ import annotations

import contextlib
import itertools
import random
import selectors
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from support.waiting import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MPTCP = 262  # IPPROTO_MPTCP, linux/in.h; Python 3.11 has no name for it
_RECEIVE_BYTES = 1 << 20


def seeded(count: int, seed: int) -> bytes:
    """``count`` bytes that look random and are always the same for a seed."""
    return random.Random(seed).randbytes(count)


class Link(NamedTuple):
    """One session through the forwarder: our client socket, and our accepted upstream socket."""

    client: socket.socket
    upstream: socket.socket

    def close(self) -> None:
        """Close both ends."""
        self.client.close()
        self.upstream.close()

    def end(self, name: str) -> tuple[socket.socket, socket.socket]:
        """The named end first, then the other one."""
        if name == "client":
            return self.client, self.upstream
        return self.upstream, self.client


def has_mptcp() -> bool:
    """Whether this kernel has MPTCP."""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, MPTCP).close()
    except OSError:
        return False
    return True


def family_of(address: tuple[str, int] | str) -> socket.AddressFamily:
    """The family of an address; a text is the path of a unix socket, or NUL and a name."""
    if isinstance(address, str):
        return socket.AF_UNIX
    return socket.AF_INET6 if ":" in address[0] else socket.AF_INET


def written(address: tuple[str, int] | str) -> str:
    """A socket address as configurations and the command line have it."""
    if isinstance(address, str):
        return "unix:" + address.replace("\0", "@", 1)
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def connect(address: tuple[str, int] | str, receive_buffer: int = 0) -> socket.socket:
    """Connect with a patient timeout."""
    family = family_of(address)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.settimeout(PATIENCE_S)
        sock.connect(address)
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        sock.close()
        raise
    return sock


def listen(
    host: str = "127.0.0.1", port: int = 0, backlog: int = 4096, receive_buffer: int = 0
) -> socket.socket:
    """Listen on a port the system chooses, unless given."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.bind((host, port))
        sock.listen(backlog)
        sock.settimeout(PATIENCE_S)
    except BaseException:
        sock.close()
        raise
    return sock


def listen_unix(address: str, backlog: int = 4096) -> socket.socket:
    """Listen at a path, or at a name that begins with NUL."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(address)
        sock.listen(backlog)
        sock.settimeout(PATIENCE_S)
    except BaseException:
        sock.close()
        raise
    return sock


def accept(listener: socket.socket) -> socket.socket:
    """Accept one connection, with a patient timeout on it."""
    sock, _ = listener.accept()
    sock.settimeout(PATIENCE_S)
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def open_link(
    address: tuple[str, int] | str, listener: socket.socket, receive_buffer: int = 0
) -> Link:
    """Open a session through a forwarder. ``receive_buffer`` is the client's."""
    client = connect(address, receive_buffer)
    try:
        return Link(client, accept(listener))
    except BaseException:
        client.close()
        raise


def reset(sock: socket.socket) -> None:
    """Close by RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def receive_exactly(sock: socket.socket, count: int) -> bytes:
    """Receive ``count`` bytes; fails on an early end."""
    received = bytearray()
    while len(received) < count:
        part = sock.recv(min(count - len(received), _RECEIVE_BYTES))
        assert part, f"end of file after {len(received)} of {count} bytes"
        received += part
    return bytes(received)


def receive_to_end(sock: socket.socket) -> bytes:
    """Receive until a clean end of file; a reset raises ConnectionResetError."""
    received = bytearray()
    while part := sock.recv(_RECEIVE_BYTES):
        received += part
    return bytes(received)


def receive_to_reset(sock: socket.socket) -> bytes:
    """Receive until a reset; returns what came before. Fails on a clean end of file."""
    received = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(_RECEIVE_BYTES):
            received += part
        raise AssertionError(f"a clean end of file in place of a reset, after {len(received)} B")
    return bytes(received)


def be_reset(address: tuple[str, int] | str) -> None:
    """Be a client that is reset without a byte; it may hear of that while it connects still."""
    try:
        client = connect(address)
    except ConnectionResetError:
        return
    with client:
        assert receive_to_reset(client) == b""


def send_to_reset(sock: socket.socket) -> None:
    """Send until the peer's reset is seen. Fails by a time-out if that never comes."""
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while True:
            sock.sendall(bytes(_RECEIVE_BYTES))


def fill(sock: socket.socket, data: bytes, quiet_s: float = 0.3) -> int:
    """Send ``data`` until the peer's backpressure stops it; returns how much was taken.

    Blocked means not writable for ``quiet_s``. A wrong guess only makes a test send less.
    """
    sock.setblocking(False)
    view = memoryview(data)
    sent = 0
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_WRITE)
        while sent < len(data) and selector.select(quiet_s):
            with contextlib.suppress(BlockingIOError):
                sent += sock.send(view[sent : sent + _RECEIVE_BYTES])
    sock.settimeout(PATIENCE_S)
    return sent


def carry(near: socket.socket, far: socket.socket, data: bytes) -> None:
    """Send ``data`` at ``near`` and receive as much at ``far``; neither ends its stream."""
    view = memoryview(data)
    received = bytearray()
    near.setblocking(False)
    with selectors.DefaultSelector() as selector:
        selector.register(near, selectors.EVENT_WRITE)
        selector.register(far, selectors.EVENT_READ)
        while len(received) < len(data):
            ready = selector.select(PATIENCE_S)
            assert ready, f"nothing moves after {len(received)} of {len(data)} bytes"
            for key, _ in ready:
                if key.fileobj is far:
                    part = far.recv(_RECEIVE_BYTES)
                    assert part, f"end of file after {len(received)} of {len(data)} bytes"
                    received += part
                    continue
                with contextlib.suppress(BlockingIOError):
                    view = view[near.send(view) :]
                if not view:
                    selector.unregister(near)
    near.settimeout(PATIENCE_S)
    assert received == data


@dataclass
class Talker:
    """One end of a connection: sends all of ``outgoing`` in ``chunks``, receives to end of file.

    ``after_eof``: send FIN only once the peer's has come, otherwise right after the last byte.
    """

    sock: socket.socket
    outgoing: bytes
    chunks: Iterable[int] = (1 << 20,)
    after_eof: bool = False
    received: bytearray = field(default_factory=bytearray)

    def __post_init__(self) -> None:
        self._view = memoryview(self.outgoing)
        self._sizes: Iterator[int] = itertools.cycle(self.chunks)
        self._sent = 0
        self._is_shut = False
        self._at_eof = False

    @property
    def is_done(self) -> bool:
        return self._is_shut and self._at_eof

    def events(self) -> int:
        """What to wait for next."""
        may_send = not self._is_shut and (
            self._sent < len(self._view) or not self.after_eof or self._at_eof
        )
        return (0 if self._at_eof else selectors.EVENT_READ) | (
            selectors.EVENT_WRITE if may_send else 0
        )

    def act(self, events: int) -> None:
        """Receive and send as far as possible."""
        if events & selectors.EVENT_READ:
            part = self.sock.recv(_RECEIVE_BYTES)
            self.received += part
            self._at_eof = not part
        if events & selectors.EVENT_WRITE:
            if self._sent < len(self._view):
                size = next(self._sizes)
                with contextlib.suppress(BlockingIOError):
                    self._sent += self.sock.send(self._view[self._sent : self._sent + size])
            else:
                self.sock.shutdown(socket.SHUT_WR)
                self._is_shut = True


def talk(*talkers: Talker, within_s: float = 4 * PATIENCE_S) -> None:
    """Let all talk at once until each has sent everything and seen the other's end."""
    deadline = time.monotonic() + within_s
    with selectors.DefaultSelector() as selector:
        for talker in talkers:
            talker.sock.setblocking(False)
            selector.register(talker.sock, talker.events(), talker)
        while selector.get_map():
            ready = selector.select(PATIENCE_S)
            missing = [(len(t.received), t.events()) for t in talkers if not t.is_done][:5]
            assert ready, f"nothing moves; received so far and waiting for: {missing}"
            assert time.monotonic() < deadline, f"too slow: {missing}"
            for key, events in ready:
                talker = key.data
                talker.act(events)
                if talker.is_done:
                    selector.unregister(talker.sock)
                elif talker.events() != key.events:
                    selector.modify(talker.sock, talker.events(), talker)
    for talker in talkers:
        talker.sock.settimeout(PATIENCE_S)
