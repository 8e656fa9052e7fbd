"""Multipath TCP on either side; where this kernel has none, the error that says so."""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
from typing import TYPE_CHECKING, Final

import pytest
from support.borrowed import connected_to, listening
from support.configured import Configured, rule
from support.ends import (
    MPTCP,
    Talker,
    accept,
    carry,
    connect,
    has_mptcp,
    receive_to_end,
    receive_to_reset,
    seeded,
    talk,
)
from support.forwarder import reserve_port
from support.loads import Load
from support.namespaces import Namespace
from support.processes import run_command
from support.waiting import PATIENCE_S, eventually

if TYPE_CHECKING:
    from contextlib import ExitStack
    from pathlib import Path

    from process.conftest import Launch

pytestmark = pytest.mark.process

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make namespaces")
_SO_PROTOCOL: Final = 38
_SOL_MPTCP: Final = 284
_MPTCP_INFO: Final = 1


def protocol(sock: socket.socket) -> int:
    return sock.getsockopt(socket.SOL_SOCKET, _SO_PROTOCOL)


def speaks_mptcp(sock: socket.socket) -> bool:
    """Whether a connection is MPTCP and has not fallen back (linux/mptcp.h, mptcpi_flags)."""
    if protocol(sock) != MPTCP:
        return False
    info = sock.getsockopt(_SOL_MPTCP, _MPTCP_INFO, 12)
    return not struct.unpack_from("I", info, 8)[0] & 1


def mptcp_socket(address: tuple[str, int] | None = None) -> socket.socket:
    """A client of an address, or a listener on one of its own."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, MPTCP)
    sock.settimeout(PATIENCE_S)
    if address:
        sock.connect(address)
    else:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
    return sock


def text(address: tuple[str, int], upstream: socket.socket, sides: str) -> str:
    return "workers = 2\n" + rule(address, upstream.getsockname(), f'mptcp = "{sides}"')


def refuses(path: Path) -> None:
    """Where there is no MPTCP the configuration says so."""
    done = run_command("-c", str(path))
    assert done.returncode == 78
    assert re.search(
        r":5:1: mptcp: this system has none: .*hint: .*net\.mptcp\.enabled", done.stderr
    )


@pytest.mark.parametrize("relay", ["splice", "copy"])
def test_both_sides_speak_it_and_sessions_are_as_always(
    launch: Launch, tmp_path: Path, address: tuple[str, int], stack: ExitStack, relay: str
) -> None:
    """1 MiB both ways at once, half-closes in turn, a reset, and a client that speaks TCP."""
    path = tmp_path / "forwarder.toml"
    if not has_mptcp():
        with reserve_port() as holder:
            path.write_text(text(address, holder, "both"))
            refuses(path)
        return
    upstream = stack.enter_context(mptcp_socket())
    path.write_text(text(address, upstream, "both"))
    it = launch("-c", str(path), "--relay", relay)
    assert listening([it.pid], address, protocol) == [MPTCP, MPTCP]
    with mptcp_socket(address) as client, accept(upstream) as peer:
        carry(client, peer, b"there")
        for place in (client.getsockname(), upstream.getsockname()):
            with connected_to(it.workers(), place) as found:
                assert speaks_mptcp(found)
        there, back = seeded(1 << 20, 1), seeded(1 << 20, 2)
        near, far = Talker(client, there), Talker(peer, back, after_eof=True)
        talk(near, far)
        assert (bytes(far.received), bytes(near.received)) == (there, back)
    with mptcp_socket(address) as client, accept(upstream) as peer:
        client.shutdown(socket.SHUT_WR)
        assert receive_to_end(peer) == b""
        carry(peer, client, b"still open")
        peer.shutdown(socket.SHUT_WR)
        assert receive_to_end(client) == b""
    with mptcp_socket(address) as client, accept(upstream) as peer:
        carry(client, peer, b"there")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()
        assert receive_to_reset(client) == b""
    with connect(address) as client, accept(upstream) as peer:
        carry(client, peer, b"plain")
        with connected_to(it.workers(), client.getsockname()) as found:
            assert not speaks_mptcp(found)
    assert it.stop() == 0


def test_a_reload_and_an_upgrade_change_it_and_nobody_is_dropped(
    launch: Launch, tmp_path: Path, address: tuple[str, int], upstream: socket.socket
) -> None:
    """Off, by a reload to on, by an upgrade to off again."""
    path = tmp_path / "forwarder.toml"
    if not has_mptcp():
        path.write_text(text(address, upstream, "listen"))
        refuses(path)
        return
    path.write_text(text(address, upstream, "off"))
    it = Configured(launch("-c", str(path)), path)
    old = it.forwarder
    with Load(address, upstream, rate=100, streams=2) as load:
        load.wait_served(20)
        assert "~1" in it.reload(text(address, upstream, "listen"))
        eventually(lambda: listening([old.pid], address, protocol) == [MPTCP, MPTCP], "not MPTCP")
        load.wait_served(20)
        path.write_text(text(address, upstream, "off"))
        old.signal(signal.SIGUSR2)
        old.wait_logged(r"master\.stopping")
        new = [match[1] for line in old.lines if (match := re.search(r"ready pid=(\d+)", line))]
        master = int(new[-1])
        eventually(
            lambda: listening([master], address, protocol) == [socket.IPPROTO_TCP] * 2,
            "the predecessor's sockets are left",
        )
        load.wait_served(20)
        account = load.stop()
    assert account.dropped == 0, account.problems
    os.kill(master, signal.SIGTERM)
    assert old.wait() == 0


@as_root
def test_where_it_is_turned_off_the_configuration_is_refused(
    tmp_path: Path, address: tuple[str, int], upstream: socket.socket
) -> None:
    path = tmp_path / "forwarder.toml"
    path.write_text(text(address, upstream, "listen"))
    with Namespace() as there:
        if has_mptcp():
            there.sysctl("mptcp/enabled", 0)
        done = run_command("check", "-c", str(path), prefix=there.prefix)
    assert done.returncode == 78
    assert re.search(
        r":5:1: mptcp: this system has none: .*hint: .*net\.mptcp\.enabled", done.stderr
    )
