"""Checks over upgrades: one checker at a time, and what one has found the next one knows."""

from __future__ import annotations

import os
import re
import signal
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from support import procfs
from support.ends import connect, receive_to_reset, written
from support.forwarder import reserve_port
from support.servers import ASKING, Server, who
from support.upgraded import Site, assert_alive
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from process.conftest import Launch

pytestmark = pytest.mark.process

QUICK = f'{ASKING}, every = "200ms", fast = "100ms", timeout = "10s"'


class Grouped(Site):
    """A site with a group of three servers beside its rule."""

    def __init__(self, launch: Launch, directory: Path, stack: ExitStack) -> None:
        super().__init__(launch, directory, stack)
        self.servers = [stack.enter_context(Server(name)) for name in ("first", "second", "third")]
        self.door: tuple[str, int] = stack.enter_context(reserve_port()).getsockname()
        self.keys = ""

    def text(self, workers: int = 2, more: str = "", head: str = "") -> str:
        servers = ", ".join(f'"{server.written}"' for server in self.servers)
        group = (
            f'[[groups]]\nname = "g"\nservers = [{servers}]\ncheck = {{ {QUICK} }}\n{self.keys}\n'
            f'[[forwarding_rules]]\nlisten = "{written(self.door)}"\nupstream = "group:g"\n'
        )
        return super().text(workers, group + more, head)

    def wait(self, what: str, server: Server, times: int = 1) -> None:
        self.wait_logged(rf"upstream\.{what} group=g server={re.escape(server.written)}", times)

    def checkers(self) -> list[int]:
        """The checkers of all masters, by their titles."""
        masters = {self.master(), self.forwarder.pid}
        children = [pid for master in masters for pid in procfs.children(master)]
        return [pid for pid in children if procfs.title(pid) == "forwarder: checker"]

    def seen(self, sessions: int = 12) -> set[str]:
        """Which servers new sessions get to."""
        return {who(self.door) for _ in range(sessions)}


@pytest.fixture
def site(launch: Launch, tmp_path: Path) -> Iterator[Grouped]:
    with ExitStack() as stack:
        yield Grouped(launch, tmp_path, stack)


@pytest.mark.usefixtures("keeping")
def test_the_successor_knows_who_is_down_and_checks_alone(site: Grouped) -> None:
    """Upgrade while a server is down and a session keeps the old master.

    *Result*: no session ever gets to that server, its state is no news, and the checker of the old
    master checks no more.
    """
    sick, other = site.servers[:2]
    sick.is_well = False
    old = site.start()
    site.wait("down", sick)
    link = site.link()
    site.upgrade()
    for _ in range(3):
        assert "first" not in site.seen(4)
    (checker,) = (pid for pid in site.checkers() if pid in procfs.children(old))
    os.kill(checker, signal.SIGSTOP)  # whoever checks now is the other one
    other.is_well = False
    site.wait("down", other)
    assert site.seen(6) == {"third"}
    sick.is_well = True
    site.wait("up", sick)
    assert sum("upstream.down" in line for line in site.forwarder.lines) == 2
    assert_alive(link)
    link.close()
    site.wait_gone(old)
    site.stop()


def test_after_a_successor_that_fails_the_old_checker_goes_on(site: Grouped) -> None:
    sick = site.servers[0]
    site.start()
    eventually(lambda: sick.checks > 0)
    os.kill(site.begin_upgrade(), signal.SIGKILL)
    site.wait_logged("did not come to serve")
    sick.is_well = False
    site.wait("down", sick)
    assert "first" not in site.seen(6)
    site.stop()


@pytest.mark.usefixtures("keeping")
def test_sessions_of_the_old_instance_are_cut_when_their_server_goes_down(site: Grouped) -> None:
    """The old master's workers read the same table, which the new checker writes."""
    site.keys = 'on_down = "reset"'
    old = site.start()
    eventually(lambda: all(server.checks for server in site.servers))
    clients = [connect(site.door) for _ in range(6)]
    names = []
    for client in clients:
        client.sendall(b"who\n")
        names.append(client.recv(100).decode().strip())
    site.upgrade()
    site.servers[0].is_well = False
    for client, name in zip(clients, names, strict=True):
        if name == "first":
            assert receive_to_reset(client) == b""
        client.close()
    assert "first" in names
    site.wait_gone(old)
    site.stop()
