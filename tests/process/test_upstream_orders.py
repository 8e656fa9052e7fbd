"""`forwarder upstream`: what operators order of servers holds, whatever happens to the instance."""

from __future__ import annotations

import json
import os
import pwd
import re
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.control import ask
from support.datagrams import udp
from support.echo import Echo
from support.grouped import Grouped, kill
from support.leases import kept_from_readers
from support.processes import COMMAND, members, suspend
from support.waiting import PATIENCE_S, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from process.conftest import Launch

pytestmark = pytest.mark.process


@pytest.fixture
def it(launch: Launch, tmp_path: Path) -> Iterator[Grouped]:
    with ExitStack() as stack:
        yield Grouped(launch, tmp_path, stack)


class Load:
    """Clients that come one after the other, in a thread, and note which server each one got."""

    def __init__(self, it: Grouped) -> None:
        self.seen: list[str] = []
        self._it = it
        self._is_over = False
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._is_over:
            client = self._it.session()
            client.sock.close()
            self.seen.append(client.server)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self._thread.join(PATIENCE_S)

    def wait_for(self, count: int) -> list[str]:
        """Wait for so many clients that come from now on, without the one under way."""
        start = len(self.seen) + 1
        eventually(lambda: len(self.seen) >= start + count, lambda: len(self.seen))
        return self.seen[start:]


# -- what orders do


def test_a_drained_server_gets_no_new_session_and_keeps_those_it_has(it: Grouped) -> None:
    it.start()
    drained, *others = it.servers
    old = it.sessions_at(drained, 3)
    with Load(it) as load:
        load.wait_for(30)
        said = it.order("drain", "pg", drained)
        assert said == f"pg {drained}: drained, {said.split()[3]} sessions\n"
        assert set(load.wait_for(60)) == {*others}
    assert [client.ask() for client in old] == [drained] * 3
    assert it.described()[drained]["sessions"] == 3
    (line,) = it.logged("upstream.drain")
    assert f"group=pg server={drained} reset=no by=" in line
    it.order("enable", "pg", drained)
    assert it.seen(12) == {*it.servers}
    assert len(it.logged("upstream.enable")) == 1


@pytest.mark.parametrize("what", ["drain", "disable"])
def test_reset_cuts_the_sessions_of_that_server_alone(it: Grouped, what: str) -> None:
    it.start()
    cut, kept, _ = it.servers
    gone, stays = it.sessions_at(cut, 4), it.sessions_at(kept, 4)
    assert it.order(what, "pg", cut, "--reset", "--wait").startswith(f"pg {cut}: {what}")
    eventually(lambda: all(client.is_cut() for client in gone))
    assert [client.ask() for client in stays] == [kept] * 4
    ends = it.order("list", "pg")
    assert "with reset by" in ends


def test_wait_returns_when_the_last_session_has_ended(it: Grouped) -> None:
    it.start()
    server = it.servers[0]
    clients = it.sessions_at(server, 2)
    words = ["upstream", "drain", "pg", server, "--wait", "--control", str(it.control)]
    waiting = subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, text=True)
    try:
        eventually(lambda: it.described()[server]["order"] is not None)
        clients[0].sock.close()
        eventually(lambda: it.described()[server]["sessions"] == 1)
        assert waiting.poll() is None
        clients[1].sock.close()
        assert waiting.wait(PATIENCE_S) == 0
    finally:
        waiting.kill()
        waiting.communicate()


def test_wait_gives_up_after_its_time_and_the_order_stays(it: Grouped) -> None:
    it.start()
    server = it.servers[0]
    clients = it.sessions_at(server, 1)
    done = it.run("upstream", "drain", "pg", server, "--wait", "--timeout", "0.2")
    assert done.returncode == 1
    assert done.stderr == ("forwarder: after 0.2 s there is still 1 session; the order stays\n")
    assert it.seen(8) == {*it.servers[1:]}
    assert clients[0].ask() == server


def test_a_weight_changes_the_part_that_a_server_gets(it: Grouped) -> None:
    it.start(head="")
    first, second, third = it.servers
    assert it.order("weight", "pg", first, second, "0").splitlines() == [
        f"pg {first}: weight 0, 0 sessions",
        f"pg {second}: weight 0, 0 sessions",
    ]
    assert it.seen(8) == {third}
    it.order("weight", "pg", second, "256")
    assert [it.described()[one]["weight_now"] for one in it.servers] == [0, 256, 1]
    assert second in it.seen(4)
    it.order("enable", "pg", first, second)
    assert it.seen(12) == {*it.servers}


