"""Datagrams for many, and from nobody: broadcasts, groups, source port 0. See ``network``."""

from __future__ import annotations

import os
import signal
import socket
import struct
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Final

import pytest
from support import control
from support.datagrams import udp
from support.ends import written
from support.icmp import checksum
from support.waiting import PATIENCE_S, eventually

from process.conftest import ADDRESSES

if TYPE_CHECKING:
    from support.configured import Configured

    from process.conftest import Network

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can make namespaces"),
]
PORT: Final = 5300
CLIENT, NEAR, _, UPSTREAM = ADDRESSES["IPv4"]
CLIENT6, NEAR6, _, UPSTREAM6 = ADDRESSES["IPv6"]
GROUP, GROUP6 = "239.1.2.3", "ff15::5300"
# Where a client of a wildcard may write to.
DESTINATIONS = [NEAR, "10.1.0.255", "255.255.255.255", "224.0.0.1", "ff02::1", NEAR6]


def rule(listen: str, upstream: str = UPSTREAM, more: str = "") -> str:
    """A UDP rule in TOML; ``listen`` and ``upstream`` are hosts."""
    return (
        f'[[forwarding_rules]]\nname = "one"\nlisten = "{written((listen, PORT))}"\n'
        f'protocol = "udp"\nupstream = "{written((upstream, PORT))}"\n{more}\n'
    )


def top(network: Network) -> str:
    """What stands above the rules."""
    return f'control = "{network.path}.sock"\n'


class Site:
    """A client and an upstream, on either side of the forwarder."""

    def __init__(self, network: Network, stack: ExitStack) -> None:
        self.network = network
        self._stack = stack
        self.upstream = stack.enter_context(network.upstreams.call(partial(udp, UPSTREAM, PORT)))

    def client(self, host: str = CLIENT) -> socket.socket:
        """A client that may send to whom it likes, by its only device."""
        sock = self._stack.enter_context(self.network.clients.call(partial(udp, host)))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"c0")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        return sock

    def ask(self, to: str, *, is_answered: bool = True) -> tuple[list[bytes], set[str]]:
        """Ask three things there; returns what the upstream got, and from where answers came.

        Then others ask at the address of one host, so that all workers have had their turn.
        """
        is_ipv6 = ":" in to
        client = self.client(CLIENT6 if is_ipv6 else CLIENT)
        got: list[bytes] = []
        answered: set[str] = set()
        for number in range(3):
            client.sendto(b"%d" % number, (to, PORT))
            question, flow = self.upstream.recvfrom(1000)
            got.append(question)
            if is_answered:
                self.upstream.sendto(question, flow)
                answered.add(client.recvfrom(1000)[1][0].partition("%")[0])
        for _ in range(8):
            client = self.client(CLIENT6 if is_ipv6 else CLIENT)
            client.sendto(b"last", (NEAR6 if is_ipv6 else NEAR, PORT))
            while (question := self.upstream.recv(1000)) != b"last":
                got.append(question)
        return got, answered


@pytest.fixture
def site(network: Network, stack: ExitStack) -> Site:
    return Site(network, stack)


def once(site: Site, to: str) -> None:
    """What is sent there is forwarded once, and answered from the address of one host."""
    got, answered = site.ask(to)
    assert got == [b"0", b"1", b"2"], to
    (host,) = answered
    assert host in (NEAR, NEAR6) or host.startswith("fe80::"), to


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("listen", ["0.0.0.0", "::"])
def test_what_is_for_many_is_forwarded_once_and_answered_from_one_address(
    network: Network, site: Site, listen: str, workers: int
) -> None:
    network.start(rule(listen), workers)
    for to in DESTINATIONS:
        if ":" in to and listen != "::":
            continue
        once(site, to)


