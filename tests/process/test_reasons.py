"""Why sessions end: each way is caused, and must be told in the log and in the status, once."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from support.clogged import CloggedUpstream
from support.ends import accept, be_reset, carry, connect, receive_to_end, receive_to_reset, reset
from support.logged import places, read_json
from support.waiting import PATIENCE_S, eventually

from forwarder.stats.reasons import REASONS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.logged import Logged

    from process.conftest import Logging

pytestmark = pytest.mark.process


def client_ends(it: Logged) -> None:
    it.visit()


def upstream_ends(it: Logged) -> None:
    link = it.link()
    link.upstream.close()
    receive_to_end(link.client)
    link.client.close()


def client_resets(it: Logged, name: str = "client") -> None:
    near, far = it.link().end(name)
    carry(near, far, b"x")
    reset(near)
    receive_to_reset(far)
    far.close()


def upstream_resets(it: Logged) -> None:
    client_resets(it, "upstream")


def client_resets_after_the_end(it: Logged, name: str = "client") -> None:
    near, far = it.link().end(name)
    far.shutdown(socket.SHUT_WR)
    receive_to_end(near)
    reset(near)
    receive_to_reset(far)
    far.close()


def upstream_resets_after_the_end(it: Logged) -> None:
    client_resets_after_the_end(it, "upstream")


def client_only_ends(it: Logged, name: str = "client") -> None:
    link = it.link()
    near, far = link.end(name)
    near.shutdown(socket.SHUT_WR)
    receive_to_end(far)
    eventually(lambda: it.rule()["sessions"] == 0)
    link.close()


def upstream_only_ends(it: Logged) -> None:
    client_only_ends(it, "upstream")


def nobody_speaks(it: Logged) -> None:
    link = it.link()
    receive_to_end(link.client)
    link.close()


def client_goes_early(it: Logged) -> None:
    client = connect(it.address)
    eventually(lambda: it.rule()["sessions"] == 1)
    reset(client)


def nobody_listens(it: Logged) -> None:
    it.upstream.close()
    be_reset(it.address)


def no_server_is_up(it: Logged) -> None:
    it.forwarder.wait_logged("upstream.down")
    be_reset(it.address)


def its_server_goes_down(it: Logged) -> None:
    link = it.link()
    down = NOBODY_CHECKED + 'on_down = "reset"\n[[logs]]'
    assert it.reload(it.config.read_text().replace("[[logs]]", down, 1))["ok"] is True
    receive_to_reset(link.client)
    link.close()


def client_is_turned_away(it: Logged) -> None:
    with contextlib.suppress(ConnectionResetError), connect(it.address) as client:
        assert client.recv(1) == b""


def rule_changes(it: Logged) -> None:
    link = it.link()
    text = it.config.read_text().replace('name = "one"', 'name = "one"\nconnect_timeout = 7')
    assert it.reload(text)["ok"] is True
    receive_to_reset(link.client)
    link.close()


def it_is_killed(it: Logged) -> None:
    link = it.link()
    assert it.ask("kill", rule="one")["killed"] == 1
    receive_to_reset(link.client)
    link.close()


def client_is_denied_later(it: Logged) -> None:
    link = it.link()
    denied = '[[forwarding_rules.rules]]\ntype = "deny"\npattern = "127.0.0.0/8"\n[[logs]]'
    assert it.reload(it.config.read_text().replace("[[logs]]", denied))["ok"] is True
    receive_to_reset(link.client)
    link.close()


def worker_is_killed(it: Logged) -> None:
    link = it.link()
    (pid,) = it.forwarder.workers()
    os.kill(pid, signal.SIGKILL)
    receive_to_end(link.client)
    link.close()


def two_flows(it: Logged) -> None:
    clients = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2)]
    for client in clients:
        client.sendto(b"x", it.address)
        eventually(lambda: it.rule()["sessions"] == 1)
    eventually(lambda: it.rule()["sessions_total"] == 2)
    for client in clients:
        client.close()


# A check of a port that nobody listens on.
NOBODY_CHECKED = 'check = { kind = "tcp", port = 1, every = "0.1s" }\n'

CAUSES: list[tuple[str, str, str, Callable[[Logged], None]]] = [
    # reason, more TOML in the rule, more at the top, what causes it
    ("client/data", "", "", client_ends),
    ("upstream/data", "", "", upstream_ends),
    ("client/data/reset", "", "", client_resets),
    ("upstream/data/reset", "", "", upstream_resets),
    ("client/half-close/reset", "", "", client_resets_after_the_end),
    ("upstream/half-close/reset", "", "", upstream_resets_after_the_end),
    ("us/half-close", "half_close_timeout = 0.2", "", client_only_ends),
    ("us/half-close", "half_close_timeout = 0.2", "", upstream_only_ends),
    ("us/idle", "idle_timeout = 0.2", "", nobody_speaks),
    ("client/connect/reset", "", "", client_goes_early),
    ("upstream/connect", "", "", nobody_listens),
    ("us/access", 'rules = [{type = "allow", pattern = "10.0.0.1"}]', "", client_is_turned_away),
    ("us/access", "", "cut_denied = true", client_is_denied_later),
    ("us/drain", "", "drain_timeout = 0.2", rule_changes),
    ("us/kill", "", "", it_is_killed),
    ("us/upstream-down", f"{NOBODY_CHECKED}fail_open = false", "", no_server_is_up),
    ("us/upstream-down", "", "", its_server_goes_down),
    ("us/error", "", "", worker_is_killed),
    ("us/limit", 'protocol = "udp"\nmax_flows = 1', "", two_flows),
]
BY_HAND = {"us/connect", "us/accept", "us/shutdown", "us/lost"}  # in tests/relay
# Where the reason alone does not tell which of rinetd's words it is.
WORDS: dict[Callable[[Logged], None], str] = {
    client_only_ends: "\tdone-remote-closed",
    upstream_only_ends: "\tdone-local-closed",
}
UNLOGGED = {"us/error"}  # of a worker that was killed


def test_every_reason_is_caused_somewhere() -> None:
    assert {cause[0] for cause in CAUSES} | BY_HAND == set(REASONS)


@pytest.mark.parametrize(
    ("reason", "rule", "top", "cause"), CAUSES, ids=[cause[3].__name__ for cause in CAUSES]
)
def test_a_reason_is_in_the_log_and_in_the_status(
    logged: Logging,
    tmp_path: Path,
    reason: str,
    rule: str,
    top: str,
    cause: Callable[[Logged], None],
) -> None:
    path, lines = tmp_path / "json", tmp_path / "rinetd"
    with contextlib.ExitStack() as stack:
        upstream = ""
        if cause is client_goes_early:
            clogged = stack.enter_context(CloggedUpstream())
            upstream = '"{}:{}"'.format(*clogged.listener.getsockname())
        it = logged(
            places((path, "json"), (lines, "rinetd")),
            rule=rule,
            top=top,
            upstream=upstream,
            workers=1,
        )
        cause(it)
        eventually(lambda: reason in it.ends(), lambda: str(it.rule()))
        assert it.ends() == {reason: 1}
        if reason not in UNLOGGED:
            eventually(lambda: path.read_text() != "")
            (entry,) = read_json(path)
            assert entry["end"] == reason
            word = WORDS.get(cause, "")
            eventually(lambda: lines.read_text().endswith(f"{word}\n"))


def end_somehow(sock: socket.socket, chance: random.Random) -> None:
    """Close, reset or half-close; in the last case it is closed with the others."""
    end = chance.choice(["close", "reset", "shut"])
    with contextlib.suppress(OSError):
        if end == "shut":
            sock.shutdown(socket.SHUT_WR)
        elif end == "reset":
            reset(sock)
        else:
            sock.close()


def disturb(it: Logged, text: str, step: int) -> None:
    """Now and then: kill all, change the rule, turn a client away, retire workers."""
    if step % 50 == 20:
        it.ask("kill", rule="one")
    elif step % 50 == 30:
        it.reload(text.replace('name = "one"', f'name = "one"\nconnect_timeout = {step}'))
    elif step % 50 == 40:
        denied = '[[global_rules]]\ntype = "deny"\npattern = "127.0.0.1"\n[[logs]]'
        it.reload(text.replace("[[logs]]", denied))
        client_is_turned_away(it)
        it.reload(text)
    elif step == 100:
        assert it.ask("workers", count="1")["ok"] is True


def test_a_storm_of_faults_leaves_no_session_without_one_reason_nor_with_two(
    logged: Logging, tmp_path: Path
) -> None:
    """Clients and upstreams end, reset and stall at random, sessions are killed, rules change, a
    worker retires.

    *Result*: of each client one line in the log; the status has as many of each reason.
    """
    path = tmp_path / "json"
    it = logged(places((path, "json")), top="cut_denied = true\ndrain_timeout = 0.3", workers=3)
    text = it.config.read_text()
    chance = random.Random(4)
    with contextlib.ExitStack() as stack:
        open_sockets: list[socket.socket] = []
        for step in range(250):
            link = it.link()
            stack.callback(link.close)
            open_sockets += [link.client, link.upstream]
            if chance.random() < 0.3:
                link.client.sendall(bytes(chance.choice([1, 20_000, 300_000])))
            while len(open_sockets) > 12:
                end_somehow(open_sockets.pop(chance.randrange(len(open_sockets))), chance)
            disturb(it, text, step)
    eventually(lambda: it.rule()["sessions"] == 0, lambda: str(it.rule()), PATIENCE_S)
    ends = it.ends()
    assert it.rule()["sessions_total"] == 250
    assert it.forwarder.stop() == 0
    found = read_json(path)
    assert Counter(str(entry["end"]) for entry in found) == Counter(ends)
    ports = [int(str(e["client_port"])) for e in found if e["event"] == "ended"]
    assert sorted(ports) == sorted(it.used)
    assert "us/error" not in ends


def test_clients_that_come_one_by_one_are_not_mixed_up(logged: Logging, tmp_path: Path) -> None:
    """An accepted client that sends nothing is told with the address it came to."""
    path = tmp_path / "json"
    it = logged(places((path, "json")))
    text = it.config.read_text().replace('listen = "127.0.0.1:', 'listen = "0.0.0.0:')
    denied = 'rules = [{type = "deny", pattern = "127.0.0.9"}]\n[[logs]]'
    assert it.reload(text.replace("[[logs]]", denied))["ok"] is True
    with socket.socket() as client:
        client.settimeout(PATIENCE_S)
        client.bind(("127.0.0.9", 0))
        client.connect(("127.0.0.5", it.address[1]))
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""
    with connect(("127.0.0.6", it.address[1])), accept(it.upstream):
        pass
    eventually(lambda: path.read_text().count("\n") == 2)
    # Each by a worker of its own, perhaps, and these write when it is time for them.
    ended, refused = sorted(read_json(path), key=lambda record: str(record["client"]))
    assert (refused["client"], refused["local"]) == ("127.0.0.9", f"127.0.0.5:{it.address[1]}")
    assert ended["local"] == f"127.0.0.6:{it.address[1]}"
