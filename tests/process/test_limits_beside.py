"""Limits of sessions beside access rules, shortages, drains, UDP; and what is told of them."""

from __future__ import annotations

import json
import re
import resource
import signal
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from support import procfs
from support.datagrams import udp_client
from support.ends import carry, connect, listen_unix
from support.flood import Flood
from support.limited import LIMIT
from support.waiting import eventually

if TYPE_CHECKING:
    import socket
    from pathlib import Path

    from process.conftest import Launch, Limit, LimitAny

pytestmark = pytest.mark.process


MODES = pytest.mark.parametrize("mode", ["reset", "queue"])


def test_clients_that_may_not_use_the_rule_take_no_place(limit: Limit) -> None:
    deny = '\nrules = [{ type = "deny", pattern = "127.0.3.1" }]'
    for mode in ("reset", "queue"):
        it = limit(
            f'max_sessions = 1\nrate = "1/h"\nburst = 3\non_limit = "{mode}"{deny}', workers=1
        )
        with it.flood(hold=1, hosts=("127.0.3.1",)) as flood:
            assert flood.fill(20).served == 0
        for _ in range(3):
            link = it.link()
            link.close()
            it.links.clear()
            eventually(lambda it=it: it.status()["sessions"] == 0)  # type: ignore[misc]
        assert it.ends("us/access") == 20


@MODES
def test_a_limit_and_a_shortage_of_descriptors_end_together(limit: Limit, mode: str) -> None:
    it = limit(f'max_sessions = {LIMIT}\non_limit = "{mode}"', workers=1)
    (pid,) = it.it.forwarder.workers()
    old = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = len(procfs.descriptors(pid))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 13, old[1]))
    with it.flood(hold=6) as flood:
        outcome = flood.run(100)
    assert outcome.served == 100
    resource.prlimit(pid, resource.RLIMIT_NOFILE, old)
    it.assert_all_places_free()


def test_a_drain_ends_though_clients_wait_at_a_limit(limit: Limit) -> None:
    it = limit('max_sessions = 1\non_limit = "queue"', workers=2)
    link = it.link()
    with connect(it.address):
        it.it.forwarder.wait_logged("clients wait in the queue")
        before = {pid: procfs.socket_count(pid) for pid in it.it.forwarder.workers()}
        it.it.forwarder.signal(signal.SIGTERM)

        def is_draining() -> bool:
            """The worker without a session has ended, the other one listens no more."""
            left = it.it.forwarder.workers()
            return len(left) == 1 and procfs.socket_count(left[0]) < before[left[0]]

        eventually(is_draining)
        carry(link.client, link.upstream, b"still here")
        it.close_links()
        assert it.it.forwarder.wait() == 0


def test_clients_of_a_unix_socket_are_one_client(launch: Launch, tmp_path: Path) -> None:
    with listen_unix(str(tmp_path / "upstream")) as upstream:
        path = tmp_path / "forwarder.toml"
        path.write_text(
            "workers = 2\n[[forwarding_rules]]\n"
            f'listen = "unix:{tmp_path}/listen"\nupstream = "unix:{tmp_path}/upstream"\n'
            "max_sessions = 100\nmax_sessions_per_client = 5\n"
        )
        forwarder = launch("-c", str(path))
        with Flood(str(tmp_path / "listen"), upstream, 5, ("unix",)) as flood:
            outcome = flood.fill(20)
            assert (flood.open, outcome.reset + outcome.cut) == (5, 15)
        eventually(lambda: all(procfs.socket_count(pid) < 12 for pid in forwarder.workers()))


@pytest.mark.parametrize("protocol", ["udp", "udptotcp", "tcptoudp"])
def test_flows_and_bridges_count_and_are_limited(limit_any: LimitAny, protocol: str) -> None:
    """Five may be; who comes then is dropped, or reset, until a flow ends by silence."""
    it = limit_any(protocol, 'max_sessions = 5\ntimeout = "8s"')
    with ExitStack() as stack:

        def client() -> socket.socket:
            sock = connect(it.address) if protocol == "tcptoudp" else udp_client(it.address)
            return stack.enter_context(sock)

        clients = [client() for _ in range(5)]
        for sock in clients:
            sock.send(b"x")
        eventually(lambda: it.status()["sessions"] == 5)
        if protocol == "tcptoudp":
            it.refused()
        else:
            client().send(b"x")
        eventually(lambda: it.ends("us/limit") == 1)
        if protocol == "tcptoudp":
            clients.pop().close()
        else:
            eventually(lambda: it.status()["datagrams_dropped"] == 1)
        eventually(lambda: int(str(it.status()["sessions"])) < 5)
        client().send(b"x")
        eventually(lambda: int(str(it.status()["sessions_total"])) == 6)


# -- what is told


def test_the_log_tells_of_a_limit_once_per_interval(limit: Limit) -> None:
    """300 clients are refused by one worker; the interval is 10 s."""
    it = limit("max_sessions = 1", workers=1)
    it.link()
    began = time.monotonic()
    for _ in range(300):
        it.refused()
    lines = [line for line in it.it.forwarder.lines if "limit.reached" in line]
    assert len(lines) <= 2 + (time.monotonic() - began) // 10, lines
    assert re.search(r"limit\.reached rule=one: max_sessions$", lines[0])
    assert it.ends("us/limit") == 300


def test_the_connection_log_names_the_limit(limit: Limit, tmp_path: Path) -> None:
    path = tmp_path / "connections"
    top = f'[[logs]]\nto = "{path}"\n'
    it = limit("max_sessions = 100\nmax_sessions_per_client = 1", workers=1, top=top)
    it.link()
    it.refused()
    eventually(lambda: path.exists() and "refused" in path.read_text())
    (line,) = [json.loads(text) for text in path.read_text().splitlines() if "refused" in text]
    assert line["event"] == "refused"
    assert (line["end"], line["detail"]) == ("us/limit", "max_sessions_per_client")