def test_it_is_forwarded_once_whatever_becomes_of_the_workers(network: Network, site: Site) -> None:
    """Resizes, the death of each of them, a reload that adds a rule, and an upgrade."""
    it = network.start(top(network) + rule("0.0.0.0"), 3)

    def check() -> None:
        # Flows of many end when a worker gives a listener back, perhaps before their answer.
        for to in ("10.1.0.255", "224.0.0.1", NEAR):
            assert site.ask(to, is_answered=False)[0] == [b"0", b"1", b"2"], to

    check()
    it.resize(signal.SIGTTOU, 2)
    check()
    it.resize(signal.SIGTTOU, 1)
    check()
    it.resize(signal.SIGTTIN, 2)
    check()
    eventually(lambda: len(it.forwarder.workers()) == 2)  # those that were too many have gone
    for pid in it.forwarder.workers():
        os.kill(pid, signal.SIGKILL)
        eventually(partial(is_ready, it, pid), lambda: "\n".join(it.forwarder.lines))
        check()
    it.reload("workers = 2\n" + top(network) + rule("0.0.0.0", more='timeout = "80s"'))
    check()


def is_ready(it: Configured, without: int) -> bool:
    """Whether there are two workers that serve, and none of that process."""
    workers = control.ask(f"{it.path}.sock", "status")["workers"]
    assert isinstance(workers, list)
    ready = [worker["pid"] for worker in workers if worker["state"] == "ready"]
    return len(ready) == 2 and without not in ready


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    ("group", "more"),
    [(GROUP, 'device = "near"'), (GROUP6, 'device = "near"'), ("ff02::5300%near", ""), (GROUP, "")],
)
def test_a_rule_on_a_group_joins_it(
    network: Network, site: Site, group: str, more: str, workers: int
) -> None:
    """On its device, its zone, or that of the route. Result: once, and answered."""
    if not more:
        network.middle.ip(f"route add {GROUP} dev near")
    it = network.start(top(network) + rule(group, more=more), workers)
    client = site.client(CLIENT6 if ":" in group else CLIENT)
    for number in range(3):
        client.sendto(b"%d" % number, (group.partition("%")[0], PORT))
        question, flow = site.upstream.recvfrom(1000)
        assert question == b"%d" % number
        site.upstream.sendto(b"answer", flow)
        answer, source = client.recvfrom(1000)[:2]
        assert answer == b"answer"
        assert source[0] in (NEAR, NEAR6) or source[0].startswith("fe80::")
    eventually(lambda: sessions_total(it) == 1)


@pytest.mark.parametrize("group", [GROUP, GROUP6])
def test_a_group_is_joined_again_on_an_interface_that_was_made_anew(
    network: Network, site: Site, group: str
) -> None:
    """Joined by the route. Result: it waits while there is none, and listens on the next one."""
    is_ipv6 = ":" in group
    if is_ipv6:  # every interface has a route to all groups
        network.middle.ip("-6 route del ff00::/8 dev far table local")
    else:
        network.middle.ip(f"route add {GROUP} dev near")
    it = network.start(top(network) + rule(group))
    for _ in range(2):
        hears(site, group)
        network.middle.ip("link del near")
        eventually(lambda: state(it) == "waiting", lambda: state(it))
        network.lay_near()
        if not is_ipv6:
            network.middle.ip(f"route add {GROUP} dev near")
        eventually(lambda: state(it) == "listening", lambda: state(it))
    hears(site, group)
    it.forwarder.wait_logged("bind.lost rule=one .* on which it joined its group has gone")


def test_a_group_that_has_another_route_is_joined_there(network: Network, site: Site) -> None:
    """When the interface has gone on which it was joined."""
    network.middle.ip(f"route add {GROUP} dev near", f"route add {GROUP} dev far metric 9")
    it = network.start(top(network) + rule(GROUP))
    hears(site, GROUP)
    network.middle.ip("link del near")
    it.forwarder.wait_logged("bind.done rule=one ")
    with network.upstreams.call(partial(udp, UPSTREAM)) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"u0")
        client.sendto(b"question", (GROUP, PORT))
        assert site.upstream.recv(100) == b"question"


def hears(site: Site, group: str) -> None:
    """A datagram to the group comes to the upstream."""
    client = site.client(CLIENT6 if ":" in group else CLIENT)
    client.sendto(b"question", (group, PORT))
    assert site.upstream.recv(100) == b"question"


