"""Socket options of TCP rules are on the real sockets of the real command, on both sides."""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import pytest
from support.borrowed import connected_to, listening, peer_of, sockets_of
from support.configured import Configured, rule
from support.ends import Link, accept, carry, connect, listen
from support.forwarder import reserve_port
from support.processes import run_command
from support.waiting import eventually

from forwarder.net.sockets import queue_of
from process.test_activation import activate

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import ExitStack
    from pathlib import Path

    from process.conftest import Launch

pytestmark = pytest.mark.process

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may set marks")
SOL, TCP = socket.SOL_SOCKET, socket.IPPROTO_TCP
_BUF_LOCK: Final = 72
Pair = tuple[int, int]

OPTIONS: Final[dict[str, Pair]] = {
    "keepalive": (SOL, socket.SO_KEEPALIVE),
    "keepalive_idle": (TCP, socket.TCP_KEEPIDLE),
    "keepalive_interval": (TCP, socket.TCP_KEEPINTVL),
    "keepalive_count": (TCP, socket.TCP_KEEPCNT),
    "nodelay": (TCP, socket.TCP_NODELAY),
    "user_timeout": (TCP, socket.TCP_USER_TIMEOUT),
    "rcvbuf": (SOL, socket.SO_RCVBUF),
    "sndbuf": (SOL, socket.SO_SNDBUF),
    "buffers are fixed": (SOL, _BUF_LOCK),
    "congestion": (TCP, socket.TCP_CONGESTION),
    "mark": (SOL, socket.SO_MARK),
    "device": (SOL, socket.SO_BINDTODEVICE),
    "dscp": (socket.IPPROTO_IP, socket.IP_TOS),
    "dscp of IPv6": (socket.IPPROTO_IPV6, socket.IPV6_TCLASS),
    "urgent data in line": (SOL, socket.SO_OOBINLINE),
}
# As written, and as the kernel says it: it doubles buffers, and DSCP is the upper six bits.
WRITTEN: Final = """
keepalive_idle = 61
keepalive_interval = "7s"
keepalive_count = 3
nodelay = false
user_timeout = "12345ms"
backlog = 77
rcvbuf = 50000
sndbuf = 40000
congestion = "reno"
mark = 0xfffffffe
upstream_mark = 6
device = "lo"
upstream_device = "lo"
dscp = "ef"
"""
CLIENT_SIDE: Final[dict[str, object]] = {
    "keepalive": 1,
    "keepalive_idle": 61,
    "keepalive_interval": 7,
    "keepalive_count": 3,
    "nodelay": 0,
    "user_timeout": 12345,
    "rcvbuf": 100000,
    "sndbuf": 80000,
    "buffers are fixed": 3,
    "congestion": b"reno",
    "mark": -2,
    "device": b"lo",
    "dscp": 46 << 2,
    "dscp of IPv6": 46 << 2,
    "urgent data in line": 1,
}
UPSTREAM_SIDE: Final = CLIENT_SIDE | {"mark": 6}


def values(sock: socket.socket) -> dict[str, object]:
    """All options of a socket that it has."""
    found: dict[str, object] = {}
    for key, (level, name) in OPTIONS.items():
        if level == socket.IPPROTO_IPV6 and sock.family != socket.AF_INET6:
            continue
        if key in ("congestion", "device"):
            found[key] = sock.getsockopt(level, name, 16).rstrip(b"\0")
        else:
            found[key] = sock.getsockopt(level, name)
    return found


def of_family(expected: Mapping[str, object], family: int) -> dict[str, object]:
    """Without what only sockets of IPv6 have."""
    return {
        key: value
        for key, value in expected.items()
        if key != "dscp of IPv6" or family == socket.AF_INET6
    }


def fresh(family: int) -> dict[str, object]:
    """What a rule without options has: the defaults of this kernel, and what is ours always."""
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        ours = {"keepalive": 1, "nodelay": 1, "urgent data in line": 1}
        return values(sock) | ours


def without_sizes(found: Mapping[str, object]) -> dict[str, object]:
    """Buffers that are not fixed grow with the connection."""
    return {key: value for key, value in found.items() if key not in ("rcvbuf", "sndbuf")}


