"""An upstream: a process that does what clients ask of it, and looks at every byte.

``python -m chaos.upstream [PORT]``: with a port, that of the upstream that is killed now and then;
without, all others. Prints a line when it listens. At the end of its standard input it ends, and
prints what was wrong, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Final, cast

from chaos.wire import (
    GREETING,
    HEAD,
    MAGIC,
    PART,
    PORTS,
    TRAILER_BYTES,
    Mode,
    is_text,
    text,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

UNIX: Final = "upstream.sock"
BACKLOG: Final = 1024
_BUFFER_BYTES: Final = 4 << 20


def abort(sock: socket.socket) -> None:
    """Close with a reset."""
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Upstream:
    """All that is served in this process. ``wrong`` is what clients have said and should not."""

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self.open = 0
        self.served = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(
        self, listener: socket.socket, talk: Callable[[socket.socket], Awaitable[None]]
    ) -> None:
        """Accept for ever."""
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        while True:
            sock, _ = await loop.sock_accept(listener)
            task = loop.create_task(self._talk(sock, talk))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _talk(
        self, sock: socket.socket, talk: Callable[[socket.socket], Awaitable[None]]
    ) -> None:
        sock.setblocking(False)
        self.open += 1
        self.served += 1
        try:
            await talk(sock)
        except OSError:  # a reset: the client knows whether that was to be
            pass
        finally:
            self.open -= 1
            sock.close()

    async def raw(self, sock: socket.socket) -> None:
        """Send back what comes, and then the end."""
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(sock, PART):
            await loop.sock_sendall(sock, data)

    async def framed(self, sock: socket.socket) -> None:
        """Read what the client wants, and do it."""
        loop = asyncio.get_running_loop()
        head = b""
        while len(head) < HEAD.size:
            data = await loop.sock_recv(sock, HEAD.size - len(head))
            if not data:
                return None  # the client was cut, or changed its mind
            head += data
        magic, number, mode, first, second = HEAD.unpack(head)
        if magic != MAGIC:
            self.wrong.append(f"a head of {head!r}")
            return abort(sock)
        port = sock.getsockname()[1] if sock.family == socket.AF_INET else 0
        await loop.sock_sendall(sock, GREETING.pack(MAGIC, number, port))
        session = _Session(self, sock, number)
        modes = {
            Mode.ECHO: session.echo,
            Mode.PUSH: session.push,
            Mode.ANSWER: session.answer,
            Mode.RESET: session.reset,
        }
        await modes[Mode(mode)](first, second)
        return None


class _Session:
    """One connection after its greeting."""

    def __init__(self, upstream: Upstream, sock: socket.socket, number: int) -> None:
        self._upstream = upstream
        self._sock = sock
        self._number = number
        self._received = 0
        self._loop = asyncio.get_running_loop()

    async def echo(self, first: int, _: int) -> None:
        await asyncio.sleep(first / 1000)
        while data := await self._read():
            await self._loop.sock_sendall(self._sock, data)
        await self._say(TRAILER_BYTES)

    async def push(self, first: int, _: int) -> None:
        await self._say(first)
        self._sock.shutdown(socket.SHUT_WR)
        while await self._read():
            pass

    async def answer(self, first: int, second: int) -> None:
        while await self._read():
            pass
        parts = 10
        for part in range(parts):
            await asyncio.sleep(second / parts / 1000)
            await self._say(first // parts, part * (first // parts))

    async def reset(self, first: int, _: int) -> None:
        while self._received < first and (data := await self._read()):
            await self._loop.sock_sendall(self._sock, data)
        abort(self._sock)

    async def _read(self) -> bytes:
        data = await self._loop.sock_recv(self._sock, PART)
        if not is_text(self._number, self._received, data):
            self._upstream.wrong.append(f"client {self._number} at {self._received}")
        self._received += len(data)
        return data

    async def _say(self, count: int, at: int = 0) -> None:
        """What the upstream says of its own is what the next client says."""
        until = at + count
        while at < until:
            part = text(self._number + 1, at, until - at)
            await self._loop.sock_sendall(self._sock, part)
            at += len(part)


class _Answers(asyncio.DatagramProtocol):
    """Sends datagrams back."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.transport.sendto(data, addr)


def _listen(port: int) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    sock.listen(BACKLOG)
    return sock


async def _serve_all(upstream: Upstream, port: int) -> None:
    loop = asyncio.get_running_loop()
    tasks = []

    def serve(listener: socket.socket, talk: Callable[[socket.socket], Awaitable[None]]) -> None:
        tasks.append(loop.create_task(upstream.serve(listener, talk)))

    if port:
        serve(_listen(port), upstream.framed)
    else:
        for one in (PORTS.upstream, *PORTS.upstream_span):
            serve(_listen(one), upstream.framed)
        serve(_listen(PORTS.upstream_raw), upstream.raw)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(UNIX)
        listener.listen(BACKLOG)
        serve(listener, upstream.framed)
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        sock.bind(("127.0.0.1", PORTS.upstream_udp))
        await loop.create_datagram_endpoint(_Answers, sock=sock)
    print("listens", flush=True)  # noqa: T201 - read by the run
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        del line  # any line asks how many are open
        print(upstream.open, flush=True)  # noqa: T201 - read by the run
    account = {"wrong": upstream.wrong[:20], "open": upstream.open, "served": upstream.served}
    print(json.dumps(account), flush=True)  # noqa: T201 - read by the run
    os._exit(0)  # what is open is closed by the kernel; tasks need not be ended one by one


if __name__ == "__main__":
    asyncio.run(_serve_all(Upstream(), int(sys.argv[1]) if len(sys.argv) > 1 else 0))
