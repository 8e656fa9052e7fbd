"""More workers, fewer workers, killed and hung workers: their clients are served on."""

from __future__ import annotations

import os
import re
import resource
import signal
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import pytest
from support import procfs
from support.configured import IS_SOAK, Configured, rule
from support.ends import Link, accept, carry, connect, listen
from support.forwarder import reserve_port
from support.loads import Load
from support.processes import listeners, owner, queued, state, suspend, title
from support.waiting import eventually

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from process.conftest import Launch

pytestmark = pytest.mark.process

MORE, FEWER = signal.SIGTTIN, signal.SIGTTOU
# A worker is taken for hung after 10 s without a sign of life.
HUNG_S = 60.0


class Site:
    """A forwarder of one rule whose number of workers changes, and the sessions through it."""

    def __init__(self, launch: Launch, path: Path, stack: ExitStack) -> None:
        self._launch = launch
        self._path = path
        self._stack = stack
        self.address: tuple[str, int] = stack.enter_context(reserve_port()).getsockname()
        self.upstream = stack.enter_context(listen())
        self.it: Configured

    def text(self, workers: int) -> str:
        """The configuration."""
        return f"workers = {workers}\n" + rule(self.address, self.upstream.getsockname())

    def start(self, workers: int, more: str = "", prefix: Sequence[str] = ()) -> Configured:
        """Start it. ``more`` is added to the configuration."""
        self._path.write_text(self.text(workers) + more)
        self.it = Configured(self._launch("-c", str(self._path), prefix=prefix), self._path)
        return self.it

    def link(self) -> Link:
        """A session."""
        client = self._stack.enter_context(connect(self.address))
        return Link(client, self._stack.enter_context(accept(self.upstream)))

    def links_in_all_workers(self) -> list[Link]:
        """Enough sessions that every worker has one."""
        workers = self.it.forwarder.workers()
        links: list[Link] = []
        owners: set[int] = set()
        while owners != set(workers):
            links.append(self.link())
            owners.add(owner(workers, links[-1].client))
            assert len(links) < 400
        return links

    def queue(self, count: int) -> list[socket.socket]:
        """Connect that many clients; does not wait until anybody accepts them."""
        return [self._stack.enter_context(connect(self.address)) for _ in range(count)]

    def assert_served(self, clients: Sequence[socket.socket]) -> None:
        """Each of the clients gets through, in whatever order."""
        for i, client in enumerate(clients):
            client.sendall(i.to_bytes(2, "big"))
        for _ in clients:
            peer = self._stack.enter_context(accept(self.upstream))
            number = peer.recv(2)
            peer.sendall(number)
        for i, client in enumerate(clients):
            assert client.recv(2) == i.to_bytes(2, "big")

    def assert_every_socket_is_served(self) -> None:
        """Each of many connections is answered: they are spread over all listening sockets."""
        for _ in range(20 * listeners(self.address)):
            link = self.link()
            assert_alive(link)
            link.close()


@pytest.fixture
def site(launch: Launch, tmp_path: Path) -> Iterator[Site]:
    """See :class:`Site`."""
    with ExitStack() as stack:
        yield Site(launch, tmp_path / "forwarder.toml", stack)


def assert_alive(link: Link) -> None:
    carry(link.client, link.upstream, b"x" * 1000)
    carry(link.upstream, link.client, b"y" * 1000)


