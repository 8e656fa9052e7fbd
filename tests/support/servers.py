"""Servers of a group, which are well or sick as a test says, and count what comes to them."""

from __future__ import annotations

import selectors
import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from support.ends import connect, listen, written

if TYPE_CHECKING:
    from typing import Self

CHECK: Final = b"PING\n"
WELL: Final = b"PONG\n"
# The check that servers here understand, as TOML; more keys may follow.
ASKING: Final = 'kind = "tcp", send = "PING\\n", expect = "PONG"'


class Server:
    """A server that answers checks, and to all others says what it is called.

    One thread; use as a context manager. Its port stays the same when it is down.
    """

    def __init__(self, name: str, host: str = "127.0.0.1") -> None:
        self.name = name
        self.is_well = True
        self.checks = 0
        self.sessions = 0
        self._selector = selectors.DefaultSelector()
        self._stop, self._stopped = socket.socketpair()
        self._lock = threading.Lock()
        self._listener = listen(host)
        self.address: tuple[str, int] = self._listener.getsockname()
        self._register()
        self._selector.register(self._stopped, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.close()
        self._thread.join()
        for key in [*self._selector.get_map().values()]:
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._listener.close()
        self._selector.close()

    @property
    def written(self) -> str:
        """Its address, as a configuration has it."""
        return written(self.address)

    def go_down(self) -> None:
        """Refuse who comes, and leave who is there."""
        with self._lock:
            self._selector.unregister(self._listener)
            self._listener.close()

    def come_up(self) -> None:
        """Listen again."""
        with self._lock:
            self._listener = listen(*self.address)
            self._register()

    def _register(self) -> None:
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)

    def _run(self) -> None:
        while True:
            events = self._selector.select(0.05)
            with self._lock:
                for key, _ in events:
                    sock = key.fileobj
                    assert isinstance(sock, socket.socket)
                    if sock is self._stopped:
                        return
                    if sock.fileno() >= 0:
                        self._serve(sock)

    def _serve(self, sock: socket.socket) -> None:
        if sock is self._listener:
            with suppress(OSError):
                client, _ = sock.accept()
                client.setblocking(False)
                self._selector.register(client, selectors.EVENT_READ)
            return
        data = b""
        with suppress(OSError):
            data = sock.recv(4096)
        if not data:
            self._selector.unregister(sock)
            sock.close()
        elif data == CHECK:
            self.checks += 1
            with suppress(OSError):  # a check that a reload gives up
                sock.send(WELL if self.is_well else b"SICK\n")
            self._selector.unregister(sock)
            sock.close()
        else:
            self.sessions += 1
            with suppress(OSError):
                sock.send(self.name.encode() + b"\n")


def who(address: tuple[str, int]) -> str:
    """The name of the server that a new session gets to. Fails if it gets to none."""
    with connect(address) as client:
        client.sendall(b"who\n")
        return client.recv(100).decode().strip()
