"""Groups through the real command, with several workers: what holds for all of them together."""

from __future__ import annotations

import json
import os
import signal
import socket
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import pytest
from support import control
from support.configured import IS_SOAK, Configured
from support.datagrams import free_udp_address, udp, udp_client
from support.ends import be_reset, connect, listen, receive_to_end
from support.flood import Flood
from support.forwarder import reserve_port
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from process.conftest import Launch

pytestmark = pytest.mark.process

LIMIT = 20
ATTEMPTS = 10_000 if IS_SOAK else 2500


@dataclass
class Grouped:
    """A forwarder of one rule with several servers, and these."""

    it: Configured
    address: tuple[str, int]
    listeners: list[socket.socket]
    head: str
    clients: list[socket.socket] = field(default_factory=list)
    accepted: list[list[socket.socket]] = field(default_factory=list)

    def text(self, more: str = "", server: str = "") -> str:
        """The configuration; ``server`` is added to the table of each server."""
        servers = ", ".join(
            '{{ at = "{}:{}"{} }}'.format(*one.getsockname(), server) for one in self.listeners
        )
        return (
            f'{self.head}[[forwarding_rules]]\nname = "one"\n'
            f'listen = "{self.address[0]}:{self.address[1]}"\nupstream = [{servers}]\n{more}\n'
        )

    def open(self, count: int) -> None:
        """Open so many sessions, one after the other, which stay."""
        for _ in range(count):
            self.clients.append(connect(self.address))

    def sessions(self) -> list[int]:
        """How many sessions each server has."""
        for listener, known in zip(self.listeners, self.accepted, strict=True):
            with suppress(BlockingIOError):
                while True:
                    known.append(listener.accept()[0])
                    known[-1].setblocking(False)
            known[:] = [one for one in known if is_open(one)]
        return [len(known) for known in self.accepted]

    def close(self) -> None:
        for one in (*self.clients, *(sock for known in self.accepted for sock in known)):
            one.close()
        self.clients.clear()

    def servers(self) -> list[dict[str, object]]:
        """What the status says of the servers."""
        groups = control.ask(f"{self.it.path}.sock", "status")["groups"]
        assert isinstance(groups, list)
        (group,) = groups
        return list(group["servers"])

    def is_idle(self) -> bool:
        """Whether no server has a session any more, as the status says."""
        return all(server["sessions"] == 0 for server in self.servers())


def is_open(sock: socket.socket) -> bool:
    """Whether its peer has neither ended nor reset it; closed here if so."""
    try:
        if sock.recv(1, socket.MSG_PEEK):
            return True
    except BlockingIOError:
        return True
    except ConnectionResetError:
        pass
    sock.close()
    return False


class Group(Protocol):
    """See :func:`group`."""

    def __call__(
        self, more: str = "", *, servers: int = 3, server: str = "", workers: int = 4
    ) -> Grouped:
        """Start it."""


@pytest.fixture
def group(launch: Launch, tmp_path: Path) -> Iterator[Group]:
    """Start a forwarder whose only rule has so many servers; ``more`` is more TOML of the rule."""
    started: list[Grouped] = []
    with ExitStack() as stack:

        def start(
            more: str = "", *, servers: int = 3, server: str = "", workers: int = 4
        ) -> Grouped:
            address = stack.enter_context(reserve_port()).getsockname()
            listeners = [stack.enter_context(listen()) for _ in range(servers)]
            for listener in listeners:
                listener.setblocking(False)
            path = tmp_path / f"{len(started)}.toml"
            head = f'workers = {workers}\ncontrol = "{path}.sock"\n'
            found = Grouped(None, address, listeners, head)  # type: ignore[arg-type]
            found.accepted = [[] for _ in listeners]
            path.write_text(found.text(more, server))
            found.it = Configured(launch("-c", str(path)), path)
            started.append(found)
            return found

        yield start
        for found in started:
            found.close()


def kill_a_worker(it: Grouped) -> None:
    forwarder = it.it.forwarder
    before = sum("worker.ready" in line for line in forwarder.lines)
    victim = forwarder.workers()[0]
    os.kill(victim, signal.SIGKILL)
    eventually(lambda: sum("worker.ready" in line for line in forwarder.lines) > before)
    assert victim not in forwarder.workers()