@dataclass
class Site:
    """A forwarder of one rule with two workers, whose file is rewritten."""

    it: Configured
    address: tuple[str, int]
    upstream: socket.socket
    stack: ExitStack

    def text(self, options: str) -> str:
        name = self.upstream.getsockname()
        return "workers = 2\n" + rule(self.address, (name[0], name[1]), options)

    def link(self) -> Link:
        """A session, closed at the end."""
        client = self.stack.enter_context(connect(self.address))
        return Link(client, self.stack.enter_context(accept(self.upstream)))

    def both(self, link: Link) -> tuple[dict[str, object], dict[str, object]]:
        """Options of the forwarder's two sockets of a session."""
        workers = self.it.forwarder.workers()
        client = link.client.getsockname()[:2]
        upstream = self.upstream.getsockname()[:2]
        with sockets_of(*workers) as found:
            peers = [sock for sock in found if peer_of(sock) == upstream]
            mine = [s for s in peers if s.getsockname()[:2] == link.upstream.getpeername()[:2]]
            with connected_to(workers, client) as near:
                return values(near), values(mine[0])

    def stop(self) -> int:
        """End it; sessions that are open would hold it up."""
        self.stack.close()
        return self.it.forwarder.stop()

    def listeners(self) -> list[object]:
        return listening([self.it.forwarder.pid], self.address, values)

    def backlogs(self) -> list[object]:
        pid = self.it.forwarder.pid
        return listening([pid], self.address, lambda sock: queue_of(sock).limit)

    def inodes(self) -> list[object]:
        pid = self.it.forwarder.pid
        return listening([pid], self.address, lambda sock: os.fstat(sock.fileno()).st_ino)


@pytest.fixture(params=["127.0.0.1", "::1"], ids=["IPv4", "IPv6"])
def host(request: pytest.FixtureRequest) -> str:
    """Where both sides are."""
    return str(request.param)


def start(launch: Launch, tmp_path: Path, stack: ExitStack, host: str, options: str) -> Site:
    address = stack.enter_context(reserve_port(host)).getsockname()[:2]
    upstream = stack.enter_context(listen(host))
    path = tmp_path / "forwarder.toml"
    name = upstream.getsockname()
    path.write_text("workers = 2\n" + rule(address, (name[0], name[1]), options))
    return Site(Configured(launch("-c", str(path)), path), address, upstream, stack)


def test_a_rule_without_options_has_keepalive_and_no_delay(
    launch: Launch, tmp_path: Path, stack: ExitStack, host: str
) -> None:
    site = start(launch, tmp_path, stack, host, "")
    expected = fresh(site.upstream.family)
    assert site.listeners() == [expected, expected]
    assert site.backlogs() == [4096, 4096]
    for found in site.both(site.link()):
        assert without_sizes(found) == without_sizes(expected)
    assert site.stop() == 0


@as_root
def test_every_option_is_on_the_sockets_of_both_sides_and_a_reload_changes_it(
    launch: Launch, tmp_path: Path, stack: ExitStack, host: str
) -> None:
    """Open sessions keep theirs. What a rule does not say any more is the kernel's again.

    Result: the listening sockets are the same ones all the time.
    """
    site = start(launch, tmp_path, stack, host, WRITTEN)
    family = site.upstream.family
    client, upstream = of_family(CLIENT_SIDE, family), of_family(UPSTREAM_SIDE, family)
    inodes = site.inodes()
    assert site.listeners() == [client, client]
    assert site.backlogs() == [77, 77]
    first = site.link()
    assert site.both(first) == (client, upstream)

    assert "~1" in site.it.reload(site.text("keepalive = false\nkeepalive_idle = 99\n"))
    assert site.both(first) == (client, upstream)
    assert site.backlogs() == [4096, 4096]
    second = site.link()
    expected = without_sizes(fresh(family) | {"keepalive": 0})
    for found in site.both(second):
        assert without_sizes(found) == expected

    assert "~1" in site.it.reload(site.text(WRITTEN))
    assert site.listeners() == [client, client]
    assert site.both(site.link()) == (client, upstream)
    assert "~1" in site.it.reload(site.text(""))
    plain = fresh(family)
    assert site.listeners() == [plain, plain]
    assert site.inodes() == inodes
    for link in (first, second):
        carry(link.client, link.upstream, b"as before")
    assert site.stop() == 0


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ('congestion = "nosuch"', r":5:1: congestion 'nosuch': there is none here; allowed: "),
        ('device = "nosuch0"', r":5:1: there is no network device 'nosuch0'"),
        ("rcvbuf = 1000000000", r":5:1: rcvbuf is 1000000000, and .*net\.core\.rmem_max"),
        ("backlog = 1000000", r":5:1: backlog is 1000000, .*net\.core\.somaxconn"),
    ],
    ids=["congestion", "device", "rcvbuf", "backlog"],
)
def test_a_reload_that_asks_for_something_impossible_changes_nothing(
    launch: Launch, tmp_path: Path, stack: ExitStack, options: str, complaint: str
) -> None:
    """The same configuration is refused at a start, and by ``check``."""
    site = start(launch, tmp_path, stack, "127.0.0.1", "backlog = 55")
    before = site.listeners()
    link = site.link()
    assert "stays in force" in site.it.reload(site.text(f"{options}\nkeepalive_idle = 5"))
    assert any(re.search(complaint, line) for line in site.it.forwarder.lines)
    assert site.listeners() == before
    assert site.backlogs() == [55, 55]
    carry(link.client, link.upstream, b"as before")
    for command in ("check", "run"):
        done = run_command(command, "-c", str(site.it.path))
        assert done.returncode == 78, done.stderr
        assert re.search(complaint, done.stderr)
    assert site.stop() == 0


