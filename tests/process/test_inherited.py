"""What a forked child has of its master's descriptors, whatever that has open at the time."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from support import procfs
from support.configured import Configured
from support.leases import kept_from_readers
from support.processes import suspend
from support.upgraded import Site
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from process.conftest import Launch, Serve

pytestmark = pytest.mark.process

GATE = "/memfd:forwarder-gate (deleted)"


class Rich(Site):
    """A master that has every kind of descriptor, and each kind of child."""

    def __init__(self, launch: Launch, directory: Path, stack: ExitStack) -> None:
        super().__init__(launch, directory, stack)
        self.foreign = directory / "foreign"
        self.log = directory / "connections"
        unix = directory / "listen.sock"
        port = self.upstream.getsockname()[1]
        table = "[[forwarding_rules]]\nlisten = "
        self.rules = (
            f'{table}"127.0.0.1:{self.address[1]}"\nprotocol = "udp"\nupstream = "127.0.0.1:{port}"'
            f'\n{table}"unix:{unix}"\nupstream = "localhost:{port}"\n'
        )
        self.listening = 3  # addresses, and a socket of each for every worker

    def begin(self) -> None:
        """Start it, with a file that who starts it has left open, and one client of control."""
        self.foreign.touch()
        self.config.write_text(self.text(head=f'log_file = "{self.log}"\n', more=self.rules))
        shell = ["sh", "-c", f'exec 7<{self.foreign}; exec "$@"', "sh"]
        self.forwarder = self._launch("-c", str(self.config), prefix=shell)
        client = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        client.connect(str(self.control))

    def children(self) -> tuple[list[int], int]:
        """Workers of the master, and its helper."""
        found = {pid: procfs.title(pid) for pid in procfs.children(self.master())}
        workers = [pid for pid, title in found.items() if title.startswith("forwarder: worker")]
        (helper,) = (pid for pid, title in found.items() if title == "forwarder: checker")
        return sorted(workers), helper

    def born_now(self) -> tuple[int, int]:
        """Kill a worker and the helper; who is born in their places."""
        eventually(self._has_helper)
        workers, helper = self.children()
        for pid in (workers[-1], helper):
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: self._is_whole(workers[-1], helper, len(workers)))
        now, helper = self.children()
        (worker,) = set(now) - set(workers)
        return worker, helper

    def _has_helper(self) -> bool:
        """A master that has just taken over may have begun with it, and no more."""
        return "forwarder: checker" in map(procfs.title, procfs.children(self.master()))

    def _is_whole(self, worker: int, helper: int, count: int) -> bool:
        try:
            workers, now = self.children()
        except ValueError:
            return False
        return len(workers) == count and worker not in workers and now != helper

    def shared(self, pid: int) -> set[str]:
        """What both the master and another process have open, but for standard output and so on."""
        ours, theirs = procfs.descriptors(self.master()), procfs.descriptors(pid)
        alike = {what for what in ours.values() if not what.startswith("anon_inode:")}
        return alike & {what for fd, what in theirs.items() if fd > 2} - {
            ours[fd] for fd in range(3)
        }


@pytest.fixture
def rich(launch: Launch, tmp_path: Path) -> Iterator[Rich]:
    """See :class:`Rich`."""
    with ExitStack() as stack:
        it = Rich(launch, tmp_path, stack)
        it.begin()
        yield it


def read(rich: Rich) -> list[int]:
    """A configuration is being read, by a process that is suspended then."""
    it = Configured(rich.forwarder, rich.config)
    before = set(procfs.children(rich.master()))
    with kept_from_readers(rich.config):
        it.forwarder.signal(signal.SIGHUP)
        eventually(lambda: set(procfs.children(rich.master())) > before)
        (loader,) = set(procfs.children(rich.master())) - before
        eventually(lambda: len(rich.shared(loader)) == 2, lambda: str(rich.shared(loader)))
        suspend(loader)
    (pipe,) = rich.shared(loader) - {str(rich.foreign)}
    assert pipe.startswith("pipe:")
    return [loader]


def upgrade(rich: Rich) -> list[int]:
    """A successor comes, and is suspended before it serves."""
    return [rich.begin_upgrade()]


def take_over(rich: Rich) -> list[int]:
    """A predecessor drains, and has a session left."""
    rich.link()
    rich.upgrade()
    return []


@pytest.mark.expects_log(r"worker\.died", r"helper\.died")
@pytest.mark.usefixtures("keeping")
@pytest.mark.parametrize("happen", [read, upgrade, take_over])
def test_a_child_has_of_its_master_what_it_is_given_and_nothing_else(
    rich: Rich, happen: Callable[[Rich], list[int]]
) -> None:
    suspended = happen(rich)
    worker, helper = rich.born_now()
    (sibling,) = {*rich.children()[0]} - {worker}  # pids start over at kernel.pid_max
    eventually(
        lambda: procfs.without_pipes(worker) == procfs.without_pipes(sibling),
        lambda: f"{procfs.descriptors(worker)}, and of its sibling {procfs.descriptors(sibling)}",
    )
    sockets = {what for what in rich.shared(worker) if what.startswith("socket:")}
    assert rich.shared(worker) - sockets == {GATE, str(rich.log)}
    assert len(sockets) == rich.listening
    eventually(lambda: rich.shared(helper) == set(), lambda: str(rich.shared(helper)))
    eventually(lambda: procfs.socket_count(helper) == 1)
    for pid in suspended:
        os.kill(pid, signal.SIGCONT)
    if happen is upgrade:
        rich.wait_logged("serves; letting our sessions end")
    rich.signal(signal.SIGINT)
    rich.assert_nothing_left()


def test_what_a_master_without_standard_descriptors_opens_is_not_its_childrens(
    serve: Serve,
) -> None:
    """Its parent has closed them; what it opens first would get their numbers."""
    it = serve(prefix=["sh", "-c", 'exec "$@" <&- >&-', "sh"])
    (worker,) = it.forwarder.workers()
    for pid in (it.forwarder.pid, worker):
        found = procfs.descriptors(pid)
        assert [found[0], found[1]] == ["/dev/null"] * 2, found
    it.assert_serves()