def test_least_counts_the_sessions_of_all_workers(group: Group) -> None:
    """300 clients of one address, and as many again after a worker was killed with its sessions."""
    it = group('balance = "least"')
    it.open(300)
    eventually(lambda: sum(it.sessions()) == 300)
    assert it.sessions() == [100, 100, 100]
    kill_a_worker(it)
    left = sum(it.sessions())
    assert 0 < left < 300
    it.open(300 - left)
    eventually(lambda: sum(it.sessions()) == 300)
    assert it.sessions() == [100, 100, 100]
    it.close()
    eventually(it.is_idle, it.servers)


@pytest.mark.parametrize(("balance", "most"), [("turn", 2), ("least", 1), ("random", 15)])
def test_sessions_are_spread_evenly(group: Group, balance: str, most: int) -> None:
    """In turn, each worker by itself; by lot, not quite."""
    it = group(f'balance = "{balance}"', workers=2)
    it.open(90)
    eventually(lambda: sum(it.sessions()) == 90)
    assert max(it.sessions()) - min(it.sessions()) <= most


@pytest.mark.parametrize("workers", [1, 8])
def test_max_sessions_of_a_server_is_never_exceeded(group: Group, workers: int) -> None:
    it = group(servers=1, server=f", max_sessions = {LIMIT}", workers=workers)
    with Flood(it.address, it.listeners[0], LIMIT) as flood:
        outcome = flood.run(ATTEMPTS)
    assert outcome.most == LIMIT
    assert outcome.cut == 0
    assert outcome.reset > 0
    assert outcome.served + outcome.reset == ATTEMPTS
    eventually(it.is_idle, it.servers)


def test_who_waits_in_the_queue_is_served_in_the_end(group: Group) -> None:
    it = group(
        'max_queue = 500\nqueue_timeout = "60s"',
        servers=1,
        server=f", max_sessions = {LIMIT}",
        workers=4,
    )
    with Flood(it.address, it.listeners[0], LIMIT) as flood:
        outcome = flood.run(600)
    assert (outcome.served, outcome.reset, outcome.cut) == (600, 0, 0)
    assert outcome.most == LIMIT
    eventually(it.is_idle, it.servers)


def test_the_queue_is_as_long_as_it_may_be_over_all_workers(group: Group) -> None:
    it = group(
        'max_queue = 50\nqueue_timeout = "60s"',
        servers=1,
        server=f", max_sessions = {LIMIT}",
        workers=8,
    )
    with Flood(it.address, it.listeners[0], LIMIT) as flood:
        outcome = flood.fill(200)
        assert (flood.open, outcome.reset) == (LIMIT, 200 - LIMIT - 50)
        assert flood.release().served == LIMIT + 50


def test_places_of_a_killed_worker_are_free_again(group: Group) -> None:
    """Those at servers, and those in the queue."""
    it = group(
        'max_queue = 50\nqueue_timeout = "60s"',
        servers=1,
        server=f", max_sessions = {LIMIT}",
        workers=4,
    )
    with Flood(it.address, it.listeners[0], LIMIT) as flood:
        flood.fill(LIMIT + 50)
        kill_a_worker(it)

        def is_full_again() -> bool:
            flood.fill(LIMIT + 50)
            assert flood.open <= LIMIT
            return flood.open == LIMIT

        eventually(is_full_again)
        flood.release()
    eventually(it.is_idle, it.servers)


def test_reloads_lose_no_place_and_no_session(group: Group) -> None:
    """Whatever of the group they change."""
    it = group('balance = "least"', server=", max_sessions = 40")
    it.open(60)
    eventually(lambda: sum(it.sessions()) == 60)
    for number, (more, server) in enumerate(
        [
            ('balance = "least"', ", max_sessions = 40, weight = 2"),
            ('balance = "turn"', ""),
            ('balance = "hash"', ", max_sessions = 20"),
            ('balance = "least"\nmax_queue = 5', ", max_sessions = 25"),
        ]
        * 3
    ):
        assert "reloaded" in it.it.reload(it.text(more, server)), number
    assert it.sessions() == [20, 20, 20]
    it.open(15)
    eventually(lambda: it.sessions() == [25, 25, 25], it.sessions)
    it.close()
    eventually(it.is_idle, it.servers)