def test_orders_take_turns_as_they_are_documented(it: Grouped) -> None:
    it.start()
    server = it.servers[0]
    it.order("weight", "pg", server, "7")
    it.order("drain", "pg", server, "--reset")
    it.order("weight", "pg", server, "5")
    order = it.described()[server]["order"]
    assert isinstance(order, dict)
    assert (order["what"], order["reset"], order["weight"]) == ("drain", True, 5)
    it.order("disable", "pg", server)
    order = it.described()[server]["order"]
    assert isinstance(order, dict)
    assert (order["what"], order["reset"], order["weight"]) == ("disable", False, 5)
    assert it.order("disable", "pg", server).startswith(f"pg {server}: already disabled, weight 5")
    it.order("enable", "pg", server)
    assert it.described()[server]["order"] is None
    assert it.order("enable", "pg", server).startswith(f"pg {server}: already as configured")
    said = [line.partition("upstream.")[2].split()[0] for line in it.logged(r"upstream\.")]
    assert said == ["weight", "drain", "weight", "disable", "enable"]


def test_a_disabled_server_is_not_checked(it: Grouped) -> None:
    it.start(more='check = { kind = "tcp", every = "100ms", fast = "100ms" }')
    server, other, _ = it.servers

    def checks(name: str) -> int:
        count = it.described()[name]["checks_passed"]
        assert isinstance(count, int)
        return count

    eventually(lambda: checks(server) > 0)
    it.order("disable", "pg", server)
    # What was under way then ends; after that there are none.
    seen = [checks(other)]
    eventually(lambda: checks(other) >= seen[0] + 5)
    ended, seen = checks(server), [checks(other)]
    eventually(lambda: checks(other) >= seen[0] + 5)
    assert checks(server) == ended
    it.order("enable", "pg", server)
    eventually(lambda: checks(server) > ended)


def test_a_group_without_a_server_that_may_be_used_is_said_to_be_that(it: Grouped) -> None:
    it.start()
    done = it.run("upstream", "drain", "pg", *it.servers)
    assert done.returncode == 0
    assert done.stderr == "no server of the group pg gets new sessions now\n"
    with pytest.raises((ConnectionError, AssertionError)):
        assert it.session().server in it.servers
    it.order("enable", "pg", *it.servers)
    assert it.session().server in it.servers


# -- what orders survive


def test_orders_survive_reloads_with_sessions_in_between(it: Grouped) -> None:
    it.start()
    drained, weighed, _ = it.servers
    it.order("drain", "pg", drained)
    it.order("weight", "pg", weighed, "3")
    before = {name: one["order"] for name, one in it.described().items()}
    with Load(it) as load:
        load.wait_for(1)
        first = len(load.seen)
        for number in range(20):
            it.reload(it.text(more=f'balance = "{("turn", "least")[number % 2]}"'))
        assert drained not in load.seen[first:]
    assert {name: one["order"] for name, one in it.described().items()} == before
    assert drained not in it.seen(12)


def test_an_order_outlives_its_server_and_holds_when_that_comes_back(it: Grouped) -> None:
    it.start()
    gone, *others = it.servers
    it.order("drain", "pg", gone)
    for _ in range(3):  # a seat is given up after a whole reload
        it.reload(it.text(servers=others))
    assert it.described()[gone]["state"] == "absent"
    done = it.run("upstream", "weight", "pg", gone, "3")
    assert done.returncode == 1
    assert f"{gone} is no server of the group 'pg' any more" in done.stderr
    it.reload(it.text())
    assert gone not in it.seen(12)
    it.reload(it.text(servers=others))
    it.order("enable", "pg", gone)
    assert gone not in it.described()
    it.reload(it.text())
    assert it.seen(12) == {*it.servers}


@pytest.mark.usefixtures("keeping")
def test_orders_survive_an_upgrade_and_reach_old_sessions(it: Grouped) -> None:
    it.start()
    drained, cut, _ = it.servers
    old = it.sessions_at(cut, 2)
    it.order("drain", "pg", drained)
    before = it.described()[drained]["order"]
    it.upgrade()
    assert it.described()[drained]["order"] == before
    assert drained not in it.seen(12)
    # Sessions of the old instance are waited for, and cut.
    done = it.run("upstream", "drain", "pg", cut, "--wait", "--timeout", "0")
    assert done.returncode == 1
    assert "there are still sessions in an instance that drains" in done.stderr
    it.order("drain", "pg", cut, "--reset", "--wait")
    eventually(lambda: all(client.is_cut() for client in old))
    it.upgrade()
    assert it.seen(8) == {it.servers[2]}
    it.stop()


