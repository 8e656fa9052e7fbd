"""Servers that are checked: what the checker finds out, and that nobody needs it to be alive."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest
from support.configured import Configured
from support.control import ask
from support.ends import written
from support.forwarder import reserve_port
from support.processes import state
from support.servers import ASKING, Server, who
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import ExitStack
    from pathlib import Path

    from process.conftest import Launch

pytestmark = pytest.mark.process

QUICK = f'{ASKING}, every = "200ms", fast = "100ms", timeout = "10s"'


class Site:
    """A forwarder whose rules lead to one group of servers."""

    def __init__(self, launch: Launch, directory: Path, stack: ExitStack) -> None:
        self._launch = launch
        self._path = directory / "forwarder.toml"
        self._stack = stack
        self.servers = [stack.enter_context(Server(name)) for name in ("first", "second", "third")]
        self.addresses: list[tuple[str, int]] = []
        self.of_rules = ""  # more TOML of each rule
        self.it: Configured

    def text(self, group: str, top: str = "") -> str:
        servers = ", ".join(f'"{server.written}"' for server in self.servers)
        rules = "".join(
            f'[[forwarding_rules]]\nlisten = "{written(at)}"\nupstream = "group:g"\n'
            + f"{self.of_rules}\n"
            for at in self.addresses
        )
        control = f'control = "{self._path}.sock"\n'
        return f'{control}{top}[[groups]]\nname = "g"\nservers = [{servers}]\n{group}\n{rules}'

    def start(self, group: str, *, workers: int = 2, rules: int = 1, top: str = "") -> None:
        for _ in range(rules):
            self.addresses.append(self._stack.enter_context(reserve_port()).getsockname())
        self._path.write_text(self.text(group, f"workers = {workers}\n{top}"))
        self.it = Configured(self._launch("-c", str(self._path)), self._path)

    def reload(self, group: str, *, workers: int = 2, top: str = "") -> str:
        return self.it.reload(self.text(group, f"workers = {workers}\n{top}"))

    def wait(self, what: str, server: Server, more: str = "") -> str:
        """Wait for a line about a server, which is returned."""
        pattern = rf"upstream\.{what} group=g server={re.escape(server.written)}.*{more}"
        self.it.forwarder.wait_logged(pattern)
        return [line for line in self.it.forwarder.lines if re.search(pattern, line)][-1]

    def count(self, what: str) -> int:
        """How many lines there are of something."""
        return sum(f"upstream.{what} " in line for line in self.it.forwarder.lines)

    def uses(self) -> list[tuple[object, object]]:
        """What the status says of each server: whether it is used, and at what weight."""
        groups = ask(f"{self._path}.sock", "upstreams")["groups"]
        assert isinstance(groups, list)
        return [(one["is_used"], one["weight_now"]) for one in groups[0]["servers"]]

    def helper(self) -> int:
        """The checker."""
        eventually(lambda: len(self.it.forwarder.helpers()) == 1)
        return self.it.forwarder.helpers()[0]

    def seen(self, sessions: int = 12) -> set[str]:
        """Which servers new sessions get to."""
        return {who(self.addresses[0]) for _ in range(sessions)}


@pytest.fixture
def site(launch: Launch, tmp_path: Path, stack: ExitStack) -> Iterator[Site]:
    it = Site(launch, tmp_path, stack)
    yield it
    if hasattr(it, "it"):
        it.it.forwarder.stop()


ALL = {"first", "second", "third"}


def test_a_sick_server_gets_no_sessions_until_it_is_well(site: Site) -> None:
    sick = site.servers[1]
    site.start(f"check = {{ {QUICK} }}")
    eventually(lambda: sick.checks > 0)
    assert site.seen() == ALL
    sick.is_well = False
    line = site.wait("down", sick)
    assert 'why="' in line
    assert "after=3 sessions=0 left=2" in line
    assert site.seen() == {"first", "third"}
    sick.is_well = True
    assert "after=2 sessions=0 left=3" in site.wait("up", sick)
    assert site.seen() == ALL
    assert (site.count("down"), site.count("up")) == (1, 1)
    assert (site.count("failing"), site.count("recovering")) == (1, 1)


def test_a_server_that_refuses_is_down_and_sessions_do_not_notice(site: Site) -> None:
    dead = site.servers[0]
    site.start('check = { kind = "tcp", every = "200ms", fast = "100ms" }\nfail = 0')
    assert site.seen() == ALL
    dead.go_down()
    while not site.count("down"):
        site.seen(3)  # fails if one gets no server
    assert 'why="connection refused"' in site.wait("down", dead)
    dead.come_up()
    site.wait("up", dead)
    eventually(lambda: site.seen() == ALL)  # workers avoid for a while what failed them


def test_without_any_server_all_are_used_or_none(site: Site) -> None:
    site.start(f"check = {{ {QUICK} }}")
    for server in site.servers:
        server.is_well = False
    for server in site.servers:
        site.wait("down", server)
    assert site.seen() == ALL
    assert site.uses() == [(True, 1)] * 3
    site.reload(f"check = {{ {QUICK} }}\nfail_open = false")
    eventually(lambda: _is_turned_away(site.addresses[0]))
    assert site.uses() == [(False, 0)] * 3
    site.servers[2].is_well = True
    site.wait("up", site.servers[2])
    assert site.seen() == {"third"}
    assert site.uses() == [(False, 0), (False, 0), (True, 1)]


def _is_turned_away(address: tuple[str, int]) -> bool:
    try:
        return who(address) == ""
    except ConnectionError:
        return True


# -- the cost to servers


def test_a_server_is_checked_once_in_an_interval_whoever_leads_to_it(site: Site) -> None:
    """Four workers, three rules. The checks of each server are as many as there were intervals."""
    began = time.monotonic()
    site.start(f'check = {{ {ASKING}, every = "500ms", jitter = "0%" }}', workers=4, rules=3)
    for address in site.addresses:
        assert who(address) in ALL
    eventually(lambda: all(server.checks >= 6 for server in site.servers))
    most = max(server.checks for server in site.servers)
    assert most <= (time.monotonic() - began) / 0.5 + 1


# -- without a checker


class Load:
    """Sessions one after the other, until :meth:`end`."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._is_over = threading.Event()
        self._names: list[str] = []
        self._errors: list[str] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._is_over.is_set():
            try:
                self._names.append(who(self._address))
            except OSError as err:
                self._errors.append(repr(err))

    def more(self, count: int) -> list[str]:
        """The servers of the next sessions."""
        have = len(self._names)
        eventually(lambda: len(self._names) >= have + count)
        return self._names[have : have + count]

    def end(self) -> None:
        """No session has failed."""
        self._is_over.set()
        self._thread.join()
        assert not self._errors
        assert set(self._names) <= ALL


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_nobody_needs_the_checker_and_the_next_one_goes_on(
    site: Site, number: signal.Signals
) -> None:
    """Kill or stop it under load, with a server down. Result: states stay, then are fresh again."""
    sick, other = site.servers[:2]
    sick.is_well = False
    group = f"check = {{ {QUICK} }}"
    site.start(group, top='hang_timeout = "3s"\n')
    site.wait("down", sick)
    load = Load(site.addresses[0])
    try:
        load.more(5)
        old = site.helper()
        os.kill(old, signal.SIGSTOP)
        eventually(lambda: state(old) == "T")
        other.is_well = False  # nobody notices that now
        assert set(load.more(50)) == {"second", "third"}
        if number is signal.SIGKILL:
            os.kill(old, number)
        eventually(lambda: site.it.forwarder.helpers() not in ([], [old]))
        site.it.forwarder.wait_logged("helper.died name=checker")
        site.wait("down", other)
        assert site.count("down") == 2  # the first one is no news
        load.more(5)
        assert set(load.more(50)) == {"third"}
        sick.is_well = True
        site.wait("up", sick)
    finally:
        load.end()


