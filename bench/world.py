"""A world that fails: name servers, an interface and upstreams that come and go.

In a network and mount namespace of its own, which the caller has made.

Makes no load and judges nothing; ``outages`` does. Needs root, iproute2 and dnsmasq.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, cast

if TYPE_CHECKING:
    import random
    from collections.abc import Awaitable, Callable
    from pathlib import Path

DEVICE: Final = "up0"
LINK_LOCAL: Final = "fe80::5"
TCP_PORT, UDP_PORT = 9000, 9001
ALWAYS: Final = "127.0.0.2"  # upstreams that are always there
MOVING: Final = ("127.0.0.3", "127.0.0.4")  # one of the two has the name that moves
REFUSING: Final = ("127.0.0.5", "127.0.0.6")  # one of the two refuses
# After an interface was made the forwarder has this long to listen on it again. Arbitrary.
SETTLE_S: Final = 10.0


def ip(line: str) -> None:
    """Run ``ip``. Raises CalledProcessError."""
    subprocess.run(["ip", *line.split()], check=True, capture_output=True)


class UdpEcho(asyncio.DatagramProtocol):
    """Sends back what it gets."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the socket."""
        self.transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: tuple[str | object, int]) -> None:
        """Answer."""
        self.transport.sendto(data, addr)


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


@dataclass
class World:
    """What the forwarder depends on. ``away``: what is not there now."""

    directory: Path
    master: Callable[[], int]
    reload: Callable[[], Awaitable[None]]
    away: set[str] = field(default_factory=set)
    events: dict[str, int] = field(default_factory=dict)
    lost_at: float = 0.0
    settles_at: float = 0.0
    _names: subprocess.Popen[bytes] | None = None
    _servers: list[asyncio.Server] = field(default_factory=list)
    _moved_to: int = 0

    async def begin(self) -> None:
        """Make it whole."""
        self._make_network()
        self._start_names()
        for host in (ALWAYS, *MOVING, *REFUSING):
            await self._serve(host)
        self._refuse(REFUSING[0])

    def end(self) -> None:
        """Leave nothing running."""
        if self._names is not None:
            self._names.kill()
            self._names.wait()

    async def live(self, seconds: float, rng: random.Random) -> None:
        """Break something, mend it, and so on."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        happenings = (
            self._name_server, self._device, self._refuse_in_turn, self._move, self._reload,
            self._resize,
        )  # fmt: skip
        while loop.time() < until:
            happening = rng.choice(happenings)
            name = happening.__name__.strip("_")
            self.events[name] = self.events.get(name, 0) + 1
            await happening(rng)
            await asyncio.sleep(rng.uniform(0.5, 4))
        await self._recover()

    def may_fail(self, rule: str, since: float) -> bool:
        """Whether what a rule listens on was not there at some time ``since`` then (monotonic)."""
        is_settling = since < self.settles_at
        return rule == "link-local" and (DEVICE in self.away or is_settling or since < self.lost_at)

    # -- what happens

    async def _name_server(self, rng: random.Random) -> None:
        """It goes, or hangs, and comes again."""
        assert self._names is not None
        if rng.random() < 0.5:
            self._stop_names()
            await asyncio.sleep(rng.uniform(2, 45))
            self._start_names()
        else:
            self._names.send_signal(signal.SIGSTOP)
            await asyncio.sleep(rng.uniform(2, 45))
            self._names.send_signal(signal.SIGCONT)

    async def _device(self, rng: random.Random) -> None:
        """An interface is deleted and made again, with another index."""
        self.away.add(DEVICE)
        self.lost_at = asyncio.get_running_loop().time()
        ip(f"link delete {DEVICE}")
        await asyncio.sleep(rng.uniform(0, 15))
        self._make_device()
        self.settles_at = asyncio.get_running_loop().time() + SETTLE_S
        self.away.discard(DEVICE)

    async def _refuse_in_turn(self, _rng: random.Random) -> None:
        """The upstream that refused serves again, then the other one refuses."""
        self._refuse(next(host for host in REFUSING if host not in self.away))

    async def _move(self, _rng: random.Random) -> None:
        """A name means another address."""
        self._moved_to = 1 - self._moved_to
        self._stop_names()
        self._start_names()

    async def _reload(self, _rng: random.Random) -> None:
        await self.reload()

    async def _resize(self, rng: random.Random) -> None:
        """One worker more or fewer."""
        number = rng.choice((signal.SIGTTIN, signal.SIGTTOU))
        os.kill(self.master(), number)

    async def _recover(self) -> None:
        if self._names is None:
            self._start_names()

    # -- means

    def _make_network(self) -> None:
        ip("link set lo up")
        self._make_device()
        resolv = self.directory / "resolv.conf"
        resolv.write_text("nameserver 127.0.0.1\noptions timeout:2 attempts:2\n")
        subprocess.run(["mount", "--bind", str(resolv), "/etc/resolv.conf"], check=True)

    def _make_device(self) -> None:
        ip(f"link add {DEVICE} type veth peer name {DEVICE}p")
        ip(f"link set {DEVICE}p up")
        ip(f"address add {LINK_LOCAL}/64 dev {DEVICE} nodad")
        ip(f"link set {DEVICE} up")

    def _start_names(self) -> None:
        self._names = subprocess.Popen(
            [
                *("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--pid-file="),
                *("--no-resolv", "--no-hosts", "--user=", "--group=", "--local=/test/"),
                *("--listen-address=127.0.0.1", "--bind-interfaces"),
                f"--address=/stays.test/{ALWAYS}",
                f"--address=/moves.test/{MOVING[self._moved_to]}",
            ],
            stdin=subprocess.DEVNULL,
        )

    def _stop_names(self) -> None:
        assert self._names is not None
        self._names.kill()
        self._names.wait()

    async def _serve(self, host: str) -> None:
        loop = asyncio.get_running_loop()
        await loop.create_datagram_endpoint(UdpEcho, (host, UDP_PORT))
        self._servers.append(await asyncio.start_server(_echo, host, TCP_PORT))

    def _refuse(self, host: str) -> None:
        """Have ``host`` alone refuse new connections, and datagrams; open connections go on.

        By the firewall: a listening socket that is closed resets what it has accepted already.
        """
        rules = (
            "add table inet world; flush table inet world;"
            "add chain inet world in { type filter hook input priority 0; };"
            f"add rule inet world in ip daddr {host} tcp flags & (syn | ack) == syn "
            "reject with tcp reset;"
            f"add rule inet world in ip daddr {host} udp dport {UDP_PORT} reject;"
        )
        subprocess.run(["nft", rules], check=True)
        self.away -= set(REFUSING)
        self.away.add(host)