def test_orders_survive_the_death_of_a_worker_and_of_the_checker(it: Grouped) -> None:
    forwarder = it.start(more='check = "tcp"')
    drained = it.servers[0]
    it.order("drain", "pg", drained)
    for find in (forwarder.workers, forwarder.helpers):
        eventually(lambda: bool(find()))  # noqa: B023 - called at once
        for pid in find():
            kill(pid)
            eventually(lambda: pid not in members(forwarder.pid))  # noqa: B023
        eventually(lambda: len(forwarder.workers()) == 2)
        assert drained not in it.seen(12)
    assert it.described()[drained]["order"] is not None


def test_orders_of_two_operators_at_once_are_one_after_the_other(it: Grouped) -> None:
    it.start()
    one, other, shared = it.servers
    answers: dict[str, list[bool]] = {one: [], other: []}

    def operate(own: str, last: str) -> None:
        for number in range(50):
            what = ("drain", "enable")[number % 2]
            for server in (own, shared):
                asked = ask(it.control, "upstream", what=what, group="pg", servers=[server])
                answers[own].append(asked["ok"] is True)
        ask(it.control, "upstream", what=last, group="pg", servers=[own])

    threads = [
        threading.Thread(target=operate, args=(one, "drain")),
        threading.Thread(target=operate, args=(other, "disable")),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE_S)
    assert answers == {one: [True] * 100, other: [True] * 100}
    orders = {name: server["order"] for name, server in it.described().items()}
    ordered = [one["what"] for one in orders.values() if isinstance(one, dict)]
    assert ordered[:2] == ["drain", "disable"]
    # Each line is a change: of the server that both order about, drain and enable take turns.
    said = [line.partition("upstream.")[2].split()[0] for line in it.logged(f"server={shared} ")]
    assert said
    assert all(before != after for before, after in pairwise(said))


def test_orders_are_refused_while_an_upgrade_is_under_way(it: Grouped) -> None:
    """The successor has those of before, and would not hear of them."""
    forwarder = it.start()
    it.order("drain", "pg", it.servers[0])
    with kept_from_readers(it.config):
        forwarder.signal(signal.SIGUSR2)
        forwarder.wait_logged("upgrade: started")
        (line,) = it.logged("upgrade: started")
        successor = int(line.rpartition("=")[2])
        suspend(successor)
    done = it.run("upstream", "enable", "pg", it.servers[0])
    assert done.returncode == 1
    assert "an upgrade is under way; ask the new one when it serves" in done.stderr
    os.kill(successor, signal.SIGCONT)
    forwarder.wait_logged(f"pid={successor} serves")
    assert it.servers[0] not in it.seen(8)
    it.order("enable", "pg", it.servers[0])
    assert it.seen(12) == {*it.servers}
    it.stop()


def test_flows_stay_with_a_drained_server_and_leave_one_whose_sessions_are_reset(
    it: Grouped,
) -> None:
    """With the next datagram of the client, to which that is no reset."""
    with Echo(udp=[("127.0.0.1", 0)] * 2) as echo, udp() as client:
        servers = ["{}:{}".format(*address) for address in echo.udp]
        it.start_udp(servers)
        client.connect(it.address)

        def asked() -> str:
            """The server that has our flow; datagrams may get lost."""
            found: list[str] = []

            def has_answer() -> bool:
                with suppress(TimeoutError, ConnectionError):
                    client.send(b"hello")
                    found.append(client.recv(1000).decode().partition(" ")[0])
                return bool(found)

            client.settimeout(0.5)
            eventually(has_answer)
            return found[0]

        first = asked()
        it.order("drain", "pg", first)
        assert asked() == first
        assert it.described()[first]["sessions"] == 1
        it.order("drain", "pg", first, "--reset")
        eventually(lambda: asked() != first)
        assert asked() != first
        it.order("drain", "pg", first, "--reset", "--wait")
        assert it.described()[first]["sessions"] == 0


# -- over a restart


def test_a_state_file_keeps_orders_over_a_restart(it: Grouped) -> None:
    head = f'state_file = "{it.state}"'
    it.start(head=head)
    drained, weighed, _ = it.servers
    it.order("drain", "pg", drained)
    it.order("weight", "pg", weighed, "9")
    before = {name: one["order"] for name, one in it.described().items()}
    assert it.state.stat().st_mode & 0o777 == 0o600
    it.stop()
    it.start(head=head)
    assert {name: one["order"] for name, one in it.described().items()} == before
    assert drained not in it.seen(12)
    it.order("enable", "pg", drained, weighed)
    assert json.loads(it.state.read_text())["orders"] == []
    # Killed at once: what was answered is on the disk.
    it.order("disable", "pg", drained)
    kill(it.forwarder.pid)
    it.stop()
    it.start(head=head)
    assert drained not in it.seen(12)