def test_sessions_go_with_their_rule_to_a_group_of_another_name(group: Group) -> None:
    """Twice, and back: they count where their rule leads to, and nowhere when they have ended."""
    it = group('balance = "least"', servers=2, workers=2)
    it.open(8)
    eventually(lambda: sum(it.sessions()) == 8)
    for name in ("one", "other", "one"):
        servers = ", ".join('"{}:{}"'.format(*up.getsockname()) for up in it.listeners)
        rule = it.text().partition("upstream")[0]
        text = f'{rule}upstream = "group:{name}"\n[[groups]]\nname = "{name}"\nbalance = "least"\n'
        assert "master.reloaded" in it.it.reload(f"{text}servers = [{servers}]\n")
        eventually(lambda: [server["sessions"] for server in it.servers()] == [4, 4], it.servers)
        listed = control.ask(f"{it.it.path}.sock", "sessions", group=name)["sessions"]
        assert isinstance(listed, list)
        assert len(listed) == 8
    it.close()
    eventually(it.is_idle, it.servers)


def test_a_server_that_is_killed_costs_no_client_anything(group: Group) -> None:
    it = group(workers=2)
    it.listeners.pop().close()
    it.accepted.pop()
    it.open(40)
    eventually(lambda: sum(it.sessions()) == 40)


def test_all_are_turned_away_where_no_server_is_up(group: Group) -> None:
    it = group(servers=2, workers=2)
    while it.listeners:
        it.listeners.pop().close()
    for _ in range(10):
        be_reset(it.address)


def test_the_connection_log_tells_the_server(group: Group, tmp_path: Path) -> None:
    path = tmp_path / "log"
    it = group('balance = "first"', servers=2, workers=1)
    logs = f'[[logs]]\nto = "{path}"\nformat = "json"\n'
    assert "reloaded" in it.it.reload(it.text('balance = "first"') + logs)
    it.open(1)
    it.listeners[0].setblocking(True)
    server = it.listeners[0].accept()[0]
    server.close()
    assert receive_to_end(it.clients[0]) == b""
    it.clients[0].close()
    eventually(lambda: path.exists() and path.read_text() != "")
    found = json.loads(path.read_text())
    assert found["group"] == "one"
    assert found["server"] == "{}:{}".format(*it.listeners[0].getsockname())


def test_udp_flows_are_spread_and_leave_a_server_that_is_gone(
    launch: Launch, tmp_path: Path
) -> None:
    address = free_udp_address()
    with ExitStack() as stack:
        servers = [stack.enter_context(udp()) for _ in range(2)]
        path = tmp_path / "c.toml"
        upstream = ", ".join('"{}:{}"'.format(*one.getsockname()) for one in servers)
        path.write_text(
            f'workers = 2\n[[forwarding_rules]]\nlisten = "{address[0]}:{address[1]}"\n'
            f'protocol = "udp"\nupstream = [{upstream}]\nbalance = "least"\n'
        )
        launch("-c", str(path))
        clients = [stack.enter_context(udp_client(address)) for _ in range(10)]
        for client in clients:
            client.send(b"question")
        for server in servers:
            for _ in range(5):
                question, source = server.recvfrom(100)
                server.sendto(b"answer to " + question, source)
        for client in clients:
            assert client.recv(100) == b"answer to question"
        servers[0].close()
        heard: set[object] = set()

        def all_are_heard() -> bool:
            """What is sent just when a server refuses is lost, as it would be directly."""
            for client in clients:
                client.send(b"again")
            servers[1].settimeout(0.1)
            with suppress(TimeoutError):
                while len(heard) < len(clients):
                    heard.add(servers[1].recvfrom(100)[1])
            return len(heard) == len(clients)

        eventually(all_are_heard)
