"""Flows and bridges go on in other workers, and in a new instance, while both ends talk."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from support.datagrams import free_udp_address, udp, udp_client
from support.ends import accept, connect, receive_exactly, written
from support.forwarder import reserve_port
from support.loads import UdpLoad
from support.upgraded import Site

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from process.conftest import Launch

pytestmark = pytest.mark.process

FLOWS = 50


def framed(content: bytes) -> bytes:
    """As in a stream with ``framing = "length"``."""
    return len(content).to_bytes(2, "big") + content


class FlowSite(Site):
    """Three rules more: UDP, UDP to TCP, and TCP to UDP, the last two with frames."""

    def __init__(self, launch: Launch, directory: Path, stack: ExitStack) -> None:
        super().__init__(launch, directory, stack)
        self.by_udp, self.to_tcp = free_udp_address(), free_udp_address()
        self.to_udp: tuple[str, int] = stack.enter_context(reserve_port()).getsockname()
        self.far, self.asked = stack.enter_context(udp()), stack.enter_context(udp())

    def text(self, workers: int = 2, more: str = "", head: str = "") -> str:
        rules = (
            ("udp", self.by_udp, self.far, ""),
            ("udptotcp", self.to_tcp, self.upstream, 'framing = "length"'),
            ("tcptoudp", self.to_udp, self.asked, 'framing = "length"'),
        )
        more += "".join(
            f'[[forwarding_rules]]\nlisten = "{written(address)}"\nprotocol = "{protocol}"\n'
            f'upstream = "{written(upstream.getsockname())}"\n{how}\n'
            for protocol, address, upstream, how in rules
        )
        return super().text(workers, more, head)

    def ids(self) -> list[str]:
        """Of all sessions."""
        return sorted(line.split()[0] for line in self.run("sessions").stdout.splitlines()[1:])

    def totals(self) -> dict[str, int]:
        """The counters of all rules together."""
        found: dict[str, int] = self.status()["totals"]  # type: ignore[assignment]
        return found


@pytest.fixture
def site(launch: Launch, tmp_path: Path) -> Iterator[FlowSite]:
    """See :class:`FlowSite`."""
    with ExitStack() as stack:
        yield FlowSite(launch, tmp_path, stack)


class Slow:
    """One session of each of the rules with frames, whose stream says a frame byte by byte."""

    def __init__(self, site: FlowSite, stack: ExitStack) -> None:
        self._asked = site.asked
        self._client = stack.enter_context(udp_client(site.to_tcp))
        self._client.send(b"one")
        self._upstream = stack.enter_context(accept(site.upstream))
        self._client.send(b"two")  # with which its flow settles
        assert receive_exactly(self._upstream, 10) == framed(b"one") + framed(b"two")
        self._bridge = stack.enter_context(connect(site.to_udp))
        self._bridge.sendall(framed(b"hello"))
        hello, self._source = self._asked.recvfrom(100)
        assert hello == b"hello"
        self._said = bytearray()
        self._frame = framed(b"a frame of two sizes")

    def go_on(self) -> None:
        """A byte more of each frame, and a datagram the other way."""
        byte = self._frame[len(self._said) : len(self._said) + 1]
        self._said += byte
        for stream in (self._upstream, self._bridge):
            stream.sendall(byte)
        self._client.send(byte)
        assert receive_exactly(self._upstream, 3) == framed(byte)
        self._asked.sendto(byte, self._source)
        assert receive_exactly(self._bridge, 3) == framed(byte)

    def end(self) -> None:
        """The rest of the frames. Result: each is one datagram, of the same session as ever."""
        for stream in (self._upstream, self._bridge):
            stream.sendall(self._frame[len(self._said) :])
        assert self._client.recv(100) == self._frame[2:]
        assert self._asked.recvfrom(100) == (self._frame[2:], self._source)
        self._client.settimeout(0)
        with pytest.raises(BlockingIOError):
            self._client.recv(100)


def test_no_datagram_and_no_byte_is_lost_wherever_a_flow_goes(site: FlowSite) -> None:
    """From 2 workers to 1, 3 and 1, and to a new instance; the processes that gave them are gone.

    Result: of paced streams nothing is lost, repeated or reordered; each is one flow throughout.
    """
    master = site.start(2)
    with ExitStack() as stack:
        slow = Slow(site, stack)
        load = stack.enter_context(UdpLoad(site.by_udp, site.far, flows=FLOWS, rate=2000))
        load.wait_answered(10 * FLOWS)
        born = site.ids()
        assert len(born) == FLOWS + 2
        for workers in (1, 3, 1):
            assert site.run("workers", str(workers)).returncode == 0
            site.wait_alone(master, workers)
            slow.go_on()
            load.wait_answered(4 * FLOWS)
            assert site.ids() == born
        totals = site.totals()
        assert (totals["sessions"], totals["sessions_total"]) == (len(born), len(born))
        master = site.upgrade()
        site.wait_alone(master, 2)
        slow.go_on()
        load.wait_answered(4 * FLOWS)
        assert site.ids() == born
        account = load.stop()
        assert account.is_spotless, (account, site.forwarder.lines[-20:])
        slow.end()
        totals = site.totals()
        assert (totals["sessions"], totals["datagrams_dropped"]) == (len(born), 0)
    assert not site.forwarder.trouble(), site.forwarder.trouble()
    site.stop()