def sizes(count: int) -> list[int]:
    """A walk up and down between 1 and 8, from 2."""
    walk = [*range(3, 9), *range(7, 0, -1), 2]
    return (walk * (count // len(walk) + 1))[:count]


# -- resizing


def test_resizing_by_signals_under_load_drops_nobody(site: Site) -> None:
    it = site.start(2)
    with Load(site.address, site.upstream, streams=20) as load:
        size = 2
        for wanted in sizes(100 if IS_SOAK else 28):
            it.resize(MORE if wanted > size else FEWER, wanted)
            size = wanted
            load.wait_served(10)
        account = load.stop()
    assert account.dropped == 0, account
    eventually(
        lambda: len(it.forwarder.workers()) == size,
        lambda: f"{len(it.forwarder.workers())} workers of {size}",
    )
    site.assert_every_socket_is_served()
    assert it.forwarder.stop() == 0
    assert not it.forwarder.trouble()


def test_resizing_by_reload_under_load_drops_nobody(site: Site) -> None:
    """The number alone changes. Result: no rule is reported as changed."""
    it = site.start(2)
    with Load(site.address, site.upstream, streams=20) as load:
        for wanted in (8, 1, 4, 3, 5, 1, 8, 2) * (12 if IS_SOAK else 2):
            assert "+0 -0 ~0 =1" in it.reload(site.text(wanted))
            load.wait_served(30)
        account = load.stop()
    assert account.dropped == 0, account
    eventually(lambda: len(it.forwarder.workers()) == 2)
    site.assert_every_socket_is_served()
    assert not it.forwarder.trouble()


def test_resizing_and_reloading_at_once_drops_nobody(site: Site) -> None:
    """Signals on signals, nobody waits for anything in between."""
    with ExitStack() as stack:
        other = stack.enter_context(reserve_port()).getsockname()
        it = site.start(2)
        with Load(site.address, site.upstream, streams=10) as load:
            for i in range(40):
                more = rule(other, site.upstream.getsockname()) if i % 2 else ""
                new = it.path.with_suffix(".new")
                new.write_text(site.text(2 + i % 3) + more)
                new.rename(it.path)
                it.forwarder.signal((MORE, signal.SIGHUP, FEWER)[i % 3])
                it.forwarder.signal(signal.SIGHUP)
                load.wait_served(5)
            account = load.stop()
        assert account.dropped == 0, account
        it.reload(site.text(7))
        eventually(
            lambda: len(it.forwarder.workers()) == 7,
            lambda: f"{len(it.forwarder.workers())} workers: {it.forwarder.lines[-20:]}",
        )
        site.assert_every_socket_is_served()
        assert not it.forwarder.trouble()


def test_resizing_leaves_no_descriptor_and_no_memory(site: Site) -> None:
    it = site.start(2)
    master = it.forwarder.pid

    def there_and_back() -> None:
        for wanted in (3, 4, 3, 2):
            it.resize(MORE if wanted > len(it.forwarder.workers()) else FEWER, wanted)
            eventually(lambda: len(it.forwarder.workers()) == wanted)  # noqa: B023

    there_and_back()
    workers = it.forwarder.workers()
    before = {pid: len(procfs.descriptors(pid)) for pid in (master, *workers)}
    memory = procfs.resident_kib(master)
    for _ in range(25 if IS_SOAK else 4):
        there_and_back()
    assert it.forwarder.workers() == workers
    eventually(
        lambda: {pid: len(procfs.descriptors(pid)) for pid in before} == before,
        lambda: f"{ {pid: len(procfs.descriptors(pid)) for pid in before} }, was {before}",
    )
    assert procfs.resident_kib(master) - memory < 1024


def test_sessions_of_retired_workers_go_on_in_the_others(site: Site) -> None:
    it = site.start(8)
    links = site.links_in_all_workers()
    for wanted in range(7, 0, -1):
        it.resize(FEWER, wanted)
    eventually(lambda: len(it.forwarder.workers()) == 1)
    for _ in range(3):
        for link in links:
            assert_alive(link)
    site.assert_every_socket_is_served()
    for link in links:
        assert_alive(link)
        link.close()
    assert listeners(site.address) == 8
    assert not it.forwarder.trouble()


def test_there_is_always_a_worker(site: Site) -> None:
    it = site.start(1)
    it.forwarder.signal(FEWER)
    it.forwarder.wait_logged("0 workers are not possible")
    assert len(it.forwarder.workers()) == 1
    site.assert_every_socket_is_served()


def test_a_resize_that_cannot_be_done_leaves_no_socket_unserved(site: Site) -> None:
    """Descriptors run out while sockets for one more worker are made. Result: as before."""
    with ExitStack() as stack:
        others = [stack.enter_context(reserve_port()).getsockname() for _ in range(11)]
        more = "".join(rule(other, site.upstream.getsockname()) for other in others)
        it = site.start(2, more, prefix=["prlimit", "--nofile=54:54"])
        for _ in range(4):
            before = len(it.forwarder.lines)
            it.forwarder.signal(MORE)
            eventually(
                lambda: any(
                    re.search(r"cannot have \d|master\.ready", line)
                    for line in it.forwarder.lines[before:]  # noqa: B023
                )
            )
        assert any("cannot have" in line for line in it.forwarder.lines)
        assert len({listeners(address) for address in (site.address, *others)}) == 1
        site.assert_every_socket_is_served()


@pytest.mark.parametrize("number", [FEWER, MORE, signal.SIGHUP, signal.SIGUSR2, signal.SIGCHLD])
def test_a_master_without_any_descriptor_left_goes_on(site: Site, number: signal.Signals) -> None:
    """It has not one to hand for the next file, socket, pipe or message.

    Result: what it is told is refused or put off; when there are some again, all is well.
    """
    it = site.start(3)
    master, before = it.forwarder.pid, resource.prlimit(it.forwarder.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(master, resource.RLIMIT_NOFILE, (3, before[1]))
    if number is signal.SIGCHLD:
        os.kill(it.forwarder.workers()[0], signal.SIGKILL)
    else:
        it.forwarder.signal(number)
    if number is not FEWER:  # which needs none
        it.forwarder.wait_logged("ERROR.*(Too many open files|cannot have 4 workers)")
    if number is signal.SIGHUP:  # its last line, which would be taken for the next reload's
        it.forwarder.wait_logged("generation 1 stays in force")
    resource.prlimit(master, resource.RLIMIT_NOFILE, before)
    size = 2 if number is FEWER else 3
    eventually(
        lambda: len(it.forwarder.workers()) == size,
        lambda: f"{len(it.forwarder.workers())} workers: {it.forwarder.lines[-20:]}",
    )
    assert "=1 rules" in it.reload_as_it_is()
    site.assert_every_socket_is_served()
    assert it.forwarder.pid == master
    assert it.forwarder.stop() == 0


# -- killed workers


def test_killing_each_worker_ends_its_sessions_only(site: Site) -> None:
    """Result: nobody refused, sessions of other workers whole, what was queued is served."""
    it = site.start(3)
    with Load(site.address, site.upstream, at_once=10) as load:
        # Sessions of the load and ours need upstreams of their own.
        with ExitStack() as stack:
            there = stack.enter_context(listen())
            two = stack.enter_context(reserve_port()).getsockname()
            it.reload(site.text(3) + rule(two, there.getsockname()))
            for pid in it.forwarder.workers():
                links = []
                for _ in range(15):
                    client = stack.enter_context(connect(two))
                    links.append(Link(client, stack.enter_context(accept(there))))
                workers = it.forwarder.workers()
                lost = [link for link in links if owner(workers, link.client) == pid]
                ready = sum("worker.ready" in line for line in it.forwarder.lines)
                os.kill(pid, signal.SIGKILL)
                eventually(
                    lambda: (
                        sum("worker.ready" in line for line in it.forwarder.lines) > ready  # noqa: B023
                    )
                )
                for link in links:
                    if link not in lost:
                        assert_alive(link)
                for link in lost:
                    with suppress(ConnectionResetError):
                        assert link.client.recv(1) == b""
                load.wait_served(50)
        account = load.stop()
    assert account.refused == account.wrong == account.timed_out == 0, account
    # Those of the load that happened to be in the worker.
    assert account.reset + account.cut <= 3 * 10, account


def test_clients_in_the_queue_of_a_killed_worker_are_served(site: Site) -> None:
    """All workers are suspended, so that clients queue; then they are killed, one after another."""
    it = site.start(3)
    workers = it.forwarder.workers()
    for pid in workers:
        suspend(pid)
    clients = site.queue(60)
    assert queued(site.address) == 60
    os.kill(workers[0], signal.SIGKILL)
    os.kill(workers[1], signal.SIGKILL)
    os.kill(workers[2], signal.SIGCONT)
    site.assert_served(clients)
    eventually(lambda: len(set(it.forwarder.workers()) - set(workers)) == 2)
    site.assert_every_socket_is_served()


def test_clients_in_the_queues_are_served_when_all_workers_are_killed(site: Site) -> None:
    it = site.start(2)
    workers = it.forwarder.workers()
    for pid in workers:
        suspend(pid)
    clients = site.queue(40)
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    clients += site.queue(40)
    site.assert_served(clients)


def test_clients_in_the_queue_of_a_retiring_worker_are_served(site: Site) -> None:
    """It is suspended while its slot goes. Result: the survivors take its clients."""
    it = site.start(3)
    workers = it.forwarder.workers()
    for pid in workers:
        suspend(pid)
    clients = site.queue(60)
    it.forwarder.signal(FEWER)
    for pid in workers:
        if not title(pid).endswith("2"):
            os.kill(pid, signal.SIGCONT)
    site.assert_served(clients)


# -- hung workers


def test_a_hung_worker_is_replaced_and_its_clients_are_served(site: Site) -> None:
    """SIGSTOP. Result: queued and new clients are served after a while, by another process."""
    it = site.start(2)
    links = site.links_in_all_workers()
    workers = it.forwarder.workers()
    hung = workers[0]
    others = [link for link in links if owner(workers, link.client) != hung]
    suspend(hung)
    clients = site.queue(40)
    eventually(lambda: hung not in it.forwarder.workers(), within_s=HUNG_S)
    it.forwarder.wait_logged(f"worker.hung .*pid={hung}")
    site.assert_served(clients)
    eventually(lambda: len(it.forwarder.workers()) == 2)
    site.assert_every_socket_is_served()
    for link in others:
        assert_alive(link)


def test_sockets_of_a_hung_worker_are_served_before_it_is_replaced(site: Site) -> None:
    """Its slot has had so many deaths that the next worker has to wait.

    Result: the other worker has all who waited in its queue.
    """
    site._path.write_text('hang_timeout = "3s"\n' + site.text(2))
    it = site.it = Configured(site._launch("-c", str(site._path)), site._path)
    (kept,) = (pid for pid in it.forwarder.workers() if title(pid).endswith("1"))
    for death in range(1, 7):
        eventually(lambda: len(it.forwarder.workers()) == 2)
        (pid,) = set(it.forwarder.workers()) - {kept}
        it.forwarder.wait_logged(f"worker.ready slot=0 pid={pid}")
        if death < 6:
            os.kill(pid, signal.SIGKILL)
            eventually(lambda: pid not in it.forwarder.workers())  # noqa: B023
    suspend(pid)
    clients = site.queue(40)
    it.forwarder.wait_logged(f"worker.hung slot=0 pid={pid}")
    site.assert_served(clients)
    for client in clients:
        assert owner([kept], client) == kept


def test_a_worker_that_hangs_while_it_retires_is_ended(site: Site) -> None:
    """Its rule goes, too. Result: the process goes, the port is free and can be had again."""
    with ExitStack() as stack:
        two = stack.enter_context(reserve_port()).getsockname()
        more = rule(two, site.upstream.getsockname())
        it = site.start(3, more)
        (hung,) = (pid for pid in it.forwarder.workers() if title(pid).endswith("2"))
        suspend(hung)
        it.forwarder.signal(FEWER)
        it.forwarder.wait_logged("master.ready .* workers=2 ")
        it.reload(site.text(3))
        eventually(lambda: hung not in it.forwarder.workers(), within_s=HUNG_S)
        eventually(lambda: listeners(two) == 0)
        assert "master.reloaded +1" in it.reload(site.text(3) + more)


def test_a_frozen_and_thawed_instance_drops_nobody(site: Site) -> None:
    """As a container is paused: nobody hangs, all were away.

    The master happens to be the first that runs again. Result: the same workers go on.
    """
    it = site.start(2)
    workers = it.forwarder.workers()
    links = site.links_in_all_workers()
    os.killpg(it.forwarder.pid, signal.SIGSTOP)
    eventually(lambda: all(state(pid) == "T" for pid in (it.forwarder.pid, *workers)))
    time.sleep(11)  # longer than a worker may be silent
    it.forwarder.signal(signal.SIGCONT)
    eventually(lambda: state(it.forwarder.pid) == "S")
    os.killpg(it.forwarder.pid, signal.SIGCONT)
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        for link in links:
            assert_alive(link)
    assert it.forwarder.workers() == workers
    assert not it.forwarder.trouble()
