"""Sessions go on in the new instance after an upgrade, and after a master that was killed.

The old processes leave at once. Whatever process is killed while sessions are on their way: each of
them goes on, in one of the two.
"""

from __future__ import annotations

import os
import signal
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from support import procfs
from support.clogged import CloggedUpstream
from support.configured import IS_SOAK
from support.ends import (
    Link,
    accept,
    connect,
    fill,
    receive_exactly,
    receive_to_end,
    seeded,
)
from support.fatal import Fatal
from support.loads import Load
from support.processes import listeners, members, owner
from support.upgraded import Site, assert_alive
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.forwarder import Forwarder

    from process.conftest import Launch

pytestmark = pytest.mark.process

TIMES = 20 if IS_SOAK else 5
# More than all buffers of a blocked session: its pipe has data, too.
MUCH = seeded(16 << 20, 3)


@pytest.fixture
def site(launch: Launch, tmp_path: Path) -> Iterator[Site]:
    """See :class:`Site`."""
    with ExitStack() as stack:
        yield Site(launch, tmp_path, stack)


@pytest.fixture
def fatal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fatal:
    """See :class:`Fatal`."""
    return Fatal(tmp_path / "fatal", monkeypatch)


class Various:
    """Sessions that are blocked or half-closed, either way; what they carry is known."""

    def __init__(self, site: Site) -> None:
        self._ended = [(site.link(), i) for i in range(4)]
        for link, i in self._ended:
            (link.client, link.upstream)[i % 2].shutdown(socket.SHUT_WR)
            assert receive_to_end((link.upstream, link.client)[i % 2]) == b""
        self._blocked = [site.link() for _ in range(2)]
        self._filled = [
            (fill(link.client, MUCH), fill(link.upstream, MUCH)) for link in self._blocked
        ]

    def go_on(self) -> None:
        """Say something more, each in the direction that is left."""
        for link, i in self._ended:
            near, far = (link.upstream, link.client) if i % 2 == 0 else (link.client, link.upstream)
            near.sendall(b"still")
            assert receive_exactly(far, 5) == b"still"

    def end(self) -> None:
        """All have what was sent, and then the end."""
        self.go_on()
        for link, _ in self._ended:
            link.close()
        for link, (sent, answered) in zip(self._blocked, self._filled, strict=True):
            for near, far, count in (
                (link.client, link.upstream, sent),
                (link.upstream, link.client, answered),
            ):
                assert receive_exactly(far, count) == MUCH[:count]
                near.shutdown(socket.SHUT_WR)
            assert receive_to_end(link.client) == receive_to_end(link.upstream) == b""
            link.close()


# -- what succeeds


def test_all_sessions_live_through_upgrades_and_no_old_process_stays(site: Site) -> None:
    """Many streams, some blocked and some half-closed, while others come and go."""
    site.start()
    various = Various(site)
    with Load(site.address, site.upstream, rate=100, streams=90) as load:
        load.wait_served(50)
        for _ in range(TIMES):
            new = site.upgrade()
            site.wait_alone(new, 2)
            various.go_on()
            load.wait_served(50)
        account = load.stop()
    assert account.dropped == 0, account.problems
    various.end()
    assert not site.forwarder.trouble()
    site.stop()


def test_a_session_is_counted_listed_and_ended_once_wherever_it_is(
    site: Site, tmp_path: Path
) -> None:
    """By the id that it has had from the beginning."""
    places = f'logs = [{{ to = "{tmp_path}/sessions", format = "json" }}]\n'
    site.start(head=places)
    links = [site.link() for _ in range(4)]
    before = sorted(ids(site))
    site.config.write_text(site.text(head=places))
    for _ in range(2):
        site.wait_alone(site.upgrade(), 2)
        assert sorted(ids(site)) == before
    totals = site.status()["totals"]
    assert isinstance(totals, dict)
    assert site.run("kill", before[0]).stdout == "1 ended\n"
    for link in links:
        link.close()
    eventually(lambda: ids(site) == [])
    eventually(lambda: len((tmp_path / "sessions").read_text().splitlines()) == 4)
    site.stop()


def ids(site: Site) -> list[str]:
    """The ids of all sessions."""
    return [line.split()[0] for line in site.run("sessions").stdout.splitlines()[1:]]


def test_one_that_is_not_connected_yet_stays_until_it_is(site: Site) -> None:
    """Nothing of it can be moved. Result: the old one waits for it, then it moves as well.

    Through a second upgrade, too: the one between passes on what is for the oldest.
    """
    with CloggedUpstream() as clogged:
        site.upstream = clogged.listener
        head = "connect_timeout = 60\n"  # the SYN is sent again after 7 s, and then after 15 s
        oldest = {"pid": site.start(workers=1, head=head), "sessions": 1}
        with connect(site.address) as client:
            eventually(lambda: "connecting" in site.run("sessions").stdout)
            old = {"pid": site.upgrade(), "sessions": 0}
            eventually(lambda: site.status()["predecessors"] == [oldest])
            new = site.upgrade()
            eventually(lambda: site.status()["predecessors"] == [old, oldest])
            clogged.open()
            with accept(clogged.listener) as upstream:
                link = Link(client, upstream)
                assert_alive(link)
                site.wait_alone(new, 1)
                assert_alive(link)
        site.stop()


# -- what fails on the way


