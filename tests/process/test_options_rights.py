"""Options that need a privilege: told at the start or by a refused reload, and kept by workers."""

from __future__ import annotations

import os
import re
import signal
import socket
from typing import TYPE_CHECKING, Final

import pytest
from support.borrowed import connected_to, listening
from support.configured import Configured, rule
from support.ends import accept, carry, connect
from support.hosts import own_host
from support.processes import as_nobody, run_command
from support.waiting import eventually

from process.test_privileges import assert_unprivileged, facts

if TYPE_CHECKING:
    from pathlib import Path

    from process.conftest import Launch

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else"),
]
NET_RAW: Final = 1 << 13
HEAD: Final = 'workers = 2\nuser = "nobody"\n'


def mark(sock: socket.socket) -> int:
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_MARK)


def facts_of_listener(sock: socket.socket) -> tuple[bytes, int]:
    """Device and keepalive_idle."""
    device = sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0")
    return device, sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)


def capabilities(pid: int) -> int:
    return int(facts(pid)["CapEff"][0], 16)


def assert_marked(
    it: Configured, address: tuple[str, int], upstream: socket.socket, number: int
) -> None:
    """Both sockets of new sessions have the mark, and so have all that listen."""
    assert listening([it.forwarder.pid], address, mark) == [number, number]
    with connect(address) as client, accept(upstream) as peer:
        carry(client, peer, b"there")
        for place in (client.getsockname(), upstream.getsockname()):
            with connected_to(it.forwarder.workers(), place) as found:
                assert mark(found) == number


@pytest.mark.parametrize("option", ["mark = 1", "upstream_mark = 1", "transparent = true"])
def test_who_has_no_privilege_is_told_at_the_start(
    public_path: Path, address: tuple[str, int], upstream: socket.socket, option: str
) -> None:
    """``check`` looks at values only, whoever asks."""
    path = public_path / "forwarder.toml"
    path.write_text(rule(address, upstream.getsockname(), option))
    done = run_command("-c", str(path), prefix=as_nobody())
    assert done.returncode == 77, done.stderr
    key = option.partition(" ")[0]
    found = re.search(rf"forwarder.toml:4:1: {key} needs a privilege: .*; hint: (.*)", done.stderr)
    assert found, done.stderr
    assert "CAP_NET_RAW" in found[1]
    assert run_command("check", "-c", str(path), prefix=as_nobody()).returncode == 0
    # What nobody can do anything about is told first.
    path.write_text(rule(address, upstream.getsockname(), f'{option}\ncongestion = "nosuch"'))
    done = run_command("-c", str(path), prefix=as_nobody())
    assert done.returncode == 78
    assert "needs a privilege" in done.stderr
    assert ":5:1: congestion 'nosuch': there is none here" in done.stderr


def test_workers_keep_the_one_capability_that_a_mark_needs(
    launch: Launch, tmp_path: Path, address: tuple[str, int], upstream: socket.socket
) -> None:
    """After a reload and in a worker that is started later, too."""
    path = tmp_path / "forwarder.toml"
    path.write_text(HEAD + rule(address, upstream.getsockname(), "mark = 5"))
    it = Configured(launch("-c", str(path)), path)
    for pid in it.forwarder.workers():
        assert capabilities(pid) == NET_RAW
        assert facts(pid)["NoNewPrivs"] == ["1"]
    assert_marked(it, address, upstream, 5)
    assert "~1" in it.reload(HEAD + rule(address, upstream.getsockname(), "mark = 6"))
    assert_marked(it, address, upstream, 6)
    victim = it.forwarder.workers()[0]
    os.kill(victim, signal.SIGKILL)
    eventually(
        lambda: sum("worker.ready" in line for line in it.forwarder.lines) == 3, "no new worker"
    )
    assert [capabilities(pid) for pid in it.forwarder.workers()] == [NET_RAW, NET_RAW]
    assert "~1" in it.reload(HEAD + rule(address, upstream.getsockname()))
    assert_marked(it, address, upstream, 0)
    assert it.forwarder.stop() == 0


def test_the_first_mark_by_a_reload_is_refused_where_workers_have_no_privilege(
    launch: Launch, tmp_path: Path, address: tuple[str, int], upstream: socket.socket
) -> None:
    path = tmp_path / "forwarder.toml"
    path.write_text(HEAD + rule(address, upstream.getsockname()))
    it = Configured(launch("-c", str(path)), path)
    new = HEAD + rule(address, upstream.getsockname(), "upstream_mark = 5\nbacklog = 5")
    assert "stays in force" in it.reload(new)
    it.forwarder.wait_logged(r"forwarder\.toml:6:1: upstream_mark needs a privilege: .*restart")
    # The process that read the file has said so, and may not have gone yet.
    eventually(lambda: len(it.forwarder.workers()) == 2)
    for pid in it.forwarder.workers():
        assert_unprivileged(pid)
    assert_marked(it, address, upstream, 0)
    assert it.forwarder.stop() == 0


@pytest.mark.parametrize("first", ["mark = 5", ""], ids=["from the start", "by a reload"])
def test_somebody_with_just_that_capability(
    launch: Launch, public_path: Path, address: tuple[str, int], upstream: socket.socket, first: str
) -> None:
    """As the unit file gives it. Workers of a master that did not need it do not have it."""
    path = public_path / "forwarder.toml"
    path.write_text("workers = 2\n" + rule(address, upstream.getsockname(), first))
    ambient = ["--inh-caps=+net_raw", "--ambient-caps=+net_raw"]
    it = Configured(launch("-c", str(path), prefix=[*as_nobody(), *ambient]), path)
    eventually(lambda: len(it.forwarder.workers()) == 2)  # another child may be about to go
    for pid in it.forwarder.workers():
        assert capabilities(pid) == (NET_RAW if first else 0)
    outcome = it.reload("workers = 2\n" + rule(address, upstream.getsockname(), "mark = 6"))
    assert ("~1" if first else "stays in force") in outcome
    assert_marked(it, address, upstream, 6 if first else 0)
    assert it.forwarder.stop() == 0


def test_what_cannot_be_changed_on_sockets_that_listen_refuses_the_whole_reload(
    launch: Launch, tmp_path: Path, address: tuple[str, int], upstream: socket.socket
) -> None:
    """A device is had without a privilege and not given up without one.

    Result: the other options, and the sockets of other rules, are as they were.
    """
    path = tmp_path / "forwarder.toml"
    other = (own_host(1), address[1])

    def text(more: str, idle: int) -> str:
        name = upstream.getsockname()
        return (
            HEAD
            + rule(other, name, f"keepalive_idle = {idle}")
            + rule(address, name, f"{more}\nkeepalive_idle = {idle}")
        )

    path.write_text(text("", 50))
    it = Configured(launch("-c", str(path)), path)
    pids = [it.forwarder.pid]
    assert "~2" in it.reload(text('device = "lo"', 60))
    assert listening(pids, address, facts_of_listener) == [(b"lo", 60)] * 2
    assert "stays in force" in it.reload(text("", 70))
    it.forwarder.wait_logged(r"cannot change the options of the sockets at 127\.0\.0\.1:\d+: Oper")
    assert listening(pids, address, facts_of_listener) == [(b"lo", 60)] * 2
    assert listening(pids, other, facts_of_listener) == [(b"", 60)] * 2
    assert "~2" in it.reload(text('device = "lo"', 80))
    assert listening(pids, other, facts_of_listener) == [(b"", 80)] * 2
    assert it.forwarder.stop() == 0
