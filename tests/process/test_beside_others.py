"""Next to programs of other people: rinetd decides alike, iperf3 gets through."""

from __future__ import annotations

import json
import selectors
import signal
import socket
import subprocess
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from support.ends import listen, receive_exactly, seeded
from support.forwarder import reserve_port
from support.processes import listeners
from support.programs import debian, rinetd
from support.waiting import PATIENCE_S, eventually

from forwarder.config import Dialect, load
from forwarder.config.advice import advise
from process.conftest import as_pairs, stop

if TYPE_CHECKING:
    from pathlib import Path

    from process.conftest import Launch

pytestmark = pytest.mark.process

SOURCES = ["127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.1.2", "127.0.0.23"]

# Access rules by the place where they stand: before all rules, after the second, after the third.
# rinetd 0.73 loses the first access rule behind the first forwarding rule, so there is none;
# its "?" at the end of a pattern reads past the end of a shorter address.
CASES = {
    "none": ([], [], []),
    "global-deny": (["deny 127.0.0.2"], [], []),
    "global-allow": (["allow 127.0.0.*"], [], []),
    "global-both": (["allow 127.0.0.*", "deny 127.0.0.3"], [], []),
    "deny-before-allow": (["deny 127.0.0.3", "allow 127.0.0.*", "allow 127.0.1.2"], [], []),
    "per-rule": ([], ["allow 127.0.0.?"], ["deny 127.0.?.2", "deny 127.0.0.1"]),
    "both": (["deny 127.0.0.3"], ["allow 127.0.0.3", "allow 127.0.0.1"], ["deny *.2"]),
    "any": ([], ["deny *"], ["allow *"]),
}

Outcome = dict[tuple[int, str], bytes | None]
Address = tuple[str, int]


def visit(address: Address, upstream: socket.socket, source: str, up: bytes) -> bytes | None:
    """Connect from ``source`` and send ``up``: what the upstream got and sent back reversed.

    None if the client is turned away.
    """
    with socket.socket() as client, selectors.DefaultSelector() as selector:
        client.settimeout(PATIENCE_S)
        client.bind((source, 0))
        client.connect(address)
        selector.register(client, selectors.EVENT_READ)
        selector.register(upstream, selectors.EVENT_READ)
        ready = [key.fileobj for key, _ in selector.select(PATIENCE_S)]
        assert ready, f"{source} is neither forwarded nor turned away"
        if client in ready:
            return None
        far, _ = upstream.accept()
        with far:
            far.settimeout(PATIENCE_S)
            client.sendall(up)
            far.sendall(receive_exactly(far, len(up))[::-1])
            return receive_exactly(client, len(up))


def visit_all(addresses: list[Address], upstream: socket.socket) -> Outcome:
    up = seeded(50_000, 7)
    return {
        (number, source): visit(address, upstream, source, up)
        for number, address in enumerate(addresses)
        for source in SOURCES
    }


@debian("rinetd")
@pytest.mark.parametrize("case", CASES)
def test_rinetd_and_we_serve_the_same_clients_the_same_bytes(
    launch: Launch, tmp_path: Path, case: str
) -> None:
    everywhere, second, third = CASES[case]
    with ExitStack() as stack:
        upstream = stack.enter_context(listen())
        holders = [stack.enter_context(reserve_port()) for _ in range(3)]
        addresses: list[Address] = [holder.getsockname() for holder in holders]
        rules = ["{} {} {} {}".format(*a, *upstream.getsockname()) for a in addresses]
        lines = [*everywhere, *rules[:2], *second, rules[2], *third]
        path = tmp_path / "rinetd.conf"
        path.write_text("\n".join(lines) + "\n")
        with rinetd(path, addresses):
            theirs = visit_all(addresses, upstream)
        eventually(lambda: not any(listeners(address) for address in addresses))
        forwarder = launch("-c", str(path), "--workers", "2")
        ours = visit_all(addresses, upstream)
        assert stop(forwarder, signal.SIGTERM) == 0
    served = {key: value is not None for key, value in theirs.items()}
    assert {key: value is not None for key, value in ours.items()} == served
    assert ours == theirs


@debian("rinetd")
@pytest.mark.parametrize(
    ("everywhere", "first", "is_ignored"),
    [
        ([], ["deny 127.0.0.2", "deny 127.0.0.3"], True),
        ([], ["deny 127.0.0.2"], False),
        (["deny 127.0.0.9"], ["deny 127.0.0.2", "deny 127.0.0.3"], False),
    ],
    ids=["two", "one", "global"],
)
def test_rinetd_ignores_the_access_rule_that_check_says_it_does(
    tmp_path: Path, everywhere: list[str], first: list[str], is_ignored: bool
) -> None:
    """A second forwarding rule has one more, for rinetd then takes a rule too many."""
    with ExitStack() as stack:
        upstream = stack.enter_context(listen())
        holders = [stack.enter_context(reserve_port()) for _ in range(2)]
        addresses: list[Address] = [holder.getsockname() for holder in holders]
        rules = ["{} {} {} {}".format(*a, *upstream.getsockname()) for a in addresses]
        path = tmp_path / "rinetd.conf"
        lines = [*everywhere, rules[0], *first, rules[1], "deny 127.0.0.23"]
        path.write_text("\n".join(lines) + "\n")
        with rinetd(path, addresses):
            is_served = visit(addresses[0], upstream, "127.0.0.2", b"x") is not None
        config = load(path).config
    told = [issue for issue in advise(config, Dialect.RINETD) if "issue 23" in issue.what]
    assert (is_served, len(told)) == (is_ignored, int(is_ignored))


@debian("iperf3")
@pytest.mark.parametrize("relay", ["splice", "copy"])
@pytest.mark.parametrize("streams", [1, 8])
def test_iperf3_runs_through(launch: Launch, relay: str, streams: int) -> None:
    with reserve_port() as near, reserve_port() as far:
        forwarder = launch(*as_pairs(near.getsockname(), far), "--workers", "2", "--relay", relay)
        run_iperf3(near.getsockname(), far.getsockname(), streams)
        assert stop(forwarder, signal.SIGTERM) == 0
    assert not forwarder.trouble()


def run_iperf3(near: Address, far: Address, streams: int) -> None:
    """Serve at ``far``, and send to ``near``."""
    server = subprocess.Popen(
        ["iperf3", "-4", "-s", "-1", "-B", far[0], "-p", str(far[1])], stdout=subprocess.DEVNULL
    )
    try:
        eventually(lambda: listeners(far) == 1)
        ran = subprocess.run(
            [
                *("iperf3", "-4", "-J", "-c", near[0], "-p", str(near[1])),
                *("-P", str(streams), "-n", "32M"),
            ],
            capture_output=True,
            text=True,
            timeout=4 * PATIENCE_S,
            check=False,
        )
        report = json.loads(ran.stdout)
        assert ran.returncode == 0, report.get("error")
        assert report["end"]["sum_received"]["bytes"] > 0
        assert len(report["end"]["streams"]) == streams
        assert server.wait(PATIENCE_S) == 0
    finally:
        server.kill()
        server.wait()
