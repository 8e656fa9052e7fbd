"""How an instance ends: SIGTERM, SIGINT, its own death; and signals that must not end it."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
import termios
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from support.control import ask
from support.ends import accept, carry, connect, receive_to_end, receive_to_reset, reset
from support.processes import listeners, members, suspend
from support.waiting import eventually

from process.conftest import stop

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from support.forwarder import Forwarder

    from process.conftest import Launch, Serve

pytestmark = pytest.mark.process

TERM, INT = signal.SIGTERM, signal.SIGINT


def unread(sock: socket.socket) -> int:
    """Bytes that a socket has received and nobody has read."""
    return int(struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, bytes(4)))[0])


@pytest.mark.parametrize("number", [TERM, INT, signal.SIGQUIT], ids=lambda n: n.name)
@pytest.mark.parametrize("workers", [1, 4])
def test_without_sessions_it_leaves_at_once_with_success(
    serve: Serve, number: signal.Signals, workers: int
) -> None:
    service = serve(workers=workers)
    assert service.stop(number) == 0
    service.assert_nothing_left()
    assert not service.forwarder.trouble()


def test_sigterm_lets_sessions_end_first(serve: Serve) -> None:
    """Bytes and both half-closes still pass after SIGTERM. Result: status 0, nobody reset."""
    service = serve(workers=2)
    links = [service.link() for _ in range(6)]
    service.forwarder.signal(TERM)
    service.forwarder.wait_logged("master.stopping")
    for link in links:
        carry(link.client, link.upstream, b"x" * 100_000)
        carry(link.upstream, link.client, b"y" * 100_000)
        link.client.shutdown(socket.SHUT_WR)
        assert receive_to_end(link.upstream) == b""
        link.upstream.sendall(b"after half-close")
    assert service.forwarder.process.poll() is None
    for link in links:
        link.upstream.shutdown(socket.SHUT_WR)
        assert receive_to_end(link.client) == b"after half-close"
    assert stop(service.forwarder) == 0
    service.assert_nothing_left()
    assert not service.forwarder.trouble()


def test_new_clients_are_refused_while_sessions_end(serve: Serve) -> None:
    """A client that is queued and never served would wait for nothing."""
    service = serve(workers=2)
    link = service.link()
    service.forwarder.signal(TERM)
    service.forwarder.wait_logged("master.stopping")
    eventually(
        lambda: listeners(service.address) == 0,
        lambda: f"{listeners(service.address)} sockets listen on, and nobody accepts",
    )
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(service.address, timeout=20)
    link.close()
    assert stop(service.forwarder) == 0


@pytest.mark.parametrize("second", [TERM, INT], ids=lambda n: n.name)
def test_a_second_signal_hurries_a_stop(serve: Serve, second: signal.Signals) -> None:
    service = serve(workers=2)
    links = [service.link() for _ in range(4)]
    service.forwarder.signal(TERM)
    service.forwarder.wait_logged("master.stopping how=drain")
    for link in links:
        carry(link.client, link.upstream, b"still here")
    assert service.stop(second) == 0
    for link in links:
        assert receive_to_reset(link.client) == b""
        assert receive_to_reset(link.upstream) == b""
    service.assert_nothing_left()


@pytest.mark.parametrize("to_group", [False, True], ids=["to-master", "to-group"])
def test_sigint_resets_sessions_and_ends_with_success(serve: Serve, to_group: bool) -> None:
    """A terminal sends SIGINT to the whole foreground group, workers included."""
    service = serve(workers=3)
    links = [service.link() for _ in range(6)]
    if to_group:
        os.killpg(service.forwarder.pid, INT)
    else:
        service.forwarder.signal(INT)
    assert stop(service.forwarder) == 0
    for link in links:
        assert receive_to_reset(link.client) == b""
        assert receive_to_reset(link.upstream) == b""
    service.assert_nothing_left()
    assert not service.forwarder.trouble()


def test_sigterm_to_the_whole_group_drains_too(serve: Serve) -> None:
    """As a service manager does that signals every process of the service."""
    service = serve(workers=3)
    links = [service.link() for _ in range(4)]
    os.killpg(service.forwarder.pid, TERM)
    service.forwarder.wait_logged("master.stopping")
    for link in links:
        carry(link.client, link.upstream, b"still here")
        link.close()
    assert stop(service.forwarder) == 0
    service.assert_nothing_left()


def test_impatience_does_not_hold_up_the_end(serve: Serve) -> None:
    """A further SIGINT while a suspended worker has its time. Result: it gets no more of that."""
    service = serve()
    suspend(service.forwarder.workers()[0])
    service.forwarder.signal(INT)
    service.forwarder.wait_logged("master.stopping how=stop")
    assert service.stop(INT) == 0
    assert sum("master.stopping" in line for line in service.forwarder.lines) == 1
    service.assert_nothing_left()


@pytest.mark.parametrize("numbers", [(INT,), (TERM, TERM), (TERM, INT)], ids=str)
def test_a_suspended_worker_does_not_hold_up_the_end(
    serve: Serve, numbers: Sequence[signal.Signals]
) -> None:
    """It cannot hear that it shall stop. Result: killed after a while, status 0."""
    service = serve(workers=2)
    suspend(service.forwarder.workers()[0])
    for number in numbers[:-1]:
        service.forwarder.signal(number)
        service.forwarder.wait_logged("master.stopping how=drain")
    assert service.stop(numbers[-1]) == 0
    assert len([line for line in service.forwarder.lines if "killing it" in line]) == 1
    service.assert_nothing_left()


def test_other_signals_do_not_end_it(serve: Serve) -> None:
    """SIGHUP to the master; to workers everything that a terminal may send to the group."""
    service = serve(workers=2)
    workers = service.forwarder.workers()
    link = service.link()
    for _ in range(3):
        service.forwarder.signal(signal.SIGHUP)
    for pid in workers:
        for number in (INT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGPIPE):
            os.kill(pid, number)
    carry(link.client, link.upstream, b"still here")
    service.assert_serves()
    assert service.forwarder.workers() == workers
    link.close()
    assert service.stop() == 0


def is_ready(forwarder: Forwarder) -> bool:
    """Whether it has said so in its log."""
    return any("master.ready" in line for line in forwarder.lines)


@pytest.mark.parametrize("number", [TERM, INT, signal.SIGHUP], ids=lambda n: n.name)
def test_signals_during_the_start_leave_nothing(
    launch: Launch, address: tuple[str, int], number: signal.Signals
) -> None:
    """The signal comes at growing points of the start, while something is there to signal.

    Before the handlers are there it ends the process as it does any; from then on the stop is
    clean. SIGHUP ends nothing from then on. Result: no process, no listener, no internal error.
    """
    pair = ["-l", "{}:{}".format(*address), "-r", "127.0.0.1:1", "--workers", "4"]
    for children in range(5):
        forwarder = launch(*pair, expect_ready=False)
        master = forwarder.process

        def is_there() -> bool:
            return listeners(address) >= children or master.poll() is not None  # noqa: B023

        eventually(is_there)
        forwarder.signal(number)
        if number is signal.SIGHUP:
            # It may have come when the handlers were there, whatever was seen before.
            eventually(lambda: master.poll() is not None or is_ready(forwarder))  # noqa: B023
            if master.poll() is None:
                forwarder.signal(TERM)
        code = stop(forwarder)
        assert code == 0 or (not children and code in (-number, 1)), (code, forwarder.lines)
        eventually(lambda: not members(master.pid))  # noqa: B023
        assert listeners(address) == 0
        if not children:
            forwarder.lines.clear()  # Python's own KeyboardInterrupt while it imports


def test_killed_master_workers_serve_no_longer_than_for_a_while(
    serve: Serve, launch: Launch
) -> None:
    """SIGKILL of the master, and no new one. Result: sessions go on; then all is free."""
    service = serve(workers=3)
    links = [service.link() for _ in range(6)]
    service.forwarder.process.kill()
    service.forwarder.process.wait()
    eventually(lambda: listeners(service.address) == 0, "orphans listen for ever", within_s=90)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(service.address, timeout=20)
    for link in links:
        carry(link.client, link.upstream, b"x" * 100_000)
        carry(link.upstream, link.client, b"y" * 100_000)
        link.close()
    service.assert_nothing_left()
    service.forwarder.wait()
    service.forwarder = launch(*service.pairs)
    service.assert_serves()
    assert service.stop() == 0


def test_a_new_master_serves_beside_the_orphans_of_a_killed_one(
    serve: Serve, launch: Launch
) -> None:
    """Started at once. Result: it serves; the orphans end with their sessions, not before."""
    service = serve(workers=2)
    link = service.link()
    old = service.forwarder
    old.process.kill()
    old.process.wait()
    service.forwarder = launch(*service.pairs, "--workers", "2")
    for _ in range(10):
        service.assert_serves()
    carry(link.client, link.upstream, b"still here")
    link.close()
    eventually(lambda: not members(old.pid), "orphans stay beside the new master")
    old.wait()
    assert listeners(service.address) == 2
    service.assert_serves()
    assert service.stop() == 0


def test_a_suspended_orphan_goes_when_it_wakes(serve: Serve, launch: Launch) -> None:
    """It can neither serve nor leave. Result: a new master serves all, the orphan ends when woken.

    The new master may refuse to start while it sleeps, but must not serve only some clients.
    """
    service = serve(workers=2)
    old, worker = service.forwarder, service.forwarder.workers()[0]
    suspend(worker)
    old.process.kill()
    old.process.wait()
    new = launch(*service.pairs, "--workers", "2", expect_ready=False)
    eventually(
        lambda: new.process.poll() is not None or any("master.ready" in line for line in new.lines)
    )
    if new.process.poll() is None:
        service.forwarder = new
        for _ in range(20):
            service.assert_serves()
    else:
        assert new.wait() == 69
    with suppress(ProcessLookupError):  # the new master may have ended it
        os.kill(worker, signal.SIGCONT)
    eventually(lambda: not members(old.pid), "the orphan stays", within_s=90)
    old.wait()


def states(control: Path) -> list[object]:
    """What state each session is in."""
    sessions = ask(control, "sessions")["sessions"]
    assert isinstance(sessions, list)
    return [session["state"] for session in sessions]


def test_a_session_that_is_stopped_amid_its_last_bytes_is_logged_once(
    serve: Serve, tmp_path: Path
) -> None:
    """Its upstream has reset it; what that had sent waits for a client that does not read.

    Result: it has one end, by the stop.
    """
    control = tmp_path / "control.sock"
    service = serve("--verbose", "--control", str(control))
    with connect(service.address, receive_buffer=4096) as client:
        peer = accept(service.upstream)
        peer.sendall(b"x" * 30_000)
        eventually(lambda: unread(client) > 0)
        reset(peer)
        eventually(lambda: states(control) == ["aborting"], lambda: states(control))
        assert service.stop(INT) == 0
        assert receive_to_reset(client)
    (ended,) = (line for line in service.forwarder.lines if "session.closed" in line)
    assert "end=us/shutdown" in ended