def test_a_reload_keeps_what_was_found_out(site: Site) -> None:
    sick = site.servers[0]
    sick.is_well = False
    group = f"check = {{ {QUICK} }}"
    site.start(group)
    site.wait("down", sick)
    for number in range(5):
        assert "~" in site.reload(f"{group}\nqueue_timeout = {number + 1}")
        assert site.seen(6) == {"second", "third"}
    assert (site.count("down"), site.count("up")) == (1, 0)
    site.reload(group.replace("PING", "PONG?"))  # which no server understands
    assert "first" not in site.seen(6)
    for server in site.servers[1:]:
        site.wait("down", server)
    site.reload("")
    for server in site.servers:
        site.wait("up", server, more="no check")
    assert site.seen() == ALL


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can set a mark for another user")
def test_a_check_has_the_mark_of_its_rule_also_as_another_user(site: Site) -> None:
    """Without the right to set it no check could be made."""
    sick = site.servers[0]
    site.of_rules = "mark = 5"
    site.start(f"check = {{ {QUICK} }}", top='user = "nobody"\n')
    eventually(lambda: all(server.checks > 0 for server in site.servers))
    sick.is_well = False
    site.wait("down", sick)
    assert site.count("unchecked") == 0


def test_a_server_that_comes_back_to_its_group_is_a_new_one(site: Site) -> None:
    sick = site.servers[0]
    sick.is_well = False
    group = f'check = {{ {QUICK}, start = "down" }}'
    site.start(group)
    site.wait("down", sick)
    servers = site.servers
    site.servers = servers[1:]
    site.reload(group)
    for _ in range(3):
        site.reload(group)
    for server in site.servers:
        site.wait("up", server)
    assert site.seen(6) == {"second", "third"}
    sick.is_well = True
    site.servers = servers
    site.reload(group)
    eventually(lambda: "first" in site.seen(3))


# -- failed connects


def test_a_server_to_which_connects_fail_is_ejected_and_comes_back(site: Site) -> None:
    dead = site.servers[0]
    site.start('eject = "1s"\nfail = 3\nfail_within = "60s"')
    assert site.seen() == ALL
    dead.go_down()
    while not site.count("ejected"):
        assert site.seen(3) <= {"second", "third"}
    line = site.wait("ejected", dead)
    assert re.search(r'why="\d+ failed connects" after=\d+ sessions=0 left=2', line)
    dead.come_up()
    site.wait("returned", dead)
    eventually(lambda: "first" in site.seen(3))


def test_a_check_decides_about_a_server_to_which_connects_fail(site: Site) -> None:
    """Its interval is an hour. Result: it is checked at once all the same, and goes down."""
    dead = site.servers[0]
    site.start(f'check = {{ {ASKING}, every = "1h", fast = "100ms" }}\nfail = 2')
    # The first checks are spread over an hour: nothing is known of any server.
    dead.go_down()
    while not site.count("down"):
        assert site.seen(3) <= {"second", "third"}
    site.wait("ejected", dead)
    site.wait("down", dead)
    assert site.servers[1].checks == 0


def test_the_last_server_of_a_group_is_never_ejected(site: Site) -> None:
    site.servers = site.servers[:2]
    for server in site.servers:
        server.go_down()
    site.start('fail = 1\neject = "5m"\nretries = 1')
    for _ in range(20):
        eventually(lambda: _is_turned_away(site.addresses[0]))
    eventually(lambda: site.count("ejected") == 1)
    site.servers[0].come_up()
    site.servers[1].come_up()
    eventually(lambda: not _is_turned_away(site.addresses[0]))
    assert site.count("ejected") == 1
