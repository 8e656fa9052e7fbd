"""Workers that are killed, suspended, told to leave, or short of descriptors."""

from __future__ import annotations

import os
import resource
import signal
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from support import procfs
from support.ends import accept, carry, connect, listen
from support.forwarder import reserve_port
from support.processes import listeners, members, owner, queued, state, title
from support.waiting import eventually

from process.conftest import as_pairs

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import StartForwarder
    from support.ends import Link

    from process.conftest import Launch, Serve, Service

pytestmark = pytest.mark.process

KILL, TERM = signal.SIGKILL, signal.SIGTERM


def links_of_every_worker(service: Service) -> dict[int, list[Link]]:
    """Open sessions until each worker has one at least."""
    workers = service.forwarder.workers()
    found: dict[int, list[Link]] = {pid: [] for pid in workers}
    while not all(found.values()):
        link = service.link()
        found[owner(workers, link.client)].append(link)
        assert len(service.links) < 500, "one worker gets nothing"
    return found


def assert_is_over(sock: socket.socket) -> None:
    """The other end is gone, by FIN or by RST."""
    with suppress(ConnectionResetError):
        assert sock.recv(100) == b""


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_each_worker_has_a_socket_and_a_title_of_its_own(serve: Serve, workers: int) -> None:
    service = serve(workers=workers)
    assert listeners(service.address) == workers
    assert title(service.forwarder.pid) == "forwarder: master [command line]"
    titles = {title(pid) for pid in service.forwarder.workers()}
    assert titles == {f"forwarder: worker {slot}" for slot in range(workers)}
    assert set(members(service.forwarder.pid)) == {
        service.forwarder.pid,
        *service.forwarder.workers(),
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_queued_clients_outlive_the_worker_that_should_have_accepted_them(
    serve: Serve, workers: int
) -> None:
    """Suspend all workers, let clients connect, kill one worker. Result: every client is served."""
    service = serve(workers=workers)
    pids = service.forwarder.workers()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    eventually(lambda: all(state(pid) == "T" for pid in pids))
    clients = [connect(service.address) for _ in range(40)]
    try:
        eventually(lambda: queued(service.address) == len(clients))
        os.kill(pids[0], KILL)
        for pid in pids[1:]:
            os.kill(pid, signal.SIGCONT)
        for number, client in enumerate(clients):
            client.sendall(b"%4d" % number)
        seen = set()
        for _ in clients:
            with accept(service.upstream) as sock:
                seen.add(sock.recv(4, socket.MSG_WAITALL))
        assert seen == {b"%4d" % number for number in range(len(clients))}
    finally:
        for client in clients:
            client.close()
    assert service.stop() == 0


def test_sessions_of_other_workers_survive_and_the_dead_one_is_replaced(serve: Serve) -> None:
    service = serve(workers=2)
    by_worker = links_of_every_worker(service)
    victim, survivor = by_worker
    service.kill_worker(victim)
    for link in by_worker[victim]:
        assert_is_over(link.client)
        assert_is_over(link.upstream)
    for link in by_worker[survivor]:
        carry(link.client, link.upstream, b"x" * 100_000)
        carry(link.upstream, link.client, b"y" * 100_000)
    assert listeners(service.address) == 2
    workers = service.forwarder.workers()
    assert survivor in workers
    assert {title(pid) for pid in workers} == {"forwarder: worker 0", "forwarder: worker 1"}
    for _ in range(20):
        service.assert_serves()
    # The survivor has given the adopted socket back, and nothing else is left of it.
    eventually(
        lambda: len({procfs.socket_count(pid) for pid in workers}) == 1 + bool(by_worker[survivor]),
    )
    assert service.forwarder.process.poll() is None


def test_the_other_worker_adopts_the_clients_of_a_crash_loop(serve: Serve) -> None:
    """Worker 0 is killed until it is called a crash loop. Result: clients never wait for it."""
    service = serve(workers=2)
    steady = service.forwarder.workers()[1]
    link = service.link()
    while owner(service.forwarder.workers(), link.client) != steady:
        link = service.link()
    while not any("(crash loop)" in line for line in service.forwarder.lines):
        for pid in set(service.forwarder.workers()) - {steady}:
            with suppress(ProcessLookupError):
                os.kill(pid, KILL)
        service.assert_serves()
    assert listeners(service.address) == 2
    carry(link.client, link.upstream, b"still here")
    for link in service.links:
        link.close()
    assert service.stop() == 0


def test_a_crash_loop_ends_neither_the_master_nor_the_sockets(serve: Serve) -> None:
    """The only worker is killed again and again. Result: clients wait, and are served."""
    service = serve()
    for _ in range(5):
        service.kill_worker(service.forwarder.workers()[0])
        assert listeners(service.address) == 1
    assert any("(crash loop)" in line for line in service.forwarder.lines)
    os.kill(service.forwarder.workers()[0], KILL)
    clients = [connect(service.address) for _ in range(10)]
    for client in clients:
        accept(service.upstream).close()
        assert_is_over(client)
        client.close()
    service.assert_serves()
    assert service.stop() == 0
    service.assert_nothing_left()


def test_all_workers_killed_at_once_are_all_replaced(serve: Serve) -> None:
    """As an out-of-memory killer or a hasty operator does. Result: the master goes on."""
    service = serve(workers=8)
    for _ in range(3):
        ready = service.ready_lines()
        workers = service.forwarder.workers()
        for pid in workers:
            os.kill(pid, KILL)
        eventually(
            lambda: (
                service.forwarder.process.poll() is not None
                or service.ready_lines() == ready + len(workers)  # noqa: B023
            )
        )
        assert service.forwarder.process.poll() is None, "\n".join(service.forwarder.lines)
        service.assert_serves()
    assert service.stop() == 0


def test_a_worker_killed_by_a_signal_without_a_name_is_replaced(serve: Serve) -> None:
    """As most of those for real time. Result: as for any other, and no bug on the way."""
    service = serve()
    ready = service.ready_lines()
    os.kill(service.forwarder.workers()[0], 40)
    eventually(lambda: service.ready_lines() > ready)
    assert any("killed by signal 40" in line for line in service.forwarder.lines)
    service.assert_serves()
    assert service.stop() == 0


def test_a_worker_told_to_leave_is_replaced(serve: Serve) -> None:
    service = serve(workers=2)
    for pid in service.forwarder.workers():
        ready = service.ready_lines()
        os.kill(pid, TERM)
        eventually(lambda: service.ready_lines() > ready)  # noqa: B023
        service.assert_serves()
    assert service.stop() == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_told_to_leave_ends_its_sessions_first_and_no_client_waits(
    serve: Serve, workers: int
) -> None:
    """SIGTERM to a worker with a session. Result: the session goes on, new clients are served."""
    service = serve(workers=workers)
    by_worker = links_of_every_worker(service)
    victim, links = next(iter(by_worker.items()))
    sockets = procfs.socket_count(victim)
    os.kill(victim, TERM)
    eventually(lambda: procfs.socket_count(victim) < sockets)
    for _ in range(20):
        service.assert_serves()
    for link in links:
        carry(link.client, link.upstream, b"still here")
        link.close()
    eventually(lambda: victim not in service.forwarder.workers())
    service.assert_serves()


def many_rules(path: Path, address: tuple[str, int], upstream: socket.socket, count: int) -> None:
    """Rules on ``count`` loopback addresses, the port being that of ``address``."""
    port, target = address[1], upstream.getsockname()
    path.write_text(
        "".join(
            f"127.1.{number // 200}.{number % 200 + 1} {port} {target[0]} {target[1]}\n"
            for number in range(count)
        )
    )


@pytest.mark.parametrize("slack", [4, 6, 10, 14, 18])
def test_a_limit_of_descriptors_ends_the_start_or_lets_it_serve(
    launch: Launch,
    any_address: tuple[str, int],
    upstream: socket.socket,
    tmp_path: Path,
    slack: int,
) -> None:
    """So few descriptors that the master, or only its worker, cannot have all sockets.

    Result: either the start fails with a hint, or clients are served; never a silent standstill.
    """
    rules = 30
    path = tmp_path / "many.conf"
    many_rules(path, any_address, upstream, rules)
    limit = ["prlimit", f"--nofile={rules + slack}:{rules + slack}"]
    forwarder = launch("-c", str(path), "--workers", "1", prefix=limit, expect_ready=False)
    eventually(
        lambda: (
            forwarder.process.poll() is not None
            or any("master.ready" in line for line in forwarder.lines)
        ),
        lambda: "\n".join(forwarder.lines),
    )
    if forwarder.process.poll() is not None:
        assert forwarder.wait() == 69
        assert "open files" in "\n".join(forwarder.lines)
        return
    for host in ("127.1.0.1", f"127.1.0.{rules}"):
        with connect((host, any_address[1])) as client, accept(upstream) as far:
            carry(client, far, b"there")


def test_a_worker_short_of_descriptors_survives_the_death_of_another(
    launch: Launch, any_address: tuple[str, int], upstream: socket.socket, tmp_path: Path
) -> None:
    """It cannot adopt the sockets of the dead one. Result: it serves on, and leaks nothing."""
    rules = 60
    path = tmp_path / "many.conf"
    many_rules(path, any_address, upstream, rules)
    forwarder = launch("-c", str(path), "--workers", "2")
    poor, victim = forwarder.workers()
    before = procfs.socket_count(poor)
    limit = len(procfs.descriptors(poor)) + rules // 2
    resource.prlimit(poor, resource.RLIMIT_NOFILE, (limit, limit))
    os.kill(victim, KILL)
    eventually(lambda: sum("worker.ready" in line for line in forwarder.lines) == 3)
    for number in range(20):
        host = f"127.1.0.{number + 1}"
        with connect((host, any_address[1])) as client, accept(upstream) as far:
            carry(client, far, b"there")
    assert poor in forwarder.workers()
    eventually(lambda: procfs.socket_count(poor) <= before)


PLANTED = """
from forwarder.serving import service
def grow(self, slots):
    raise RuntimeError("planted")
service.Service.grow = grow
"""


@pytest.mark.expects_log("master.bug", "Traceback", "worker.died")
def test_a_bug_in_the_master_does_not_end_it(
    start_forwarder: StartForwarder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails when it is told to have more workers. Result: it serves on, and can be stopped."""
    (tmp_path / "sitecustomize.py").write_text(PLANTED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with reserve_port() as holder, listen() as upstream:
        address = holder.getsockname()
        forwarder = start_forwarder(*as_pairs(address, upstream), "--workers", "1")
        workers = forwarder.workers()
        for _ in range(2):
            forwarder.signal(signal.SIGTTIN)
        forwarder.wait_logged("master.bug")
        with connect(address) as client, accept(upstream) as peer:
            carry(client, peer, b"x" * 1000)
        os.kill(workers[0], signal.SIGKILL)
        eventually(lambda: forwarder.workers() not in ([], workers))
        with connect(address) as client, accept(upstream) as peer:
            carry(client, peer, b"x" * 1000)
