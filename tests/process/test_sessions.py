"""Counters, `forwarder sessions` and `forwarder kill` with several workers, some of them unwell."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
from typing import TYPE_CHECKING

import pytest
from support.clogged import CloggedUpstream
from support.ends import accept, be_reset, carry, connect, listen, receive_to_end, receive_to_reset
from support.forwarder import reserve_port
from support.hosts import own_host
from support.processes import run_command, state
from support.waiting import PATIENCE_S, eventually

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

    from support.logged import Logged

    from process.conftest import Logging

pytestmark = pytest.mark.process


def run(it: Logged, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_command(*arguments, "--control", str(it.control))


def listed(it: Logged, **choice: object) -> list[dict[str, object]]:
    answer = it.ask("sessions", **choice)
    assert answer["ok"] is True, answer
    sessions = answer["sessions"]
    assert isinstance(sessions, list)
    return sessions


def add_rule(it: Logged, rule: str) -> None:
    answer = it.reload(f"{it.config.read_text()}\n[[forwarding_rules]]\n{rule}\n")
    assert answer["ok"] is True, answer


def counters(it: Logged, index: int = 0) -> dict[str, object]:
    return {k: v for k, v in it.rule(index).items() if k not in ("sessions", "queue", "ends")}


# -- counters


@pytest.mark.parametrize("relay", ["splice", "copy"])
def test_bytes_are_exactly_those_of_the_clients_and_are_never_taken_back(
    logged: Logging, relay: str
) -> None:
    """Of sessions that are open, that end, and of a worker that is killed.

    *Result*: at every look at least as many as before, and in the end exactly as many as moved.
    """
    it = logged("", top=f'relay = "{relay}"\ndeposit_after = 0')
    chance = random.Random(5)
    links = [it.link() for _ in range(8)]
    up = down = seen = 0

    def never_less() -> None:
        nonlocal seen
        found = int(str(it.rule()["bytes_c2u"]))
        assert seen <= found <= up
        seen = found

    for number, link in enumerate(links):
        size = chance.choice([1, 5_000, 700_000])
        carry(link.client, link.upstream, bytes(size))
        carry(link.upstream, link.client, bytes(2 * size))
        up, down = up + size, down + 2 * size
        never_less()
        if number % 2:
            link.close()
        never_less()

    def all_told() -> bool:
        never_less()
        return (it.rule()["bytes_c2u"], it.rule()["bytes_u2c"]) == (up, down)

    eventually(all_told)
    # A worker's own sums are written at its next beat, those of a rule when a session ends.
    eventually(lambda: (it.total("bytes_c2u"), it.total("bytes_u2c")) == (up, down))
    spliced = int(str(it.rule()["bytes_spliced"]))
    assert (0 < spliced <= up + down) is (relay == "splice")
    for pid in it.forwarder.workers():
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: it.rule()["sessions"] == 0)
    assert all_told()
    assert it.ends()["us/error"] == 4
    for link in links:
        link.close()


def test_counters_survive_reloads_resizes_and_a_rule_that_comes_back(logged: Logging) -> None:
    it = logged("")
    text = it.config.read_text()
    it.visit(6, size=1000)
    eventually(lambda: it.rule()["bytes_c2u"] == 6000)
    before = counters(it)
    assert sum(before["connect_ms"].values()) == 6  # type: ignore[attr-defined]
    assert it.reload(text.replace('name = "one"', 'name = "one"\nidle_timeout = 9'))["ok"] is True
    for size in ("4", "1"):
        assert it.ask("workers", count=size)["ok"] is True
    assert counters(it) == before
    with reserve_port() as holder:
        other = text.replace('name = "one"', 'name = "other"').replace(
            f'listen = "127.0.0.1:{it.address[1]}"',
            'listen = "{}:{}"'.format(*holder.getsockname()),
        )
        assert it.reload(other)["ok"] is True
        assert it.rule()["sessions_total"] == 0
        assert it.reload(text)["ok"] is True
    assert counters(it) == before
    it.visit(1)
    assert it.ends() == {"client/data": 7}


def test_connect_times_are_of_those_that_were_connected(logged: Logging) -> None:
    it = logged("")
    it.visit(3)
    it.upstream.close()
    for _ in range(2):
        be_reset(it.address)
    rule = it.rule()
    assert sum(rule["connect_ms"].values()) == 3  # type: ignore[attr-defined]
    assert (rule["sessions_total"], rule["connects_failed"]) == (5, 2)


def test_udp_is_counted_by_payload(logged: Logging) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as upstream, contextlib.ExitStack() as s:
        upstream.bind(("127.0.0.1", 0))
        upstream.settimeout(PATIENCE_S)
        it = logged("", rule='protocol = "udp"', upstream='"{}:{}"'.format(*upstream.getsockname()))
        clients = [s.enter_context(socket.socket(type=socket.SOCK_DGRAM)) for _ in range(5)]
        for size, client in enumerate(clients):
            client.settimeout(PATIENCE_S)
            for _ in range(3):
                client.sendto(bytes(size * 100), it.address)
                _, address = upstream.recvfrom(1000)
                upstream.sendto(bytes(size * 10), address)
                client.recv(1000)
        expected = {"bytes_c2u": 3000, "bytes_u2c": 300, "sessions": 5, "sessions_total": 5}
        eventually(lambda: expected.items() <= it.rule().items(), lambda: str(it.rule()))
        ids = [str(entry["id"]) for entry in listed(it)]
        assert it.ask("kill", ids=ids[:2])["killed"] == 2
        assert it.ends() == {"us/kill": 2}
        assert {str(entry["id"]) for entry in listed(it)} == set(ids[2:])


def test_the_queue_of_workers_that_do_not_accept_is_told(logged: Logging) -> None:
    """One worker, stopped; the kernel holds 4,096 clients for it, or as many as it may."""
    it = logged("", workers=1)
    (pid,) = it.forwarder.workers()
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: state(pid) == "T")
    queue = it.rule()["queue"]
    assert isinstance(queue, dict)
    limit = int(queue["limit"])
    assert (queue["waiting"], queue["dropped"]) == (0, 0)
    with contextlib.ExitStack() as stack:

        def has_dropped() -> bool:
            for _ in range(limit + 1):
                sock = stack.enter_context(socket.socket())
                sock.setblocking(False)
                sock.connect_ex(it.address)
            found = it.rule()["queue"]
            return isinstance(found, dict) and int(found["dropped"]) > 0

        assert limit <= 4096
        eventually(has_dropped)
        full = it.rule()["queue"]
        assert isinstance(full, dict)
        assert int(full["waiting"]) >= limit
    it.forwarder.kill()


def test_the_status_of_ten_thousand_rules_fits(logged: Logging) -> None:
    it = logged("", workers=1)
    text = it.config.read_text()
    many = "".join(
        f'[[forwarding_rules]]\nlisten = "{own_host(250)}:{12_000 + i}"\nupstream = "127.0.0.1:1"\n'
        for i in range(9_999)
    )
    assert it.reload(text + many)["ok"] is True
    rules = it.ask("status")["rules"]
    assert isinstance(rules, list)
    assert len(rules) == 10_000
    it.visit(1)
    assert it.ends() == {"client/data": 1}
    assert it.reload(text)["ok"] is True


# -- listing and killing


def test_filters_and_ids_and_what_is_told_of_a_session(logged: Logging, tmp_path: Path) -> None:
    it = logged("", workers=3)
    at = f"unix:{tmp_path}/listen.sock"
    add_rule(
        it, f'name = "unix"\nlisten = "{at}"\nupstream = "{":".join(map(str, name(it.upstream)))}"'
    )
    links = [it.link() for _ in range(3)]
    carry(links[0].client, links[0].upstream, b"x" * 77)
    with contextlib.ExitStack() as stack:
        for link in links:
            stack.callback(link.close)
        unix = [stack.enter_context(connect(f"{tmp_path}/listen.sock")) for _ in range(2)]
        unix.append(stack.enter_context(socket.socket(socket.AF_UNIX)))
        unix[2].bind(f"\0{tmp_path}/client")  # a client with a name, which is none of ours
        unix[2].connect(f"{tmp_path}/listen.sock")
        for _ in unix:
            stack.enter_context(accept(it.upstream))
        eventually(lambda: len(listed(it)) == 6)
        assert {str(s["client"]) for s in listed(it, rule="unix")} == {"unix"}
        (first,) = [s for s in listed(it, client="127.*") if s["bytes_c2u"]]
        assert first["client"] == "{}:{}".format(*links[0].client.getsockname())
        assert (first["bytes_c2u"], first["bytes_u2c"], first["state"]) == (77, 0, "relaying")
        assert len(listed(it, client="127.0.0.0/8")) == 3
        assert listed(it, client="10.0.0.1") == []
        assert listed(it, rule="no such") == []
        assert len(listed(it, limit=4)) == 4
        done = run(it, "sessions", "--rule", "unix", "--limit", "2", "--json")
        assert (done.returncode, len(done.stdout.splitlines())) == (0, 2)
        assert "only 2 are shown" in done.stderr
        assert json.loads(done.stdout.splitlines()[0])["rule"] == "unix"
        table = run(it, "sessions").stdout.splitlines()
        assert (len(table), table[0].split()[:3]) == (7, ["id", "rule", "client"])
        done = run(it, "kill", str(first["id"]), "999999.1", "nonsense")
        assert (done.returncode, done.stdout) == (1, "1 ended\n")
        assert done.stderr.startswith("forwarder: no open session is called 999999.1, nonsense; ")
        receive_to_reset(links[0].client)
        assert run(it, "kill", "--rule", "unix", "--client", "127.0.0.1").stdout == "0 ended\n"
        assert run(it, "kill", "--rule", "unix", "--yes").stdout == "3 ended\n"
        assert len(listed(it)) == 2
    assert run(it, "kill").returncode == 2


def name(sock: socket.socket) -> tuple[str, int]:
    host, port = sock.getsockname()
    return host, port


def test_thousands_of_sessions_are_listed_and_killed_by_their_ids(logged: Logging) -> None:
    it = logged("", workers=3)
    count = 3000
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            stack.callback(it.link().close)
        eventually(lambda: it.rule()["sessions"] == count)
        assert len(listed(it, limit=10_000)) == count
        done = run(it, "sessions", "--json", "--limit", "10000")
        ids = [str(json.loads(line)["id"]) for line in done.stdout.splitlines()]
        assert len(set(ids)) == count
        refused = it.ask("kill", ids=ids)
        assert (refused["ok"], "bytes" in str(refused["error"])) == (False, True)
        done = run(it, "kill", *ids[:2500])
        assert (done.returncode, done.stdout, done.stderr) == (0, "2500 ended\n", "")
        eventually(lambda: it.ends() == {"us/kill": 2500})
        assert run(it, "kill", "--client", "127.0.0.1").stdout == "500 ended\n"


def test_a_worker_that_is_stopped_is_named_and_the_others_answer(logged: Logging) -> None:
    # It must not be taken for hung before the last question.
    it = logged("", top='hang_timeout = "5m"', workers=3)
    links = [it.link() for _ in range(60)]
    eventually(lambda: it.rule()["sessions"] == 60)
    stopped = it.forwarder.workers()[1]
    mine = [s for s in listed(it) if str(s["id"]).startswith(f"{stopped}.")]
    os.kill(stopped, signal.SIGSTOP)
    eventually(lambda: state(stopped) == "T")
    answer = it.ask("sessions")
    assert answer["silent"] == [stopped]
    sessions = answer["sessions"]
    assert isinstance(sessions, list)
    assert len(sessions) == 60 - len(mine)
    done = run(it, "kill", "--rule", "one", "--yes")
    assert done.stdout == f"{60 - len(mine)} ended\n"
    assert str(stopped) in done.stderr
    os.kill(stopped, signal.SIGCONT)
    eventually(lambda: it.rule()["sessions"] == 0)  # it does as it was told, late
    for link in links:
        link.close()


def test_workers_without_descriptors_are_asked_and_live(logged: Logging) -> None:
    """At their limit of descriptors, with more to tell than fits into a message."""
    it = logged("", workers=1, prefix=["prlimit", "--nofile=260", "--"])
    (pid,) = it.forwarder.workers()
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.callback(it.link().close)
        clogged = stack.enter_context(CloggedUpstream())
        at = stack.enter_context(reserve_port()).getsockname()
        add_rule(
            it,
            'name = "stuck"\nlisten = "{}:{}"\nupstream = "{}:{}"'.format(
                *at, *clogged.listener.getsockname()
            ),
        )
        for _ in range(60):
            stack.enter_context(connect(at))
        it.forwarder.wait_logged("accept.paused")
        answer = it.ask("sessions")
        assert answer["ok"] is True
        assert (answer["sessions"], answer["silent"]) == ([], [pid]) or answer["silent"] == []
        # What has read the configuration is a child as well, and may be there for a moment.
        eventually(lambda: it.forwarder.workers() == [pid])
    eventually(lambda: it.rule()["sessions"] == 0)
    it.visit(1)


# -- access rules that change


def test_cut_denied_ends_what_is_not_allowed_any_more_and_nothing_else(
    logged: Logging, tmp_path: Path
) -> None:
    """TCP from two clients, one of them by IPv6 as well, UDP, both ways between them, unix."""
    with contextlib.ExitStack() as stack:
        udp = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        udp.bind(("127.0.0.1", 0))
        udp.settimeout(PATIENCE_S)
        echo = stack.enter_context(listen())
        holders = [stack.enter_context(reserve_port()) for _ in range(2)]
        ports = [holder.getsockname()[1] for holder in holders]
        # Nobody else has it; below the ports that the kernel gives to UDP sockets.
        own = own_host(1)
        it = logged("", top="cut_denied = true", workers=2)
        to_udp, to_tcp = ("{}:{}".format(*sock.getsockname()) for sock in (udp, echo))
        for kind, listens, upstream in (
            ("udp", f"{own}:5001", to_udp),
            ("udptotcp", f"{own}:5002", to_tcp),
            ("tcptoudp", f"127.0.0.1:{ports[0]}", to_udp),
            ("tcp", f"*:{ports[1]}", to_tcp),
            ("tcp", f"unix:{tmp_path}/s", to_tcp),
        ):
            rule = f'name = "{kind} {listens}"\nlisten = "{listens}"\n'
            add_rule(it, f'{rule}upstream = "{upstream}"\nprotocol = "{kind}"')
        bad, good = it.link(), stack.enter_context(socket.socket())
        stack.callback(bad.close)
        good.settimeout(PATIENCE_S)
        good.bind(("127.0.0.2", 0))
        good.connect(it.address)
        good_far = stack.enter_context(accept(it.upstream))
        for port in (5001, 5002):
            flow = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
            flow.bind(("127.0.0.1", 0))
            flow.sendto(b"x", (own, port))
        stack.enter_context(accept(echo))
        bridge = stack.enter_context(connect(("127.0.0.1", ports[0])))
        mapped = stack.enter_context(connect(("127.0.0.1", ports[1])))
        stack.enter_context(accept(echo))
        unix = stack.enter_context(connect(f"{tmp_path}/s"))
        stack.enter_context(accept(echo))
        eventually(lambda: len(listed(it)) == 7)
        denied = '[[global_rules]]\ntype = "deny"\npattern = "127.0.0.1"\n'
        assert it.reload(it.config.read_text() + denied)["ok"] is True
        for client in (bad.client, bridge, mapped):
            receive_to_reset(client)
        carry(good, good_far, b"still here")
        assert {str(s["client"]).split(":")[0] for s in listed(it)} == {"127.0.0.2", "unix"}
        for index, ends in enumerate(it.ends(index) for index in range(6)):
            assert ends == ({} if index == 5 else {"us/access": 1})
        unix.shutdown(socket.SHUT_WR)


def test_without_cut_denied_open_sessions_stay(logged: Logging) -> None:
    it = logged("")
    link = it.link()
    denied = '[[global_rules]]\ntype = "deny"\npattern = "127.0.0.1"\n'
    assert it.reload(it.config.read_text() + denied)["ok"] is True
    carry(link.client, link.upstream, b"still here")
    assert it.reload(f"cut_denied = true\n{it.config.read_text()}")["ok"] is True
    receive_to_reset(link.client)
    link.close()


def test_cut_denied_judges_sessions_of_a_rule_that_has_gone(logged: Logging) -> None:
    """By the rule's own access rules, and by the global ones of now."""
    it = logged("", top="cut_denied = true")
    link = it.link()
    with reserve_port() as holder:
        moved = it.config.read_text().replace(
            f'name = "one"\nlisten = "127.0.0.1:{it.address[1]}"',
            'name = "two"\nlisten = "{}:{}"'.format(*holder.getsockname()),
        )
        assert it.reload(moved)["ok"] is True
        carry(link.client, link.upstream, b"still here")
        denied = '[[global_rules]]\ntype = "deny"\npattern = "127.0.0.1"\n'
        assert it.reload(moved + denied)["ok"] is True
        receive_to_reset(link.client)
    link.close()


def test_a_client_that_ends_in_order_is_not_reset(logged: Logging) -> None:
    it = logged("", top="cut_denied = true")
    link = it.link()
    link.client.shutdown(socket.SHUT_WR)
    receive_to_end(link.upstream)
    assert it.reload(it.config.read_text() + '[[global_rules]]\ntype="allow"\npattern="127.*"')[
        "ok"
    ]
    carry(link.upstream, link.client, b"answer")
    link.close()
