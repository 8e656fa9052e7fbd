"""UDP flows through reloads, resizes, upgrades, kills and stops of the real command."""

from __future__ import annotations

import itertools
import os
import re
import signal
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support import procfs
from support.configured import IS_SOAK, Configured
from support.datagrams import drain, free_udp_address, udp, udp_client
from support.ends import accept, connect, listen, written
from support.forwarder import reserve_port
from support.hosts import own_host
from support.loads import UdpLoad
from support.processes import members, run_command, title
from support.waiting import eventually

from process.conftest import stop

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator, Sequence

    from support.forwarder import Forwarder

    from process.conftest import Launch

pytestmark = pytest.mark.process

MORE, FEWER = signal.SIGTTIN, signal.SIGTTOU
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


def rule(
    listen_at: tuple[str, int], upstream: socket.socket, protocol: str = "udp", more: str = ""
) -> str:
    """A rule in TOML; ``more`` is added to its table."""
    return (
        f'[[forwarding_rules]]\nlisten = "{written(listen_at)}"\nprotocol = "{protocol}"\n'
        f'upstream = "{written(upstream.getsockname())}"\n{more}\n'
    )


class UdpSite:
    """A forwarder with a UDP rule, its upstream, and clients."""

    def __init__(self, launch: Launch, path: Path, stack: ExitStack) -> None:
        self._launch = launch
        self._path = path
        self._stack = stack
        self.address = free_udp_address()
        self.upstream = self.own(udp())
        self.it: Configured

    def own(self, sock: socket.socket) -> socket.socket:
        return self._stack.enter_context(sock)

    def text(self, workers: int = 2, more: str = "", head: str = "") -> str:
        return f"workers = {workers}\n{head}\n" + rule(self.address, self.upstream, more=more)

    def start(
        self, workers: int = 2, *, more: str = "", head: str = "", prefix: Sequence[str] = ()
    ) -> Configured:
        """Start it. ``more`` is added to the rule, ``head`` to the settings."""
        self._path.write_text(self.text(workers, more, head))
        self.it = Configured(self._launch("-c", str(self._path), prefix=prefix), self._path)
        return self.it

    def resize(self, walk: Sequence[int], load: UdpLoad) -> None:
        """Have so many workers, one number after the other, beginning from two."""
        for before, wanted in itertools.pairwise((2, *walk)):
            self.it.resize(MORE if wanted > before else FEWER, wanted)
            load.wait_answered(200)

    def restart(self) -> Forwarder:
        """Start another one with the same configuration."""
        return self._launch("-c", str(self._path))

    def client(self) -> socket.socket:
        return self.own(udp_client(self.address))

    def ask(self, client: socket.socket, text: bytes = b"?") -> tuple[str, int]:
        """A datagram there and one back; returns from where it came to the upstream."""
        client.send(text)
        got, source = self.upstream.recvfrom(65536)
        assert got == text
        self.upstream.sendto(b"answer to " + text, source)
        assert client.recv(65536) == b"answer to " + text
        return source[0], source[1]

    def is_answered(self, client: socket.socket) -> bool:
        """Whether a datagram gets to the upstream; asked again and again until it does not."""
        client.settimeout(0.05)
        try:
            client.send(b"anybody?")
            self.upstream.settimeout(0.2)
            self.upstream.recv(100)
        except (TimeoutError, ConnectionRefusedError):
            return False
        else:
            return True
        finally:
            self.upstream.settimeout(30)
            client.settimeout(30)


@pytest.fixture
def site(launch: Launch, tmp_path: Path) -> Iterator[UdpSite]:
    with ExitStack() as stack:
        yield UdpSite(launch, tmp_path / "forwarder.toml", stack)


