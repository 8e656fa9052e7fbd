"""Clients and upstreams of every kind at once, and what became of each conversation."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, cast

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

TEXT: Final = random.Random(7).randbytes(4 << 20)
BULK_BYTES: Final = 2 << 20
ASKS: Final = 5  # of a flow
ASK_S: Final = 1.0  # a datagram that is not answered by then is lost
# A conversation that has neither succeeded nor failed by then hangs.
HANG_S: Final = 40.0

OK, CUT, LOST, WRONG, HUNG = "ok", "cut", "lost", "WRONG", "HUNG"
"""Whole; ended early, visibly; a datagram without an answer; other bytes; neither one nor other."""


@dataclass(frozen=True)
class Places:
    """Where the clients of each kind go."""

    tcp: tuple[str, int]
    unix: str
    udp: tuple[str, int]
    udptotcp: tuple[str, int]
    tcptoudp: tuple[str, int]


@dataclass
class Account:
    """How many conversations of each kind ended how."""

    ends: Counter[tuple[str, str]] = field(default_factory=Counter)

    def total(self, *ends: str) -> int:
        """How many ended in one of these ways; all, if none is given."""
        return sum(n for (_, end), n in self.ends.items() if not ends or end in ends)

    def text(self) -> str:
        """Those that did not end well, by kind."""
        return ", ".join(
            f"{n} {kind} {end}" for (kind, end), n in sorted(self.ends.items()) if end != OK
        )


class Answers(asyncio.DatagramProtocol):
    """A UDP upstream that sends back what it gets."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is there."""
        self.transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Send it back."""
        self.transport.sendto(data, addr)


class Asker(asyncio.DatagramProtocol):
    """A UDP client."""

    def __init__(self) -> None:
        self.got: asyncio.Queue[bytes] = asyncio.Queue()

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:  # noqa: ARG002 - the interface
        """An answer."""
        self.got.put_nowait(data)

    def error_received(self, exc: Exception) -> None:
        """ICMP: what follows is an answer that does not come."""


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A TCP upstream that sends back what it gets, and then its end."""
    with suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    with suppress(OSError):
        writer.close()
        await writer.wait_closed()


async def _talk(
    opened: Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]],
    count: int,
    *,
    slow: bool = False,
    has_resets: bool = True,
) -> str:
    """Send ``count`` bytes and an end; the same must come back.

    Of a unix socket, which has no resets, an early end is all that can tell of a cut.
    """
    try:
        reader, writer = await opened
    except OSError:
        return CUT
    start = random.randrange(len(TEXT) - count + 1)
    wanted = TEXT[start : start + count]

    async def send() -> None:
        with suppress(OSError):
            for at in range(0, count, 1 << 16):
                writer.write(wanted[at : min(at + (1 << 16), count)])
                await writer.drain()
            writer.write_eof()

    sending = asyncio.create_task(send())
    got = bytearray()
    end = OK
    try:
        if slow:
            await asyncio.sleep(1)  # until all that is on the way is full
        while data := await reader.read(1 << 16):
            got += data
            if slow:
                await asyncio.sleep(0.001)
    except OSError:
        end = CUT
    finally:
        sending.cancel()
        with suppress(asyncio.CancelledError):
            await sending
        with suppress(OSError):
            writer.transport.abort()
    if bytes(got) != wanted[: len(got)]:
        return WRONG
    if end == OK and len(got) < count:
        return WRONG if has_resets else CUT  # a clean end of a stream that was cut
    return end


async def _ask_stream(address: tuple[str, int]) -> str:
    """Ask a UDP upstream by TCP."""
    try:
        reader, writer = await asyncio.open_connection(*address)
    except OSError:
        return CUT
    try:
        for number in range(ASKS):
            wanted = b"%d asks by stream" % number
            writer.write(len(wanted).to_bytes(2, "big") + wanted)
            head = await asyncio.wait_for(reader.readexactly(2), ASK_S)
            if await reader.readexactly(int.from_bytes(head, "big")) != wanted:
                return WRONG
    except TimeoutError:
        return LOST
    except (OSError, asyncio.IncompleteReadError):
        return CUT
    finally:
        writer.transport.abort()
    return OK


async def _ask(address: tuple[str, int]) -> str:
    """Ask by UDP, in one flow."""
    loop = asyncio.get_running_loop()
    try:
        transport, asker = await loop.create_datagram_endpoint(Asker, remote_addr=address)
    except OSError:
        return CUT
    end = OK
    try:
        for number in range(ASKS):
            wanted = b"%d asks from %d" % (number, id(asker))
            transport.sendto(wanted)
            try:
                got = await asyncio.wait_for(asker.got.get(), ASK_S)
            except TimeoutError:
                end = LOST
                continue
            if got != wanted and not got.endswith(wanted.partition(b" ")[2]):
                return WRONG  # somebody else's; an answer of our own may be late
    finally:
        transport.abort()
    return end


class Traffic:
    """Conversations through a forwarder."""

    def __init__(self, places: Places) -> None:
        self._places = places

    async def one(self, kind: str) -> str:
        """A conversation of a kind; says how it ended."""
        places = self._places
        kinds: dict[str, Callable[[], Awaitable[str]]] = {
            "short": lambda: _talk(asyncio.open_connection(*places.tcp), 500),
            "bulk": lambda: _talk(asyncio.open_connection(*places.tcp), BULK_BYTES),
            "slow": lambda: _talk(asyncio.open_connection(*places.tcp), BULK_BYTES, slow=True),
            "unix": lambda: _talk(
                asyncio.open_unix_connection(places.unix), 100_000, has_resets=False
            ),
            "udp": lambda: _ask(places.udp),
            "udptotcp": lambda: _ask(places.udptotcp),
            "tcptoudp": lambda: _ask_stream(places.tcptoudp),
        }
        try:
            return await asyncio.wait_for(kinds[kind](), HANG_S)
        except TimeoutError:
            return HUNG

    async def run(self, mix: dict[str, int], rounds: int = 1) -> Account:
        """So many of each kind at once, and that so often."""
        account = Account()
        for _ in range(rounds):
            chosen = [kind for kind, count in mix.items() for _ in range(count)]
            ends = await asyncio.gather(*map(self.one, chosen))
            account.ends.update(zip(chosen, ends, strict=True))
        return account


LOAD: Final = {"short": 30, "bulk": 4, "slow": 2, "unix": 4, "udp": 8, "udptotcp": 3, "tcptoudp": 3}
HEALTH: Final = {
    "short": 10,
    "bulk": 2,
    "slow": 0,
    "unix": 2,
    "udp": 3,
    "udptotcp": 2,
    "tcptoudp": 2,
}
