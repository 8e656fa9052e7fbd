"""What an upgrade leaves in an old instance is seen, ended, counted and waited for in the new one.

Here that is all it has, since each is another version to the next one. Under a chain, too: an
upgrade while the one before still drains.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import pytest
from support import procfs
from support.ends import receive_to_end, receive_to_reset
from support.processes import COMMAND, state
from support.upgraded import Site, assert_alive, is_running
from support.waiting import PATIENCE_S, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.ends import Link

    from process.conftest import Launch

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("keeping")]

DENIED = '[[forwarding_rules.rules]]\ntype = "deny"\npattern = "127.0.0.1"\n'


@pytest.fixture
def site(launch: Launch, tmp_path: Path) -> Iterator[Site]:
    """See :class:`Site`."""
    with ExitStack() as stack:
        yield Site(launch, tmp_path, stack)


def drains(site: Site, *masters: int) -> bool:
    """Whether the status names these as old ones, the youngest first, with a session each."""
    expected = [{"pid": pid, "sessions": 1} for pid in masters]
    return site.status()["predecessors"] == expected


def chain(site: Site, length: int, head: str = "") -> tuple[list[int], list[Link]]:
    """Upgrade again and again; each master keeps a session. The last one serves, with one too."""
    masters, links = [site.start(head=head)], [site.link()]
    for _ in range(length - 1):
        masters.append(site.upgrade())
        # The old one may take a client that comes before it drains.
        site.wait_logged(rf"\[{masters[-2]}\] INFO master.stopping how=drain")
        eventually(lambda: drains(site, *masters[-2::-1]), lambda: str(site.status()))
        eventually(lambda: all(is_draining(pid) for pid in masters[:-1]))
        links.append(site.link())
    return masters, links


def is_draining(master: int) -> bool:
    """Whether it has only the worker that has its session."""
    return len(procfs.children(master)) == 1


def trouble(site: Site) -> list[str]:
    """What was logged beside that sessions of another version stay where they are."""
    return [it for it in site.forwarder.trouble() if "the rest stays there: version" not in it]


def begin_stop(site: Site) -> subprocess.Popen[str]:
    """``forwarder stop``, which waits."""
    command = [*COMMAND, "stop", "--control", str(site.control)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def said(stop: subprocess.Popen[str]) -> str:
    """What it says when it is over."""
    text, _ = stop.communicate(timeout=2 * PATIENCE_S)
    assert stop.returncode == 0
    return text


# -- they are seen


def test_status_and_sessions_show_them(site: Site) -> None:
    (oldest, older, _), links = chain(site, 3)
    lines = site.run("status").stdout.splitlines()
    for pid in (older, oldest):
        assert f"predecessor pid {pid} drains, 1 session" in lines
    listed = [json.loads(line) for line in site.run("sessions", "--json").stdout.splitlines()]
    ports = {link.client.getsockname()[1] for link in links}
    assert {int(one["client"].rpartition(":")[2]) for one in listed} == ports
    assert len({one["id"] for one in listed}) == 3
    for link in links:
        link.close()
    eventually(lambda: site.status()["predecessors"] == [])
    site.wait_gone(oldest)
    site.wait_gone(older)
    assert trouble(site) == []
    site.stop()


def test_there_are_none_without_an_upgrade(site: Site) -> None:
    site.start()
    assert site.status()["predecessors"] == []
    site.stop()


def test_one_that_is_killed_is_missed_by_nobody(site: Site) -> None:
    """Its workers drain. Result: the new one serves, answers and stops."""
    (old, new), links = chain(site, 2)
    os.kill(old, signal.SIGKILL)
    site.wait_logged(f"the old one, pid={old}, was killed; its workers go on with 1 sessions")
    assert site.status()["predecessors"] == []
    assert site.status()["pid"] == new
    site.assert_serves()
    for link in links:
        assert_alive(link)
        link.close()
    assert site.run("stop").returncode == 0


def test_one_that_hangs_is_named_and_costs_its_own_answers_only(site: Site) -> None:
    (old, _), links = chain(site, 2)
    os.kill(old, signal.SIGSTOP)
    done = site.run("sessions", "--json")
    assert len(done.stdout.splitlines()) == 1
    assert f"no answer in time from the workers with these pids: {old}" in done.stderr
    os.kill(old, signal.SIGCONT)
    assert len(site.run("sessions", "--json").stdout.splitlines()) == 2
    for link in links:
        link.close()
    site.stop()


# -- they are ended


@pytest.mark.parametrize("way", ["id", "client", "rule"])
def test_kill_ends_their_sessions(site: Site, way: str) -> None:
    masters, links = chain(site, 3)
    listed = [json.loads(line) for line in site.run("sessions", "--json").stdout.splitlines()]
    chosen = {
        "id": [one["id"] for one in listed],
        "client": ["--client", "127.0.0.1"],
        "rule": ["--yes", "--rule", listed[0]["rule"]],
    }[way]
    assert site.run("kill", *chosen).stdout == "3 ended\n"
    for link in links:
        assert receive_to_reset(link.client) == b""
    for pid in masters[:-1]:
        site.wait_gone(pid)
    site.stop()


@pytest.mark.parametrize("way", ["reload", "upgrade"])
def test_cut_denied_ends_their_sessions(site: Site, way: str) -> None:
    """The client of all of them is denied by what is read last; by an upgrade as by a reload."""
    masters, links = chain(site, 3)
    site.config.write_text(site.text(head="cut_denied = true\n", more=DENIED))
    assert site.run(way).returncode == 0
    for link in links:
        assert receive_to_reset(link.client) == b""
    for pid in masters[:-1]:
        site.wait_gone(pid)
    site.stop()


def test_a_reload_without_cut_denied_leaves_them(site: Site) -> None:
    _, links = chain(site, 2)
    site.config.write_text(site.text(more=DENIED))
    assert site.run("reload").returncode == 0
    for link in links:
        assert_alive(link)
        link.close()
    site.stop()


# -- they are waited for


def test_a_stop_waits_for_their_sessions_and_counts_them(site: Site) -> None:
    """As it does for its own: they end by themselves, and it says so."""
    masters, links = chain(site, 3)
    stop = begin_stop(site)
    site.wait_logged(rf"\[{masters[-1]}\] INFO master.stopping how=drain sessions=3 predecessors=2")
    for link in links:
        assert_alive(link)
        assert stop.poll() is None
        link.client.shutdown(1)
        assert receive_to_end(link.upstream) == b""
        link.upstream.close()
        assert receive_to_end(link.client) == b""
    assert re.fullmatch(r"stopped: 3 ended, 0 reset after [0-9.]+ s\n", said(stop))
    site.assert_nothing_left()
    assert trouble(site) == []


def test_a_stop_ends_their_sessions_when_time_is_over(site: Site, tmp_path: Path) -> None:
    """Only the newest configuration has a limit. Result: all are us/drain, and counted."""
    places = f'logs = [{{ to = "{tmp_path}/sessions", format = "json" }}]\n'
    masters, links = chain(site, 2, head=places)
    site.config.write_text(site.text(head=f'{places}drain_timeout = "1s"\n'))
    masters.append(site.upgrade())
    eventually(lambda: drains(site, *masters[-2::-1]))
    assert re.fullmatch(r"stopped: 0 ended, 2 reset after [0-9.]+ s\n", said(begin_stop(site)))
    for link in links:
        assert receive_to_reset(link.client) == b""
    site.assert_nothing_left()
    ends = [json.loads(line)["end"] for line in (tmp_path / "sessions").read_text().splitlines()]
    assert ends == ["us/drain"] * 2


@pytest.mark.parametrize("way", ["stop", "SIGTERM", "SIGINT"])
def test_a_stop_at_once_ends_their_sessions_at_once(site: Site, way: str) -> None:
    (*_, new), links = chain(site, 3)
    stop = begin_stop(site) if way != "SIGINT" else None
    if stop is not None:
        site.wait_logged(rf"\[{new}\] INFO master.stopping how=drain")
    if way == "stop":
        assert site.run("stop").stdout.startswith("stopped: 0 ended, 3 reset after ")
    else:
        site.signal(signal.Signals[way])
    for link in links:
        assert receive_to_reset(link.client) == b""
    if stop is not None:
        assert said(stop).startswith("stopped: 0 ended, 3 reset after ")
    site.assert_nothing_left()


def test_one_that_hangs_does_not_hold_up_a_stop(site: Site) -> None:
    """Its workers do not hang, but would go on for ever."""
    (old, _), links = chain(site, 2)
    os.kill(old, signal.SIGSTOP)
    eventually(lambda: state(old) == "T")
    site.signal(signal.SIGINT)
    site.wait_logged(rf"the old one, pid={old}, does not stop, killing it")
    site.wait_gone(old)
    for link in links:
        with suppress(ConnectionResetError):  # of a process that was killed it may be either
            assert link.client.recv(1) == b""
    site.assert_nothing_left()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_waits_for_one_that_has_said_nothing_yet(site: Site, number: signal.Signals) -> None:
    """The new one serves and is told to stop before the old one has heard that it serves."""
    old = site.start()
    link = site.link()
    new = site.begin_upgrade()
    os.kill(old, signal.SIGSTOP)
    eventually(lambda: state(old) == "T")
    os.kill(new, signal.SIGCONT)
    site.wait_logged(rf"\[{new}\] INFO control: listening at")
    os.kill(new, number)
    site.wait_logged(rf"\[{new}\] INFO master.stopping")
    os.kill(old, signal.SIGCONT)
    if number is signal.SIGINT:
        assert receive_to_reset(link.client) == b""
    else:
        site.wait_logged(rf"\[{old}\] INFO master.stopping how=drain")
        assert_alive(link)
        link.close()
    site.assert_nothing_left()
    said = "ended=0 cut=1" if number is signal.SIGINT else "ended=1 cut=0"
    site.wait_logged(rf"\[{new}\] INFO master.stopped {said}")


def test_one_that_is_told_to_hurry_ends_its_own_sessions_only(site: Site) -> None:
    """It stays for the one before it, which the newest one could not reach else."""
    (oldest, older, _), links = chain(site, 3)
    os.kill(older, signal.SIGTERM)
    assert receive_to_reset(links[1].client) == b""
    for link in (links[0], links[2]):
        assert_alive(link)
    assert is_running(older)
    assert site.run("kill", "--client", "127.0.0.1").stdout == "2 ended\n"
    site.wait_gone(oldest)
    site.wait_gone(older)
    site.stop()