def test_a_successor_gives_inherited_sockets_the_options_of_its_rules(
    launch: Launch, tmp_path: Path, stack: ExitStack
) -> None:
    options = 'keepalive_idle = 61\nuser_timeout = 5\ncongestion = "reno"\nbacklog = 9'
    site = start(launch, tmp_path, stack, "127.0.0.1", options)
    old = site.it.forwarder
    inodes = site.inodes()
    site.it.path.write_text(site.text("keepalive_count = 3\nbacklog = 99"))
    old.signal(signal.SIGUSR2)
    eventually(lambda: old.process.poll() is not None, "the old one stays")
    new = successor(old.lines)
    expected = fresh(socket.AF_INET) | {"keepalive_count": 3}
    assert listening([new], site.address, values) == [expected, expected]
    limits = listening([new], site.address, lambda sock: queue_of(sock).limit)
    assert limits == [99, 99]
    kept = listening([new], site.address, lambda sock: os.fstat(sock.fileno()).st_ino)
    assert kept == inodes
    os.kill(new, signal.SIGTERM)
    assert old.wait() == 0


def successor(lines: list[str]) -> int:
    """The pid of the last master that got ready."""
    ready = [match[1] for line in lines if (match := re.search(r"master\.ready pid=(\d+)", line))]
    return int(ready[-1])


def test_the_sockets_of_a_service_manager_get_what_the_rule_says(
    launch: Launch, tmp_path: Path, stack: ExitStack
) -> None:
    """Its own backlog, 128, stays when the rule has none."""
    address = stack.enter_context(reserve_port()).getsockname()
    upstream = stack.enter_context(listen())
    path = tmp_path / "forwarder.toml"
    text = "workers = 2\n" + rule(address, upstream.getsockname(), "keepalive_idle = 61")
    path.write_text(text)
    it = Configured(launch("-c", str(path), prefix=activate(address, kind="single")), path)
    expected = fresh(socket.AF_INET) | {"keepalive_idle": 61}
    assert listening([it.forwarder.pid], address, values) == [expected] * 2
    limits = listening([it.forwarder.pid], address, lambda sock: queue_of(sock).limit)
    assert limits == [128, 128]
    assert it.forwarder.stop() == 0


def test_the_queue_of_a_unix_socket_is_as_long_as_its_rule_says(
    launch: Launch, tmp_path: Path, upstream: socket.socket
) -> None:
    place = tmp_path / "listen.sock"
    path = tmp_path / "forwarder.toml"

    def text(backlog: int) -> str:
        host, port = upstream.getsockname()
        return (
            f'[[forwarding_rules]]\nlisten = "unix:{place}"\nupstream = "{host}:{port}"\n'
            f"backlog = {backlog}\nkeepalive_idle = 61\n"
        )

    path.write_text(text(17))
    it = Configured(launch("-c", str(path)), path)
    assert unix_backlog(place) == 17
    with connect(str(place)) as client, accept(upstream) as peer:
        carry(client, peer, b"there")
        with connected_to(it.forwarder.workers(), upstream.getsockname()) as found:
            assert values(found)["keepalive_idle"] == 61
    assert "~1" in it.reload(text(18))
    assert unix_backlog(place) == 18
    assert it.forwarder.stop() == 0


def unix_backlog(place: Path) -> int:
    """The column Send-Q of a listening socket, ss(8)."""
    shown = subprocess.run(
        ["ss", "-lxnH", "src", str(place)], check=True, capture_output=True, text=True
    )
    return int(shown.stdout.split()[3])


def test_a_reset_is_passed_on_whatever_the_options(
    launch: Launch, tmp_path: Path, stack: ExitStack
) -> None:
    """A small buffer and no keepalive change nothing of how sessions end."""
    site = start(launch, tmp_path, stack, "127.0.0.1", "keepalive = false\nsndbuf = 4096")
    link = site.link()
    carry(link.client, link.upstream, b"x" * 300_000)
    link.client.setsockopt(SOL, socket.SO_LINGER, struct.pack("ii", 1, 0))
    link.client.close()
    with pytest.raises(ConnectionResetError):
        link.upstream.recv(1)
    assert site.stop() == 0
