"""Listening sockets that a service manager hands over: LISTEN_FDS, sd_listen_fds(3)."""

from __future__ import annotations

import signal
import socket
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

import pytest
from support.configured import Configured, rule
from support.echo import Echo, ask_udp
from support.ends import Link, accept, carry, connect
from support.forwarder import reserve_port
from support.processes import as_nobody, listeners, owner, run_command
from support.waiting import eventually

from process.conftest import as_pairs

if TYPE_CHECKING:
    from pathlib import Path

    from process.conftest import Launch

pytestmark = pytest.mark.process

# Binds what its arguments say before "--", as descriptors 3 and up, and executes what follows.
# "udp" is a UDP socket with SO_REUSEPORT.
# "shared" has SO_REUSEPORT; "single" has none, but was bound with it: the test holds the port.
_ACTIVATE: Final = """
import os, socket, sys
end = sys.argv.index("--")
for i, text in enumerate(sys.argv[1:end]):
    host, port, kind = text.split(":")
    sock = socket.socket(type=socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind((host, int(port)))
    if kind != "udp":
        sock.listen(128)
    if kind == "single":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
    fd = sock.detach()
    if fd == 3 + i:
        os.set_inheritable(fd, True)
    else:
        os.dup2(fd, 3 + i)
        os.close(fd)
os.environ.update(LISTEN_FDS=str(end - 1), LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES="x")
os.execvp(sys.argv[end + 1], sys.argv[end + 1:])
"""


def activate(*addresses: tuple[str, int], kind: str) -> list[str]:
    """A prefix that binds the addresses and executes the command."""
    texts = [f"{host}:{port}:{kind}" for host, port in addresses]
    return [sys.executable, "-c", _ACTIVATE, *texts, "--"]


@pytest.mark.parametrize("kind", ["shared", "single", "root's"])
def test_a_given_socket_is_served_by_all_workers(
    launch: Launch, address: tuple[str, int], upstream: socket.socket, kind: str
) -> None:
    """More sockets are bound beside one with SO_REUSEPORT of our user; else all share the one."""
    prefix = activate(address, kind="single" if kind == "single" else "shared")
    if kind == "root's":
        prefix += as_nobody()
    it = launch(*as_pairs(address, upstream), "--workers", "3", prefix=prefix)
    has_own = kind == "shared" or (not as_nobody() and kind == "root's")
    assert listeners(address) == (3 if has_own else 1)
    workers = it.workers()
    assert len(workers) == 3
    owners: set[int] = set()
    with ExitStack() as stack:
        while owners != set(workers):
            clients = [stack.enter_context(connect(address)) for _ in range(20)]
            for client in clients:
                stack.enter_context(accept(upstream))
                owners.add(owner(workers, client))
        client = stack.enter_context(connect(address))
        link = Link(client, stack.enter_context(accept(upstream)))
        carry(link.client, link.upstream, b"there" * 1000)
        carry(link.upstream, link.client, b"back" * 1000)
    assert it.stop() == 0
    assert not it.trouble()
    assert listeners(address) == 0


def test_a_given_socket_that_no_rule_wants_is_reported_and_closed(
    launch: Launch, address: tuple[str, int], upstream: socket.socket
) -> None:
    """Who connects to it is refused, in place of waiting in a queue that nobody serves."""
    with reserve_port() as holder:
        unwanted = holder.getsockname()
        prefix = activate(unwanted, address, kind="shared")
        it = launch(*as_pairs(address, upstream), "--workers", "2", prefix=prefix)
        it.wait_logged(f"no rule listens on 127.0.0.1:{unwanted[1]}, inherited; closed")
        eventually(lambda: listeners(unwanted) == 0)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(unwanted, timeout=20)
        with connect(address) as client, accept(upstream) as peer:
            carry(client, peer, b"there")
        assert it.stop() == 0


def test_sockets_that_are_meant_for_another_process_are_left_alone(
    launch: Launch, address: tuple[str, int], upstream: socket.socket
) -> None:
    """LISTEN_PID names the one that they are meant for."""
    with reserve_port() as holder:
        prefix = [*activate(holder.getsockname(), kind="shared"), "env", "LISTEN_PID=1"]
        it = launch(*as_pairs(address, upstream), "--workers", "1", prefix=prefix)
        assert it.stop() == 0
        assert not it.trouble()


def test_a_given_udp_socket_is_served_and_goes_with_an_upgrade(
    launch: Launch, tmp_path: Path
) -> None:
    """An upgrade needs every listening socket, those of UDP too, or it cannot bind them again."""
    with Echo(udp=[("127.0.0.1", 0), ("127.0.0.1", 0)]) as upstreams:
        taken, upstream = upstreams.udp
        address = "127.0.0.2", taken[1]
        path = tmp_path / "udp.toml"
        path.write_text("workers = 2\n" + rule(address, upstream, 'protocol = "udp"\ntimeout = 1'))
        control = str(tmp_path / "control.sock")
        prefix = activate(address, kind="udp")
        it = launch("-c", str(path), "--control", control, prefix=prefix)
        assert ask_udp(address) == f"127.0.0.1:{upstream[1]} saw 127.0.0.1: hello"
        done = run_command("upgrade", "--control", control)
        assert "serves, the old one drains" in done.stdout, done
        assert ask_udp(address) == f"127.0.0.1:{upstream[1]} saw 127.0.0.1: hello"
        assert run_command("stop", "--control", control).returncode == 0
        assert it.wait() == 0
        assert not it.trouble()


def test_a_udp_socket_of_another_user_is_served_by_one_worker(
    launch: Launch, public_path: Path
) -> None:
    """As of a service manager that is root. Result: it starts, and can have more workers."""
    with Echo(udp=[("127.0.0.1", 0), ("127.0.0.1", 0)]) as upstreams:
        taken, upstream = upstreams.udp
        address = "127.0.0.2", taken[1]
        path = public_path / "udp.toml"
        path.write_text("workers = 2\n" + rule(address, upstream, 'protocol = "udp"\ntimeout = 1'))
        prefix = [*activate(address, kind="udp"), *as_nobody()]
        it = launch("-c", str(path), prefix=prefix)
        assert ask_udp(address) == f"127.0.0.1:{upstream[1]} saw 127.0.0.1: hello"
        Configured(it, path).resize(signal.SIGTTIN, 3)
        assert ask_udp(address) == f"127.0.0.1:{upstream[1]} saw 127.0.0.1: hello"
        assert it.stop() == 0
        assert all("udp.unsettled" in line for line in it.trouble()), it.trouble()