# Who is killed, and where, in the code of the one that is started.
MASTER_OF_THE_SUCCESSOR = {
    "sessions have come": ("before", "forwarder.supervision.moves", "Moves.on_message"),
    "sessions are passed on": ("after", "forwarder.supervision.workforce", "Workers.carry"),
    "sessions are taken": ("before", "forwarder.succession.foreign", "OldWorker.settle"),
}
WORKER_OF_THE_SUCCESSOR = {
    "sessions have come": ("before", "forwarder.ipc.consignment", "Consignment.claim"),
    "sessions are claimed": ("after", "forwarder.ipc.consignment", "Consignment.claim"),
}
IN_THE_OLD = {
    "master, sessions have come": ("before", "forwarder.succession.lineage", "Heir.pass_on"),
    "master, sessions are passed on": ("after", "forwarder.succession.lineage", "Heir.pass_on"),
    "worker, sessions are given": ("after", "forwarder.ipc.consignment", "Consignment.send"),
}


@pytest.mark.parametrize("where", MASTER_OF_THE_SUCCESSOR)
def test_a_successor_that_is_killed_loses_no_session(
    site: Site, fatal: Fatal, launch: Launch, where: str
) -> None:
    """The old one leaves, and the next master takes them from all workers that are left."""
    old = site.start(workers=1)
    links = [site.link() for _ in range(6)]
    fatal.set(*MASTER_OF_THE_SUCCESSOR[where])
    site.signal(signal.SIGUSR2)
    site.wait_logged("worker.orphaned")
    fatal.unset()
    for link in links:
        assert_alive(link)
    site.wait_gone(old)
    assert new_has_all(launch("-c", str(site.config)), site, links)


def new_has_all(new: Forwarder, site: Site, links: list[Link]) -> bool:
    """A new master has these sessions, and no other process stays; it stops then."""
    eventually(lambda: not members(site.forwarder.pid), "old processes stay")
    for link in links:
        assert owner(procfs.children(new.pid), link.client)
        assert_alive(link)
        link.close()
    return new.stop() == 0


def assert_all_go_on(site: Site, links: list[Link]) -> None:
    """Upgrade: the new instance is alone then, and has them all; they are closed."""
    new = site.upgrade()
    site.wait_alone(new, 1)
    for link in links:
        assert owner(procfs.children(new), link.client)
        assert_alive(link)
        link.close()


@pytest.mark.parametrize("where", WORKER_OF_THE_SUCCESSOR)
def test_a_worker_that_is_killed_loses_no_session_on_its_way_to_it(
    site: Site, fatal: Fatal, where: str
) -> None:
    """The one that takes its place gets them, or another one."""
    site.start(workers=1)
    links = [site.link() for _ in range(6)]
    fatal.set(*WORKER_OF_THE_SUCCESSOR[where])
    assert_all_go_on(site, links)
    assert fatal.has_happened
    site.stop()


@pytest.mark.parametrize("where", IN_THE_OLD)
def test_a_kill_in_the_old_one_loses_no_session(site: Site, fatal: Fatal, where: str) -> None:
    """All go on in the new one, to which the workers of the old one give them without it."""
    fatal.set(*IN_THE_OLD[where])
    site.start(workers=1)
    links = [site.link() for _ in range(6)]
    fatal.unset()
    assert_all_go_on(site, links)
    assert fatal.has_happened
    site.stop()


@pytest.mark.usefixtures("keeping")
def test_sessions_of_another_version_end_where_they_are(site: Site) -> None:
    """The log says so, once for each worker that has some."""
    old = site.start(workers=1)
    links = [site.link() for _ in range(3)]
    new = site.upgrade()
    site.wait_logged(rf"\[{new}\] WARNING master.moved .*; the rest stays there: version")
    assert site.status()["predecessors"] == [{"pid": old, "sessions": 3}]
    for link in links:
        assert_alive(link)
        link.close()
    site.wait_alone(new, 1)
    assert len(site.forwarder.trouble()) == 1
    site.stop()


# -- a master that was killed


def test_a_master_that_is_killed_while_its_successor_starts_loses_no_session(site: Site) -> None:
    """It has the sockets already. Result: it has the sessions, too, and no orphan stays."""
    old = site.start()
    links = [site.link() for _ in range(6)]
    successor = site.begin_upgrade()
    os.kill(old, signal.SIGKILL)
    site.wait_logged("worker.orphaned", times=2)
    os.kill(successor, signal.SIGCONT)
    site.wait_logged("master.ready", times=2)
    site.wait_alone(successor, 2)
    for link in links:
        assert owner(procfs.children(successor), link.client)
        assert_alive(link)
        link.close()
    site.stop()


def test_orphans_that_accept_no_more_give_their_sessions(site: Site, launch: Launch) -> None:
    """They have no socket by which a new master would recognise them."""
    site.start()
    links = [site.link() for _ in range(6)]
    orphan = owner(procfs.children(site.forwarder.pid), links[0].client)
    site.forwarder.process.kill()
    site.forwarder.process.wait()
    site.wait_logged("worker.orphaned", times=2)
    for pid in members(site.forwarder.pid):
        os.kill(pid, signal.SIGTERM)
    eventually(lambda: not listeners(site.address))
    assert orphan in members(site.forwarder.pid)
    assert new_has_all(launch("-c", str(site.config)), site, links)


def test_a_master_that_is_started_after_one_that_was_killed_has_its_sessions(
    site: Site, launch: Launch
) -> None:
    """Again and again. Result: no session is lost, and no orphan stays."""
    site.start()
    various = Various(site)
    last = site.forwarder
    with Load(site.address, site.upstream, rate=100, streams=30) as load:
        for _ in range(3):
            load.wait_served(50)
            last.process.kill()
            last.process.wait()
            before, last = last, launch("-c", str(site.config))
            pid = before.pid
            eventually(lambda pid=pid: not members(pid), "orphans stay")  # type: ignore[misc]  # its default is the type
            various.go_on()
        load.wait_served(50)
        account = load.stop()
    assert account.dropped == 0, account.problems
    various.end()
    assert last.stop() == 0
