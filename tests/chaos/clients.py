"""The clients: sessions of every kind, each of which checks every byte and says how it ended.

A process of its own: ``python -m chaos.clients OUTPUT UNIX SEED FIRST KIND=N...`` keeps N sessions
of each kind open, and writes one line of JSON for each that has ended (``model.Ending``). Clients
have numbers above FIRST. At the end of its standard input the long ones come to their end, no
further ones begin, and it ends.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import socket
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from itertools import count
from typing import IO, TYPE_CHECKING, Final, TypeAlias

from chaos import model
from chaos.model import Ending
from chaos.upstream import abort
from chaos.wire import (
    DATAGRAM,
    GREETING,
    HEAD,
    MAGIC,
    PART,
    PORTS,
    TRAILER_BYTES,
    Mode,
    address_of,
    is_text,
    text,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

HANG_S: Final = 45.0  # no step of a session takes longer, whatever is stopped meanwhile
_LATE_S: Final = 9.0  # an answer of UDP that has not come by then is lost; a hang is shorter
_LATE_AT_THE_END_S: Final = 4.0  # when all is well again
_BUFFER_BYTES: Final = 4 << 20
_SMALL, _LARGE = 20_000, 3 << 20


class BrokenError(Exception):
    """The session has ended otherwise than it should."""

    def __init__(self, outcome: str, detail: str = "") -> None:
        super().__init__(detail)
        self.outcome = outcome


class Client:
    """One stream. Every byte that it gets is compared."""

    def __init__(self, number: int, kind: str) -> None:
        self.number = number
        self.kind = kind
        self.began = time.monotonic()
        self.greeted: float | None = None
        self.sent = 0
        self.received = 0
        self.port = 0
        self.silence_s = 0.0
        self.lost: list[float] = []
        self._heard = self.began
        self._loop = asyncio.get_running_loop()
        self.sock: socket.socket

    async def open(self, address: str | int, mode: Mode, first: int = 0, second: int = 0) -> None:
        """Connect, say what is wanted, and be greeted."""
        await self.connect(address)
        await self._send_raw(HEAD.pack(MAGIC, self.number, mode, first, second))
        magic, number, port = GREETING.unpack(await self._exactly(GREETING.size))
        if (magic, number) != (MAGIC, self.number):
            raise BrokenError(model.WRONG, f"the greeting is for {number}")
        self.port = port
        self.greeted = time.monotonic()

    async def connect(self, address: str | int) -> None:
        """Connect, from an address of its own if that is by TCP."""
        try:
            async with asyncio.timeout(HANG_S):
                if isinstance(address, str):
                    self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                    self.sock.setblocking(False)
                    await self._connect_unix(address)
                else:
                    self.sock = socket.socket()
                    self.sock.setblocking(False)
                    self.sock.bind((address_of(self.number), 0))
                    await self._loop.sock_connect(self.sock, ("127.0.0.1", address))
        except TimeoutError:
            raise BrokenError(model.HUNG, "no connection") from None
        except OSError as err:
            is_reset = isinstance(err, ConnectionResetError)
            raise BrokenError(model.RESET if is_reset else model.REFUSED, str(err)) from None
        self._heard = time.monotonic()

    async def _connect_unix(self, path: str) -> None:
        while True:
            try:
                return self.sock.connect(path)
            except BlockingIOError:  # the queue is full
                await asyncio.sleep(0.05)

    async def _send_raw(self, data: bytes | memoryview) -> None:
        try:
            async with asyncio.timeout(HANG_S):
                await self._loop.sock_sendall(self.sock, data)
        except TimeoutError:
            raise BrokenError(model.HUNG, f"cannot send after {self.sent} bytes") from None
        except OSError as err:
            raise BrokenError(model.RESET, str(err)) from None

    async def say(self, size: int) -> None:
        """Send the next ``size`` bytes of the text."""
        until = self.sent + size
        while self.sent < until:
            part = text(self.number, self.sent, until - self.sent)
            await self._send_raw(part)
            self.sent += len(part)

    async def hear(self, most: int = PART) -> bytes:
        """Some bytes; none at the end. Silence counts from when something was to be heard."""
        try:
            async with asyncio.timeout(HANG_S):
                data = await self._loop.sock_recv(self.sock, most)
        except TimeoutError:
            raise BrokenError(model.HUNG, f"silence after {self.received} bytes") from None
        except OSError as err:
            raise BrokenError(model.RESET, str(err)) from None
        now = time.monotonic()
        self.silence_s = max(self.silence_s, now - self._heard)
        self._heard = now
        return data

    async def _exactly(self, size: int) -> bytes:
        found = b""
        while len(found) < size:
            data = await self.hear(size - len(found))
            if not data:
                raise BrokenError(model.CUT, f"the end after {len(found)} of {size} bytes")
            found += data
        return found

    async def expect(self, size: int, of: int, at: int, pause_s: float = 0.0) -> None:
        """Hear what ``of`` says at ``at``; rests between two reads, so that it is slow."""
        until = at + size
        while at < until:
            data = await self.hear(min(PART, until - at))
            if not data:
                raise BrokenError(model.CUT, f"the end, {until - at} bytes early")
            if not is_text(of, at, data):
                raise BrokenError(model.WRONG, f"other bytes at {at}")
            at += len(data)
            self.received += len(data)
            if pause_s:
                await self.rest(pause_s)

    async def expect_end(self) -> None:
        """Nothing more, and the end."""
        if data := await self.hear():
            raise BrokenError(model.WRONG, f"{len(data)} bytes after the end")

    async def expect_reset(self) -> None:
        """Some of the text perhaps, and then a reset."""
        at = self.received
        while True:
            try:
                data = await self.hear()
            except BrokenError as broken:
                if broken.outcome == model.RESET:
                    return
                raise
            if not data:
                raise BrokenError(model.CUT, "an end in place of a reset")
            if not is_text(self.number, at, data):
                raise BrokenError(model.WRONG, f"other bytes at {at}")
            at += len(data)

    async def rest(self, seconds: float) -> None:
        """Do nothing, and expect nothing to be heard."""
        await asyncio.sleep(seconds)
        self._heard = time.monotonic()

    def shut(self) -> None:
        """Say that no more comes."""
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as err:
            raise BrokenError(model.RESET, str(err)) from None


Kind: TypeAlias = "Callable[[Client], Awaitable[None]]"


class Crowd:
    """All clients of the process."""

    def __init__(self, output: IO[str], unix: str, seed: int, first: int) -> None:
        self._numbers = count(first + 1)
        self._output = output
        self._unix = unix
        self._lot = random.Random(seed)
        self.is_over = asyncio.Event()
        self.over_at = math.inf

    # -- kinds

    async def _short(self, it: Client, address: str | int = PORTS.plain) -> None:
        await it.open(address, Mode.ECHO)
        await self._echo(it, int(_SMALL * self._lot.random() ** 3) + 1)
        await self._end(it)

    async def _long(self, it: Client, address: str | int = PORTS.plain, pause_s: float = 0) -> None:
        await it.open(address, Mode.ECHO)
        while not self.is_over.is_set():
            await self._echo(it, self._lot.randint(1, 6000))
            with suppress(TimeoutError):
                rest_s = pause_s or self._lot.uniform(0.02, 0.1)
                await asyncio.wait_for(self.is_over.wait(), rest_s)
            await it.rest(0)
        await self._end(it)

    async def _bulk(self, it: Client, address: str | int = PORTS.plain, part: float = 1) -> None:
        await it.open(address, Mode.ECHO)
        for _ in range(self._lot.randint(1, 4)):
            await self._echo(it, int(part * self._lot.randint(_LARGE // 2, _LARGE)))
        await self._end(it)

    async def _answered(self, it: Client) -> None:
        """Half-closed by the client; the answer takes its time."""
        size = self._lot.randint(1, 30) * 10_000
        await it.open(PORTS.plain, Mode.ANSWER, size, self._lot.randint(100, 4000))
        await it.say(self._lot.randint(0, 5000))
        it.shut()
        await it.expect(size, it.number + 1, 0)
        await it.expect_end()

    async def _pushed(self, it: Client) -> None:
        """Half-closed by the upstream; the client goes on."""
        size = self._lot.randint(1, _SMALL)
        await it.open(PORTS.plain, Mode.PUSH, size)
        await it.expect(size, it.number + 1, 0)
        await it.expect_end()
        for _ in range(self._lot.randint(1, 30)):
            await it.say(self._lot.randint(1, 20_000))
            await it.rest(0.1)
        it.shut()

    async def _slow(self, it: Client) -> None:
        size = self._lot.randint(_LARGE // 2, _LARGE)
        await it.open(PORTS.plain, Mode.PUSH, size)
        await it.expect(size, it.number + 1, 0, 0.05)
        await it.expect_end()

    async def _stalled(self, it: Client) -> None:
        """Until all that is on the way is full."""
        size = self._lot.randint(4, 8) << 20
        await it.open(PORTS.plain, Mode.PUSH, size)
        await it.rest(self._lot.uniform(1, 5))
        await it.expect(size, it.number + 1, 0)
        await it.expect_end()

    async def _stalled_upstream(self, it: Client) -> None:
        await it.open(PORTS.plain, Mode.ECHO, self._lot.randint(1000, 5000))
        await self._echo(it, self._lot.randint(4, 8) << 20)
        await self._end(it)

    async def _reset(self, it: Client) -> None:
        await it.open(PORTS.plain, Mode.ECHO)
        await self._echo(it, self._lot.randint(1, 200_000))
        await it.say(self._lot.randint(1, 50_000))
        abort(it.sock)

    async def _reset_by_upstream(self, it: Client) -> None:
        size = self._lot.randint(1, 200_000)
        await it.open(PORTS.plain, Mode.RESET, size)
        sending = asyncio.ensure_future(it.say(size))
        try:
            await it.expect_reset()
        finally:
            sending.cancel()
            with suppress(asyncio.CancelledError, BrokenError):
                await sending

    async def _limited(self, it: Client) -> None:
        """More of these come than may; those that may not are turned away at once."""
        try:
            await it.open(PORTS.limited, Mode.ECHO)
        except BrokenError as broken:
            if broken.outcome == model.RESET:
                raise BrokenError(model.TURNED_AWAY) from None
            raise
        for _ in range(self._lot.randint(1, 20)):
            await self._echo(it, self._lot.randint(1, 2000))
            await it.rest(0.05)
        await self._end(it)

    async def _span(self, it: Client) -> None:
        which = it.number % len(PORTS.span)
        await self._short(it, PORTS.span[which])
        if it.port != PORTS.upstream_span[which]:
            raise BrokenError(model.WRONG, f"port {it.port} serves port {PORTS.span[which]}")

    async def _to_unix(self, it: Client) -> None:
        if it.number % 4:
            await self._short(it, PORTS.to_unix)
        else:
            await self._bulk(it, PORTS.to_unix, part=0.3)

    async def _asks_by_stream(self, it: Client) -> None:
        """A client by TCP of an upstream by UDP: its answers are numbered."""
        await it.connect(PORTS.tcptoudp)
        for at in range(self._lot.randint(1, 30)):
            wanted = DATAGRAM.pack(it.number, at) + bytes(text(it.number, at, 100))
            await it._send_raw(len(wanted).to_bytes(2, "big") + wanted)
            sent_at = time.monotonic()
            while True:  # one that is late is an answer to what was asked before
                size = int.from_bytes(await it._exactly(2), "big")
                if (await it._exactly(size)) == wanted:
                    break
                raise BrokenError(model.WRONG, f"another answer at {at}, sent {sent_at}")
            it.greeted = it.greeted or time.monotonic()
            await it.rest(0.05)

    async def _datagrams(self, it: Client, port: int = PORTS.udp) -> None:
        """Numbered ones at a steady rate; each has to come back, as it was and once."""
        loop = asyncio.get_running_loop()
        flow = _Flow(it.number)
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        sock.setblocking(False)
        sock.bind((address_of(it.number), 0))
        it.sock = sock
        sock.connect(("127.0.0.1", port))
        transport, _ = await loop.create_datagram_endpoint(lambda: flow, sock=sock)
        try:
            most = self._lot.choice((20, 100, 400, 1 << 30))
            while flow.count < most and not self.is_over.is_set():
                flow.send(transport)
                it.sent += 1
                await asyncio.sleep(0.025)
            await self._wait_for_answers(flow)
        finally:
            transport.abort()
        it.received = it.sent - len(flow.waiting)
        it.lost = sorted(flow.waiting.values())
        if flow.wrong:
            raise BrokenError(model.WRONG, flow.wrong[0])

    # -- parts of these

    async def _wait_for_answers(self, flow: _Flow) -> None:
        until = time.monotonic() + _LATE_S
        while flow.waiting and time.monotonic() < until:
            until = min(until, self.over_at + _LATE_AT_THE_END_S)
            await asyncio.sleep(0.05)

    @staticmethod
    async def _echo(it: Client, size: int) -> None:
        at = it.sent
        if size <= PART // 2:
            await it.say(size)
            await it.expect(size, it.number, at)
            return
        sending = asyncio.ensure_future(it.say(size))
        try:
            await it.expect(size, it.number, at)
            await sending
        finally:
            sending.cancel()
            with suppress(asyncio.CancelledError, BrokenError):
                await sending

    @staticmethod
    async def _end(it: Client) -> None:
        it.shut()
        await it.expect(TRAILER_BYTES, it.number + 1, 0)
        await it.expect_end()

    # -- all of them

    def kinds(self) -> dict[str, Kind]:
        """Each by its name."""
        return {
            "short": self._short,
            "long": self._long,
            "quiet": lambda it: self._long(it, pause_s=self._lot.uniform(2, 5)),
            "bulk": self._bulk,
            "answered": self._answered,
            "pushed": self._pushed,
            "slow": self._slow,
            "stalled": self._stalled,
            "stalled upstream": self._stalled_upstream,
            "reset": self._reset,
            "reset by upstream": self._reset_by_upstream,
            "limited": self._limited,
            "metered": lambda it: self._bulk(it, PORTS.metered, part=0.1),
            "group": lambda it: self._short(it, PORTS.group),
            "group long": lambda it: self._long(it, PORTS.group),
            "span": self._span,
            "to unix": self._to_unix,
            "unix": lambda it: self._short(it, self._unix),
            "unix long": lambda it: self._long(it, self._unix),
            "tcptoudp": self._asks_by_stream,
            "udp": self._datagrams,
            "udptotcp": lambda it: self._datagrams(it, PORTS.udptotcp),
        }

    async def keep(self, name: str, talk: Kind) -> None:
        """One session of a kind after the other."""
        while not self.is_over.is_set():
            await self._one(name, talk)
            with suppress(TimeoutError):
                await asyncio.wait_for(self.is_over.wait(), self._lot.uniform(0.02, 0.3))

    async def _one(self, name: str, talk: Kind) -> None:
        it = Client(next(self._numbers), name)
        outcome, detail = model.OK, ""
        try:
            await talk(it)
        except BrokenError as broken:
            outcome, detail = broken.outcome, str(broken)
        finally:
            if hasattr(it, "sock"):
                it.sock.close()
        ending = Ending(
            number=it.number,
            kind=name,
            began=it.began,
            ended=time.monotonic(),
            outcome=outcome,
            greeted=it.greeted,
            sent=it.sent,
            received=it.received,
            port=it.port,
            silence_s=round(it.silence_s, 3),
            lost=it.lost,
            detail=detail,
        )
        self._output.write(json.dumps(asdict(ending)) + "\n")


class _Flow(asyncio.DatagramProtocol):
    """A client by UDP. ``waiting``: when each datagram was sent that has not been answered."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.count = 0
        self.waiting: dict[int, float] = {}
        self.wrong: list[str] = []

    def send(self, transport: asyncio.DatagramTransport) -> None:
        self.waiting[self.count] = time.monotonic()
        transport.sendto(self._datagram(self.count))
        self.count += 1

    def _datagram(self, at: int) -> bytes:
        size = at * 37 % 1200
        return DATAGRAM.pack(self._number, at) + bytes(text(self._number, at, size))

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:  # noqa: ARG002
        """An answer has to be one that is waited for, as it was sent."""
        at = DATAGRAM.unpack_from(data)[1] if len(data) >= DATAGRAM.size else -1
        if at not in self.waiting or data != self._datagram(at):
            self.wrong.append(f"an answer of {len(data)} bytes to {at} of {self.count}")
            return
        del self.waiting[at]

    def error_received(self, exc: Exception) -> None:
        """ICMP: what follows is an answer that does not come."""


async def _run(crowd: Crowd, mix: dict[str, int]) -> None:
    kinds = crowd.kinds()
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    tasks = [
        loop.create_task(crowd.keep(name, kinds[name])) for name, n in mix.items() for _ in range(n)
    ]
    print("begins", flush=True)  # noqa: T201 - read by the run
    await reader.read()
    crowd.over_at = time.monotonic()
    crowd.is_over.set()
    await asyncio.gather(*tasks)


def main() -> None:
    """Run what the command line describes."""
    name, unix, seed, first, *mix = sys.argv[1:]
    wanted = {kind: int(n) for kind, _, n in (one.partition("=") for one in mix)}
    with open(name, "w", buffering=1) as output:  # noqa: PTH123 - a line at a time
        asyncio.run(_run(Crowd(output, unix, int(seed), int(first)), wanted))


if __name__ == "__main__":
    main()