def test_without_a_state_file_a_restart_forgets(it: Grouped) -> None:
    it.start()
    it.order("drain", "pg", it.servers[0])
    it.stop()
    it.start()
    assert it.described()[it.servers[0]]["order"] is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"version": 1,\n"orders": [}', "line 2, column 12: Expecting value"),
        ('{"version": 1, "orders": [{"group": "pg"}]}', "orders[0].server: not a text"),
        ("\0" * 1000, "line 1, column 1: Expecting value"),
    ],
)
def test_a_state_file_with_nonsense_is_refused_with_its_place(
    it: Grouped, text: str, why: str
) -> None:
    it.state.write_text(text)
    it.start(head=f'state_file = "{it.state}"')
    (line,) = it.logged("state.failed")
    assert f"{it.state}: {why}" in line
    assert it.seen(12) == {*it.servers}
    assert it.state.read_text() == text  # until there is something to keep
    it.order("drain", "pg", it.servers[0])
    assert len(json.loads(it.state.read_text())["orders"]) == 1


def test_a_state_file_that_cannot_be_written_costs_a_warning(it: Grouped, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    it.start(head=f'state_file = "{tmp_path}/file/state"')
    server = it.servers[0]
    for what in ("drain", "disable"):
        done = it.run("upstream", what, "pg", server)
        assert done.returncode == 0
        assert f"in force, but not kept for a restart: cannot write {tmp_path}" in done.stderr
    assert server not in it.seen(12)
    assert len(it.logged("state.failed cannot write")) == 1
    assert len(it.logged("state.failed orders will not be kept")) == 1
    # Another place, by a reload, gets all of it.
    it.reload(it.text(head=f'state_file = "{it.state}"'))
    eventually(it.state.exists)
    assert len(json.loads(it.state.read_text())["orders"]) == 1
    done = it.run("upstream", "drain", "pg", it.servers[1])
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
def test_a_full_disk_leaves_the_old_state_file_as_it_is(it: Grouped, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    # Two pages: one for the file, one for the next.
    script = f'mount -t tmpfs -o size=8k none {disk} && exec "$@"'
    prefix = ["unshare", "--mount", "sh", "-c", script, "sh"]
    forwarder = it.start(head=f'state_file = "{disk}/state"', prefix=prefix)
    seen = Path(f"/proc/{forwarder.pid}/root{disk}")  # as it is there
    it.order("drain", "pg", it.servers[0])
    before = (seen / "state").read_bytes()
    (seen / "filler").write_bytes(bytes(4096))
    done = it.run("upstream", "drain", "pg", it.servers[1])
    assert done.returncode == 0
    assert "not kept for a restart" in done.stderr
    assert "No space left on device" in done.stderr
    assert (seen / "state").read_bytes() == before
    assert sorted(path.name for path in seen.iterdir()) == ["filler", "state"]
    assert it.seen(8) == {it.servers[2]}
    (seen / "filler").unlink()
    done = it.run("upstream", "disable", "pg", it.servers[1])
    assert (done.returncode, done.stderr) == (0, "")
    assert len(json.loads((seen / "state").read_text())["orders"]) == 2
    forwarder.wait_logged("state.written")


def test_a_successor_goes_on_with_the_state_file(it: Grouped) -> None:
    head = f'state_file = "{it.state}"'
    it.start(head=head)
    it.order("drain", "pg", it.servers[0])
    it.upgrade()
    it.order("drain", "pg", it.servers[1])
    assert len(json.loads(it.state.read_text())["orders"]) == 2
    it.stop()
    assert len(json.loads(it.state.read_text())["orders"]) == 2


# -- what operators see


def test_a_group_or_server_that_is_not_there_is_an_error_that_helps(it: Grouped) -> None:
    it.start()
    first, *_ = it.servers
    for words, why in (
        (("drain", "pq", first), "there is no group 'pq'; hint: there are: pg"),
        (("drain", "pgg", first), "there is no group 'pgg'; hint: did you mean 'pg'?"),
        (("list", "zzz"), "there is no group 'zzz'; hint: there are: pg"),
        (("drain", "pg", "127.0.0.1"), "'127.0.0.1' may be " + ", ".join(it.servers)),
        (("drain", "pg", "zzz"), "the group 'pg' has no server 'zzz'; hint: there are: "),
        (("drain", "pg", first + "9"), f"hint: did you mean {first}?"),
        (("drain", "pg", first, "zzz"), "the group 'pg' has no server 'zzz'"),
    ):
        done = it.run("upstream", *words)
        assert (done.returncode, done.stdout) == (1, ""), words
        assert why in done.stderr
    assert all(one["order"] is None for one in it.described().values())
    assert it.run("upstream", "weight", "pg", first, "257").returncode == 2
    assert it.run("upstream", "drain", "pg").returncode == 2
    # A part that only one has is enough.
    port = first.partition(":")[2]
    assert it.order("drain", "pg", port).startswith(f"pg {first}: drained")
    it.stop()
    assert it.run("upstream", "drain", "pg", first).returncode == 69


def test_the_list_and_the_status_show_orders_with_who_and_when(it: Grouped) -> None:
    it.start()
    server = it.servers[0]
    it.sessions_at(server, 2)
    it.order("drain", "pg", server)
    text, status = it.order("list"), it.run("status").stdout
    title, line, *_ = text.splitlines()
    assert title.split() == [
        *("group", "server", "state", "weight", "sessions", "total", "failed", "why")
    ]
    assert re.match(rf"pg +{server} +up( +\d+s)? +0 of 1 +2 +2 +0 +drained by \S+ \d+s ago$", line)
    assert f"{server}  up" in status
    shown = json.loads(it.order("list", "pg", "--json"))["groups"]
    assert [one["name"] for one in shown] == ["pg"]
    (group,) = json.loads(it.run("status", "--json").stdout)["groups"]
    assert group["name"] == "pg"
    assert group["servers"][0]["order"] == shown[0]["servers"][0]["order"]


def test_who_has_ordered_something_is_the_user_and_his_login(it: Grouped) -> None:
    it.start()
    own = pwd.getpwuid(os.geteuid()).pw_name
    for login, by in ((own, own), (None, own), ("alice", f"{own}(alice)")):
        for what in ("enable", "drain"):
            one: dict[str, object] = {"what": what, "group": "pg", "servers": [it.servers[0]]}
            assert ask(it.control, "upstream", login=login, **one)["ok"] is True
        order = it.described()[it.servers[0]]["order"]
        assert isinstance(order, dict)
        assert order["by"] == by
    assert len(it.logged(rf"upstream.drain .* by={own} ")) == 2
    assert len(it.logged(rf"upstream.drain .* by={own}\(alice\) ")) == 1


def test_sessions_are_listed_and_killed_by_server(it: Grouped) -> None:
    it.start()
    one, other, _ = it.servers
    ours, theirs = it.sessions_at(one, 3), it.sessions_at(other, 2)
    eventually(lambda: it.described()[one]["sessions"] == 3)
    listed = it.run("sessions", "--server", one).stdout.splitlines()
    assert len(listed) == 4
    assert all(line.split()[4:6] == ["pg", one] for line in listed[1:])
    in_group = it.run("sessions", "--group", "pg", "--json").stdout.splitlines()
    found = [json.loads(line) for line in in_group]
    assert {session["group"] for session in found} == {"pg"}
    assert sum(session["server"] == one for session in found) == 3
    done = it.run("sessions", "--server", "zzz")
    assert "no server is called 'zzz'; hint: there are: " in done.stderr
    assert it.run("kill", "--server", one, "--group", "pgg", "--yes").returncode == 1
    done = it.run("kill", "--server", one, "--yes")
    assert done.stdout == "3 ended\n"
    eventually(lambda: all(client.is_cut() for client in ours))
    assert [client.ask() for client in theirs] == [other] * 2


def completed(*words: str) -> list[str]:
    """What click offers to bash for the last of these words."""
    line = {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(
        [sys.executable, "-m", "forwarder"],
        env={**os.environ, **line, "_FORWARDER_COMPLETE": "bash_complete"},
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * PATIENCE_S,
    )
    return [line.partition(",")[2] for line in done.stdout.splitlines() if line]


def test_groups_and_servers_are_completed(it: Grouped) -> None:
    it.start()
    command = ("forwarder", "--control", str(it.control), "upstream", "drain")
    assert completed(*command, "p") == ["pg"]
    assert completed(*command, "pg", "127.0") == it.servers
    assert completed(*command, "pg", it.servers[0], "127.0") == it.servers[1:]
    # bash splits at colons, and wants what follows the last.
    ports = [server.partition(":")[2] for server in it.servers]
    assert completed(*command, "pg", "127.0.0.1", ":", ports[0][:-1]) == [ports[0]]
    assert completed("forwarder", "upstream", "drain", "--control", "/nowhere", "p") == []
    listing = ("forwarder", "sessions", "--control", str(it.control))
    assert completed(*listing, "--server", "127") == it.servers
    assert completed(*listing, "--group", "") == ["pg"]
