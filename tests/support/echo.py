"""Upstreams that say who they are, whom they see, and what they got; TCP and UDP."""

from __future__ import annotations

import selectors
import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from support.ends import family_of
from support.waiting import PATIENCE_S, eventually

if TYPE_CHECKING:
    from collections.abc import Iterable

# A datagram may come before its receiver listens, and nobody repeats it.
_UDP_PATIENCE_S = 0.5


class Echo:
    """Any number of upstreams, served by one thread. Use as a context manager.

    Each answers to everything that comes: its own name, the address it sees, and what came.
    """

    def __init__(
        self,
        tcp: Iterable[tuple[str, int]] = (),
        udp: Iterable[tuple[str, int]] = (),
    ) -> None:
        """Listen at these addresses; port 0 is one that the system chooses."""
        self._selector = selectors.DefaultSelector()
        self._stop, self._stopped = socket.socketpair()
        self._selector.register(self._stopped, selectors.EVENT_READ)
        self.tcp = [self._open(address, socket.SOCK_STREAM) for address in tcp]
        self.udp = [self._open(address, socket.SOCK_DGRAM) for address in udp]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _open(self, address: tuple[str, int], kind: socket.SocketKind) -> tuple[str, int]:
        sock = socket.socket(family_of(address), kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        if kind == socket.SOCK_STREAM:
            sock.listen(128)
        sock.setblocking(False)
        self._selector.register(sock, selectors.EVENT_READ, kind)
        host, port = sock.getsockname()[:2]
        return host, port

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                if sock is self._stopped:
                    return
                with suppress(BlockingIOError, ConnectionError):
                    self._serve(sock, key.data)

    def _serve(self, sock: socket.socket, kind: socket.SocketKind | str) -> None:
        """``kind``: of a listening socket; of an accepted one the host of its client."""
        if kind == socket.SOCK_STREAM:
            peer, (host, *_) = sock.accept()
            peer.setblocking(False)
            self._selector.register(peer, selectors.EVENT_READ, host)
        elif kind == socket.SOCK_DGRAM:
            data, client = sock.recvfrom(65536)
            if data:  # rinetd begins each flow with an empty one
                sock.sendto(_answer(sock, client[0], data), client)
        else:
            data = sock.recv(65536)
            if data:
                sock.send(_answer(sock, str(kind), data))  # it may be reset: no getpeername
            else:
                self._selector.unregister(sock)
                sock.close()

    def __enter__(self) -> Echo:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.close()
        self._thread.join(PATIENCE_S)
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._selector.close()


def _answer(sock: socket.socket, client: str, data: bytes) -> bytes:
    host, port = sock.getsockname()[:2]
    return f"{host}:{port} saw {client}: ".encode() + data


def ask_tcp(address: tuple[str, int] | str, data: bytes = b"hello", source: str = "") -> str:
    """What comes back over TCP, to a client at ``source``; "" if it is cut or refused."""
    with socket.socket(family_of(address), socket.SOCK_STREAM) as sock:
        sock.settimeout(PATIENCE_S)
        with suppress(ConnectionError):
            if source:
                sock.bind((source, 0))
            sock.connect(address)
            sock.sendall(data)
            return sock.recv(65536).decode()
    return ""


def ask_udp(address: tuple[str, int], data: bytes = b"hello", source: str = "") -> str:
    """What comes back over UDP; asks again while nothing does."""
    answers: list[str] = []
    with socket.socket(family_of(address), socket.SOCK_DGRAM) as sock:
        sock.settimeout(_UDP_PATIENCE_S)
        if source:
            sock.bind((source, 0))

        def has_answer() -> bool:
            with suppress(TimeoutError, ConnectionError):
                sock.connect(address)
                sock.send(data)
                answers.append(sock.recv(65536).decode())
            return bool(answers)

        eventually(has_answer, f"no answer from {address}")
    return answers[0]