def flow_sockets(pids: Sequence[int], address: tuple[str, int]) -> int:
    """How many sockets of flows these processes have at an address: connected ones."""
    inodes = {
        target[8:-1]
        for pid in pids
        for target in procfs.descriptors(pid).values()
        if target.startswith("socket:")
    }
    port = f":{address[1]:04X}"
    rows = [
        line.split()
        for table in ("udp", "udp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    return sum(row[1].endswith(port) and row[3] == "01" and row[9] in inodes for row in rows)


# -- nothing lost


def test_reloads_and_resizes_and_an_upgrade_cost_no_datagram(site: UdpSite) -> None:
    """Reloads that leave the rule as it is, 1 to 4 workers and back, a new process.

    Result: of paced streams nothing is lost, repeated or reordered; each is one flow throughout.
    """
    it = site.start(2)
    with UdpLoad(site.address, site.upstream, flows=10) as load:
        load.wait_answered(200)
        for number in range(100 if IS_SOAK else 25):
            assert "=1" in it.reload(site.text(2, head=f"# {number}"))
        load.wait_answered(200)
        site.resize((3, 4, 3, 2, 1, 2), load)
        before = it.forwarder.workers()
        it.forwarder.signal(signal.SIGUSR2)
        it.forwarder.wait_logged(r"master\.stopping how=drain")
        load.wait_answered(500)
        eventually(lambda: not set(before) & set(members(it.forwarder.pid)))
        account = load.stop()
    assert account.is_spotless, (account, it.forwarder.lines[-20:])
    assert account.sent > 1500
    end_all(it.forwarder)


def end_all(forwarder: Forwarder) -> None:
    """End an instance and the one that it was upgraded to."""
    for pid in members(forwarder.pid):
        with suppress(OSError):  # it has ended meanwhile
            if title(pid).startswith("forwarder: master"):
                os.kill(pid, signal.SIGTERM)
    eventually(lambda: not members(forwarder.pid), lambda: str(forwarder.lines[-10:]))


def test_two_hundred_flows_survive_resizes(site: UdpSite) -> None:
    it = site.start(2)
    with UdpLoad(site.address, site.upstream, flows=200, rate=4000) as load:
        load.wait_answered(1000)
        site.resize((1, 2, 3, 4, 3, 2, 1), load)
        account = load.stop()
    assert account.is_spotless, (account, it.forwarder.lines[-20:])


@pytest.mark.parametrize("workers", [1, 4])
def test_new_clients_get_one_flow_each_however_many_there_are(site: UdpSite, workers: int) -> None:
    """Three hundred at once, three datagrams each. Result: three hundred upstream-side ports."""
    site.start(workers)
    clients = [site.client() for _ in range(300)]
    for number in range(3):
        for client in clients:
            client.send(b"%d" % number)
    sources = [site.upstream.recvfrom(100)[1] for _ in range(900)]
    assert len(set(sources)) == 300
    assert all(sources.count(source) == 3 for source in set(sources))


# -- rules that come and go


def test_a_rule_that_is_removed_answers_no_more_and_its_flows_end(site: UdpSite) -> None:
    """After drain_timeout. Result: the port is free then."""
    with ExitStack() as stack:
        other = rule(free_udp_address(), stack.enter_context(udp()))
        it = site.start(2, head='drain_timeout = "3s"')
        old = site.client()
        source = site.ask(old)
        site.ask(old)
        it.reload('workers = 2\ndrain_timeout = "3s"\n' + other)
        eventually(lambda: not site.is_answered(site.client()))
        assert site.ask(old) == source, "a flow goes on after its rule"
        eventually(lambda: flow_sockets(it.forwarder.workers(), site.address) == 0)
        udp(*site.address).close()
        assert it.forwarder.stop() == 0


def test_a_rule_that_comes_back_while_its_old_flows_live(site: UdpSite) -> None:
    """Their sockets have the port, but listen to nobody else. Result: no conflict, both served."""
    with ExitStack() as stack:
        other = rule(free_udp_address(), stack.enter_context(udp()))
        it = site.start(2)
        old = site.client()
        source = site.ask(old)
        site.ask(old)
        it.reload("workers = 2\n" + other)
        eventually(lambda: not site.is_answered(site.client()))
        assert "+1" in it.reload(site.text(2) + other)
        drain(site.upstream)
        site.ask(site.client(), b"new")
        assert site.ask(old, b"old") == source
        assert it.forwarder.stop() == 0


@pytest.mark.parametrize("way", ["there", "back"])
def test_a_rule_that_changes_between_udp_and_tcp_upstreams(site: UdpSite, way: str) -> None:
    """Flows keep what they began with; new clients get what the rule says now."""
    with listen() as stream:
        there = site.text(2)
        after = "workers = 2\n" + rule(site.address, stream, "udptotcp")
        it = site.start(2)
        if way == "back":
            it.reload(after)
            old = site.client()
            old.send(b"x")
            with accept(stream) as peer:
                assert peer.recv(1) == b"x"
                it.reload(there)
                site.ask(site.client())
                old.send(b"y")
                assert peer.recv(1) == b"y"
        else:
            old = site.client()
            source = site.ask(old)
            it.reload(after)
            new = site.client()
            new.send(b"x")
            with accept(stream) as peer:
                assert peer.recv(1) == b"x"
            assert site.ask(old) == source
        assert it.forwarder.stop() == 0


# -- two instances


def test_a_second_instance_on_the_same_port_is_refused(site: UdpSite, tmp_path: Path) -> None:
    it = site.start(2)
    client = site.client()
    site.ask(client)
    site.ask(client)
    path = tmp_path / "second.toml"
    path.write_text(rule(site.address, site.upstream))
    done = run_command("-c", str(path))
    assert done.returncode == 69
    assert f"cannot listen on {written(site.address)}: Address already in use" in done.stderr
    assert "another forwarder" in done.stderr
    assert "Traceback" not in done.stderr
    site.ask(client)
    assert it.forwarder.stop() == 0


def test_tcp_and_udp_share_a_port_and_a_second_instance_is_refused_all_the_same(
    site: UdpSite, tmp_path: Path
) -> None:
    with reserve_port() as holder, listen() as stream:
        site.address = holder.getsockname()
        both = rule(site.address, stream, "tcp") + rule(site.address, site.upstream)
        path = tmp_path / "both.toml"
        path.write_text("workers = 2\n" + both)
        it = site._launch("-c", str(path))
        site.ask(site.client())
        with connect(site.address) as client, accept(stream) as peer:
            client.sendall(b"x")
            assert peer.recv(1) == b"x"
        for only in ("tcp", "udp"):
            path = tmp_path / f"{only}.toml"
            path.write_text(rule(site.address, stream if only == "tcp" else site.upstream, only))
            done = run_command("-c", str(path))
            assert done.returncode == 69
            assert "Address already in use" in done.stderr
        assert it.stop() == 0


# -- killed processes


def test_a_killed_worker_takes_only_its_own_flows(site: UdpSite) -> None:
    """Result: others go on as they were, and each of its own begins anew with the next word."""
    it = site.start(3)
    clients = [site.client() for _ in range(60)]
    sources = {}
    for client in clients:
        sources[client] = site.ask(client)
        assert site.ask(client) == sources[client]
    workers = it.forwarder.workers()
    flows = {pid: flow_sockets([pid], site.address) for pid in workers}
    assert sum(flows.values()) == 60
    assert all(flows.values())
    ready = sum("worker.ready" in line for line in it.forwarder.lines)
    os.kill(workers[0], signal.SIGKILL)
    eventually(lambda: sum("worker.ready" in line for line in it.forwarder.lines) > ready)
    moved = sum(site.ask(client) != sources[client] for client in clients)
    assert moved == flows[workers[0]]
    assert flow_sockets(it.forwarder.workers(), site.address) >= 60 - moved
    assert it.forwarder.stop() == 0


def test_datagrams_in_the_queue_of_a_killed_worker_are_served(site: UdpSite) -> None:
    it = site.start(2)
    workers = it.forwarder.workers()
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    clients = [site.client() for _ in range(40)]
    for number, client in enumerate(clients):
        client.send(b"%d" % number)
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    for _ in clients:
        text, source = site.upstream.recvfrom(100)
        site.upstream.sendto(text, source)
    for number, client in enumerate(clients):
        assert client.recv(100) == b"%d" % number
    assert it.forwarder.stop() == 0


def test_a_killed_master_and_a_new_one(site: UdpSite) -> None:
    """Its sockets are taken over from the orphans, whose flows go on. Result: nothing is lost."""
    it = site.start(2)
    with UdpLoad(site.address, site.upstream, flows=20) as load:
        load.wait_answered(500)
        os.kill(it.forwarder.pid, signal.SIGKILL)
        it.forwarder.process.wait()
        it.forwarder.wait_logged("worker.orphaned")
        load.wait_answered(300)
        new = site.restart()
        new.wait_logged("took over 2 sockets")
        load.wait_answered(500)
        account = load.stop()
    assert account.is_spotless, (account, new.lines)
    assert new.stop() == 0
    for pid in members(it.forwarder.pid):
        os.kill(pid, signal.SIGKILL)


# -- the end


def test_silent_flows_do_not_hold_up_a_stop(site: UdpSite) -> None:
    """A minute of drain_timeout is not waited for."""
    it = site.start(2, head='drain_timeout = "10m"')
    for _ in range(10):
        client = site.client()
        site.ask(client)
        site.ask(client)
    assert it.forwarder.stop() == 0
    assert not it.forwarder.trouble()
    udp(*site.address).close()


def test_a_busy_flow_goes_on_until_drain_timeout(site: UdpSite) -> None:
    it = site.start(1, head='drain_timeout = "2s"')
    with UdpLoad(site.address, site.upstream, flows=1, rate=200) as load:
        load.wait_answered(50)
        it.forwarder.signal(signal.SIGTERM)
        it.forwarder.wait_logged(r"master\.stopping")
        load.wait_answered(100)
        assert stop(it.forwarder) == 0
        account = load.stop()
    assert any("sessions are left after drain_timeout" in line for line in it.forwarder.lines)
    assert account.moved == account.disordered == 0, account


# -- rights and limits


@as_root
def test_flows_settle_in_workers_without_rights(site: UdpSite) -> None:
    it = site.start(2, head='user = "nobody"')
    client = site.client()
    source = site.ask(client)
    assert site.ask(client) == source
    eventually(lambda: flow_sockets(it.forwarder.workers(), site.address) == 1)
    it.resize(MORE, 3)
    it.resize(FEWER, 2)
    assert site.ask(client) == source
    assert it.forwarder.stop() == 0
    assert not it.forwarder.trouble()


@as_root
def test_on_a_low_port_workers_without_rights_serve_flows_unsettled(site: UdpSite) -> None:
    """They may not bind it. Result: one warning for each worker, and every flow is served."""
    site.address = (own_host(1), 53)
    it = site.start(1, head='user = "nobody"')
    clients = [site.client() for _ in range(5)]
    for client in clients:
        source = site.ask(client)
        for _ in range(3):
            assert site.ask(client) == source
    assert flow_sockets(it.forwarder.workers(), site.address) == 0
    it.forwarder.wait_logged("udp.unsettled")
    assert sum("udp.unsettled" in line for line in it.forwarder.lines) == 1
    assert it.forwarder.stop() == 0


def test_flows_that_use_up_all_descriptors_make_room(site: UdpSite, tmp_path: Path) -> None:
    """The limit is 64. Result: new clients of both kinds are served; the longest silent go."""
    with reserve_port() as holder, listen() as stream:
        address = holder.getsockname()
        path = tmp_path / "both.toml"
        path.write_text(
            "workers = 1\n" + rule(address, stream, "tcp") + rule(site.address, site.upstream)
        )
        it = site._launch("-c", str(path), prefix=["prlimit", "--nofile=64:64"])
        last = None
        for _ in range(120):
            last = site.client()
            last.send(b"x")
            site.upstream.recv(10)
        assert last is not None
        eventually(lambda: site.is_answered(last))
        for _ in range(3):
            with connect(address) as client, accept(stream) as peer:
                client.sendall(b"x")
                assert peer.recv(1) == b"x"
        assert it.stop() == 0
        unexpected = [
            line for line in it.trouble() if not re.search(r"accept\.(paused|resumed)", line)
        ]
        assert not unexpected, unexpected


# -- sockets of a service manager

_ACTIVATE = """
import os, socket, sys
host, port, kind = sys.argv[1:4]
sock = socket.socket(type=socket.SOCK_DGRAM)
if kind == "shared":
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
sock.bind((host, int(port)))
fd = sock.detach()
if fd == 3:
    os.set_inheritable(fd, True)
else:
    os.dup2(fd, 3)
    os.close(fd)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execvp(sys.argv[4], sys.argv[4:])
"""


@pytest.mark.parametrize("kind", ["shared", "single"])
def test_a_given_socket_is_served(site: UdpSite, kind: str) -> None:
    """Without SO_REUSEPORT there can be no other: one worker has it, and flows do not settle."""
    host, port = site.address
    it = site.start(3, prefix=[sys.executable, "-c", _ACTIVATE, host, str(port), kind])
    clients = [site.client() for _ in range(30)]
    sources = {client: site.ask(client) for client in clients}
    assert len(set(sources.values())) == 30
    for client in clients:
        assert site.ask(client) == sources[client]
        assert site.ask(client) == sources[client]
    settled = flow_sockets(it.forwarder.workers(), site.address)
    assert settled == (30 if kind == "shared" else 0)
    if kind == "single":
        it.forwarder.wait_logged("udp.unsettled")
    warned = [line for line in it.forwarder.trouble() if "udp.unsettled" in line]
    assert len(warned) == (0 if kind == "shared" else 1)
    assert it.forwarder.stop() == 0
    assert it.forwarder.trouble() == warned