def state(it: Configured) -> object:
    """Of the rule, as in the status."""
    rules = control.ask(f"{it.path}.sock", "status")["rules"]
    assert isinstance(rules, list)
    return rules[0]["state"]


def test_a_group_without_an_interface_says_what_to_do(network: Network) -> None:
    path = network.path
    path.write_text(rule(GROUP))
    forwarder = network.launch("-c", str(path), prefix=network.middle.prefix, expect_ready=False)
    assert forwarder.wait() == 69
    assert any("give the rule a device" in line for line in forwarder.lines)


@pytest.mark.parametrize("host", ["10.2.0.255", "255.255.255.255"])
def test_an_upstream_may_be_a_broadcast_address(network: Network, site: Site, host: str) -> None:
    site.upstream.close()
    with network.upstreams.call(partial(udp, "0.0.0.0", PORT)) as heard:
        network.middle.ip("route add 255.255.255.255 dev far")
        network.start(rule(NEAR, host))
        client = site.client()
        for number in range(3):
            client.sendto(b"%d" % number, (NEAR, PORT))
            assert heard.recv(100) == b"%d" % number


# -- from nobody


def send_as(source: tuple[str, int], to: tuple[str, int], content: bytes, device: str) -> None:
    """Send a datagram whose source is made up, by a device."""
    ends = socket.inet_aton(source[0]) + socket.inet_aton(to[0])
    size = 8 + len(content)
    header = struct.pack("!HHHH", source[1], to[1], size, 0)  # without a checksum: RFC 768
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + size, 1, 0, 64, socket.IPPROTO_UDP, 0) + ends
    ip = ip[:10] + struct.pack("!H", checksum(ip)) + ip[12:]
    if source[0] == "0.0.0.0":  # which a raw socket would fill in, raw(7)
        with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM) as link:
            link.sendto(ip + header + content, (device, 0x0800, 0, 0, b"\xff" * 6))
        return
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        raw.sendto(ip + header + content, (to[0], 0))


def sessions_total(it: Configured) -> int:
    return total(it, "sessions_total")


def dropped(it: Configured) -> int:
    return total(it, "datagrams_dropped")


def total(it: Configured, key: str) -> int:
    totals = control.ask(f"{it.path}.sock", "status")["totals"]
    assert isinstance(totals, dict)
    return int(totals[key])


@pytest.mark.parametrize("listen", [NEAR, "0.0.0.0", "::"])
def test_datagrams_from_port_0_are_dropped_and_silence_nobody(
    network: Network, site: Site, listen: str
) -> None:
    """Three of them from the address of a client, who then asks from ten ports."""
    it = network.start(top(network) + rule(listen))
    for _ in range(3):
        network.clients.call(partial(send_as, (CLIENT, 0), (NEAR, PORT), b"nobody", "c0"))
    eventually(lambda: dropped(it) == 3)
    for number in range(10):
        client = site.client()
        for _ in range(2):
            client.sendto(b"%d" % number, (NEAR, PORT))
            question, flow = site.upstream.recvfrom(1000)
            assert question == b"%d" % number
            site.upstream.sendto(question, flow)
            assert client.recv(100) == question
    eventually(lambda: sessions_total(it) == 10)


def test_datagrams_without_an_address_or_from_ourselves_are_dropped(
    network: Network, site: Site
) -> None:
    """As DHCP begins, to everybody; and one that pretends to come from where it goes to."""
    it = network.start(top(network) + rule("0.0.0.0"))
    network.clients.call(
        partial(send_as, ("0.0.0.0", 68), ("255.255.255.255", PORT), b"nobody", "c0")
    )
    network.middle.call(partial(send_as, (NEAR, PORT), (NEAR, PORT), b"ourselves", "lo"))
    eventually(lambda: dropped(it) == 2, lambda: dropped(it))
    with suppress(BlockingIOError):
        site.upstream.setblocking(False)
        raise AssertionError(site.upstream.recv(100))
    site.upstream.settimeout(PATIENCE_S)
    assert sessions_total(it) == 0
