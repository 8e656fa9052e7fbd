"""Ranges of ports: each leads where it should, thousands are cheap, too many are told before."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

import pytest
from support import procfs
from support.configured import Configured
from support.ends import accept, carry, connect, listen
from support.hosts import own_host
from support.loads import Load
from support.processes import listeners, members, run_command
from support.waiting import eventually

from process.conftest import stop

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator
    from pathlib import Path

    from process.conftest import Launch

pytestmark = pytest.mark.process

COUNT: Final = 5
MANY: Final = 2000


class Ranges:
    """Addresses of this test alone: a loopback host for each side, whose ports nobody else has."""

    def __init__(self, stack: ExitStack) -> None:
        self.here, self.there = own_host(1), own_host(2)
        self._stack = stack

    def upstreams(self, first: int, count: int = COUNT) -> list[socket.socket]:
        """Listeners on consecutive ports."""
        return [
            self._stack.enter_context(listen(self.there, port))
            for port in range(first, first + count)
        ]

    def assert_leads(self, port: int, upstream: socket.socket) -> None:
        """A client of that port gets to that listener."""
        for _ in range(3):  # some worker each
            with connect((self.here, port)) as client, accept(upstream) as far:
                carry(client, far, b"there")
                carry(far, client, b"back")


@pytest.fixture
def ranges() -> Iterator[Ranges]:
    """See :class:`Ranges`."""
    with ExitStack() as stack:
        yield Ranges(stack)


def rule(listen_at: str, upstream: str, more: str = "") -> str:
    return f'[[forwarding_rules]]\nlisten = "{listen_at}"\nupstream = {upstream}\n{more}\n'


def start(launch: Launch, path: Path, text: str, workers: int = 2) -> Configured:
    path.write_text(text)
    return Configured(launch("-c", str(path), "--workers", str(workers)), path)


def own_sockets(pid: int) -> set[str]:
    return {what for what in procfs.descriptors(pid).values() if what.startswith("socket:")}


def test_each_port_leads_to_its_own_one(launch: Launch, ranges: Ranges, tmp_path: Path) -> None:
    upstreams = ranges.upstreams(9000)
    text = rule(f"{ranges.here}:8000-8004", f'"{ranges.there}:9000-9004"')
    it = start(launch, tmp_path / "a.toml", text)
    for offset, upstream in enumerate(upstreams):
        ranges.assert_leads(8000 + offset, upstream)
    with pytest.raises(ConnectionRefusedError):
        connect((ranges.here, 8005))
    assert it.forwarder.stop() == 0


def test_all_ports_may_lead_to_one(launch: Launch, ranges: Ranges, tmp_path: Path) -> None:
    """Also by a name, and from the command line."""
    (upstream,) = ranges.upstreams(9000, 1)
    it = launch("-l", f"{ranges.here}:8000-8004", "-r", f"{ranges.there}:9000", "--workers", "2")
    for port in range(8000, 8005):
        ranges.assert_leads(port, upstream)
    assert it.stop() == 0
    with listen() as named:
        port = named.getsockname()[1]
        configured = start(
            launch, tmp_path / "a.toml", rule(f"{ranges.here}:8000-8004", f'"localhost:{port}"')
        )
        for port in range(8000, 8005):
            ranges.assert_leads(port, named)
        assert configured.forwarder.stop() == 0


def test_a_killed_worker_and_adopted_sockets_lead_to_the_same(
    launch: Launch, ranges: Ranges, tmp_path: Path
) -> None:
    """The offset is that of the socket, whoever accepts on it."""
    upstreams = ranges.upstreams(9000)
    text = rule(f"{ranges.here}:8000-8004", f'"{ranges.there}:9000-9004"')
    it = start(launch, tmp_path / "a.toml", text, workers=3)
    it.resize(signal.SIGTTOU, 2)
    eventually(lambda: len(it.forwarder.workers()) == 2)  # the third ends by itself
    for pid in it.forwarder.workers():
        os.kill(pid, signal.SIGKILL)
        for offset, upstream in enumerate(upstreams):
            ranges.assert_leads(8000 + offset, upstream)
    assert it.forwarder.stop() == 0


def test_a_reload_moves_ranges_and_keeps_their_sockets(
    launch: Launch, ranges: Ranges, tmp_path: Path
) -> None:
    """To other upstreams; begun at another port; one port with a rule of its own, and back."""
    here, there = ranges.here, ranges.there
    upstreams = ranges.upstreams(9000, 10)
    it = start(launch, tmp_path / "a.toml", rule(f"{here}:8000-8004", f'"{there}:9000-9004"'))
    ranges.assert_leads(8003, upstreams[3])
    before = own_sockets(it.forwarder.pid)
    it.reload(rule(f"{here}:8000-8004", f'"{there}:9005-9009"'))
    ranges.assert_leads(8003, upstreams[8])
    assert own_sockets(it.forwarder.pid) == before
    it.reload(rule(f"{here}:8002-8004", f'"{there}:9000-9002"'))
    ranges.assert_leads(8003, upstreams[1])
    it.reload(
        rule(f"{here}:8002", f'"{there}:9007"') + rule(f"{here}:8003-8004", f'"{there}:9000-9001"')
    )
    ranges.assert_leads(8002, upstreams[7])
    ranges.assert_leads(8004, upstreams[1])
    it.reload(rule(f"{here}:8002-8004", f'"{there}:9004-9006"'))
    ranges.assert_leads(8002, upstreams[4])
    ranges.assert_leads(8004, upstreams[6])
    assert own_sockets(it.forwarder.pid) <= before
    assert it.forwarder.stop() == 0


def test_sessions_of_a_range_go_on_and_end_in_time_when_it_changes(
    launch: Launch, ranges: Ranges, tmp_path: Path
) -> None:
    """``drain_timeout`` bounds those of the old configuration, on every port."""
    here, there = ranges.here, ranges.there
    upstreams = ranges.upstreams(9000, 6)
    head = 'drain_timeout = "500ms"\n'
    text = head + rule(f"{here}:8000-8002", f'"{there}:9000-9002"')
    it = start(launch, tmp_path / "a.toml", text)
    with ExitStack() as stack:
        links = []
        for offset in (0, 2):
            client = stack.enter_context(connect((here, 8000 + offset)))
            links.append((client, stack.enter_context(accept(upstreams[offset]))))
        it.reload(text + "# the same\n")
        for client, far in links:
            carry(client, far, b"still here")
        it.reload(head + rule(f"{here}:8000-8002", f'"{there}:9003-9005"'))
        for client, far in links:
            for sock in (client, far):
                with pytest.raises(ConnectionResetError):
                    sock.recv(1)
    assert it.forwarder.stop() == 0


def test_thousands_of_ports_are_left_alone_by_a_reload_of_another_rule(
    launch: Launch, ranges: Ranges, tmp_path: Path
) -> None:
    """The same sockets in the master and in the workers, and clients are served meanwhile.

    An upgrade hands all of them over, too.
    """
    (upstream,) = ranges.upstreams(9000, 1)
    many = rule(f"{ranges.here}:10000-{9999 + MANY}", f'"{ranges.there}:9000"')
    control = tmp_path / "control.sock"
    many = f'control = "{control}"\n{many}'
    it = start(launch, tmp_path / "a.toml", many + rule(f"{ranges.here}:7000", '"127.0.0.1:1"'))
    pids = [it.forwarder.pid, *it.forwarder.workers()]
    before = [own_sockets(pid) for pid in pids]
    assert len(before[0]) >= 2 * MANY
    with Load((ranges.here, 10_000 + MANY // 2), upstream, rate=100) as load:
        load.wait_served(20)
        changed = many + rule(f"{ranges.here}:7000", '"127.0.0.1:2"')
        assert "+0 -0 ~1 =1" in it.reload(changed)
        load.wait_served(20)
        # The workers have sockets of sessions, too, but not always.
        eventually(lambda: [own_sockets(pid) for pid in pids] == before)
        done = run_command("upgrade", "--control", str(control))
        assert done.returncode == 0, done.stderr
        load.wait_served(20)
        account = load.stop()
    assert account.dropped == 0, account.problems
    assert listeners((ranges.here, 10_000)) == 2
    assert it.forwarder.process.wait(30) == 0
    (new,) = {pid for pid in members(it.forwarder.pid) if _is_master(pid)}
    os.kill(new, signal.SIGTERM)
    eventually(lambda: listeners((ranges.here, 10_000)) == 0)


def _is_master(pid: int) -> bool:
    return bool(procfs.children(pid))


def test_a_removed_range_is_closed_and_its_last_clients_are_served(
    launch: Launch, ranges: Ranges, tmp_path: Path
) -> None:
    (upstream,) = ranges.upstreams(9000, 1)
    one = rule(f"{ranges.here}:7000", f'"{ranges.there}:9000"')
    many = rule(f"{ranges.here}:10000-{9999 + MANY}", f'"{ranges.there}:9000"')
    it = start(launch, tmp_path / "a.toml", one + many)
    with connect((ranges.here, 10_001)) as client, accept(upstream) as far:
        assert "+0 -1 ~0 =1" in it.reload(one)
        eventually(lambda: listeners((ranges.here, 10_000)) == 0)
        carry(client, far, b"still here")
    eventually(lambda: procfs.socket_count(it.forwarder.pid) < 50)
    assert it.forwarder.stop() == 0


# -- too few descriptors


def test_a_start_that_needs_too_many_descriptors_says_how_many_before_it_binds() -> None:
    """Port 7000 could be bound, and is not: the last one is taken, which nobody gets to see."""
    host = own_host(3)
    with listen(host, 9999):
        ended = run_command(
            *("-l", f"{host}:7000-9999", "-r", "127.0.0.1:1", "--workers", "2"),
            prefix=["prlimit", "--nofile=5000:5000"],
        )
    assert ended.returncode == 69
    assert "3000 addresses for 2 workers need at least 6028 file descriptors" in ended.stderr
    assert "the limit is 5000" in ended.stderr
    assert "Address already in use" not in ended.stderr


def test_a_reload_and_a_resize_that_need_too_many_change_nothing(
    launch: Launch, ranges: Ranges, tmp_path: Path
) -> None:
    (upstream,) = ranges.upstreams(9000, 1)
    path = tmp_path / "a.toml"
    path.write_text(rule(f"{ranges.here}:8000-8099", f'"{ranges.there}:9000"'))
    it = Configured(
        launch("-c", str(path), "--workers", "2", prefix=["prlimit", "--nofile=300:300"]), path
    )
    more = rule(f"{ranges.here}:7000-7099", f'"{ranges.there}:9000"')
    assert "stays in force" in it.reload(path.read_text() + more)
    it.forwarder.wait_logged("200 addresses for 2 workers need at least 428 file descriptors")
    assert listeners((ranges.here, 7000)) == 0
    it.forwarder.signal(signal.SIGTTIN)
    it.forwarder.wait_logged("cannot have 3 workers: 100 addresses .* at least 330 ")
    assert len(it.forwarder.workers()) == 2
    ranges.assert_leads(8050, upstream)
    assert stop(it.forwarder, signal.SIGTERM) == 0
