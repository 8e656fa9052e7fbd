"""A forwarder that is upgraded while it serves, and what is left of it."""

from __future__ import annotations

import os
import re
import signal
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from support import procfs
from support.configured import rule
from support.control import ask
from support.ends import Link, accept, carry, connect, listen
from support.forwarder import reserve_port
from support.leases import kept_from_readers
from support.processes import listeners, members, run_command, state, suspend
from support.waiting import eventually

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

    import pytest
    from process.conftest import Launch

    from support.forwarder import Forwarder


_OTHERS = """
import os
from forwarder.ipc import consignment
consignment.VERSION = os.getpid()
"""


def keep_sessions(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each instance that starts from now on take the sessions of others for another version's.

    So it takes none, and an old one lets its sessions end, as one of older code does.
    """
    directory.mkdir(exist_ok=True)
    (directory / "sitecustomize.py").write_text(_OTHERS)
    monkeypatch.setenv("PYTHONPATH", str(directory), prepend=os.pathsep)


class Site:
    """A forwarder of one rule, with pid file and control socket, that is upgraded."""

    def __init__(self, launch: Launch, directory: Path, stack: ExitStack) -> None:
        self._launch = launch
        self._stack = stack
        self.config = directory / "forwarder.toml"
        self.pid_file = directory / "forwarder.pid"
        self.control = directory / "control.sock"
        self.address: tuple[str, int] = stack.enter_context(reserve_port()).getsockname()
        self.upstream = stack.enter_context(listen())
        self.forwarder: Forwarder

    def text(self, workers: int = 2, more: str = "", head: str = "") -> str:
        """The configuration; ``head`` comes before the rule, ``more`` after it."""
        return (
            head
            + f'workers = {workers}\npid_file = "{self.pid_file}"\ncontrol = "{self.control}"\n'
            + rule(self.address, self.upstream.getsockname())
            + more
        )

    def start(self, workers: int = 2, head: str = "") -> int:
        """Start it; returns the pid of the master."""
        self.config.write_text(self.text(workers, head=head))
        self.forwarder = self._launch("-c", str(self.config))
        return self.forwarder.pid

    def master(self) -> int:
        """The pid in the pid file."""
        return int(self.pid_file.read_text())

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the master that the pid file names."""
        os.kill(self.master(), number)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command against it."""
        return run_command(*arguments, "--control", str(self.control))

    def status(self) -> dict[str, object]:
        """What ``forwarder status`` says."""
        return ask(self.control, "status")

    def upgrade(self) -> int:
        """Upgrade by the command; returns the pid of the new master."""
        old = self.master()
        done = self.run("upgrade")
        assert done.returncode == 0, done.stderr
        new = self.master()
        assert done.stdout == f"pid {new} serves, the old one drains\n"
        assert new != old
        return new

    def upgrade_by_signal(self) -> int:
        """Upgrade by SIGUSR2; returns the pid of the new master."""
        old = self.master()
        self.signal(signal.SIGUSR2)
        eventually(lambda: self.master() != old, lambda: "\n".join(self.forwarder.lines[-20:]))
        self.wait_logged(rf"pid={self.master()} serves")
        return self.master()

    def begin_upgrade(self) -> int:
        """Begin an upgrade, and suspend the successor before it reads; returns its pid."""
        with kept_from_readers(self.config):
            self.signal(signal.SIGUSR2)
            self.wait_logged("upgrade: started")
            lines = "\n".join(self.forwarder.lines)
            successor = int(re.findall(r"upgrade: started pid=(\d+)", lines)[-1])
            suspend(successor)
        return successor

    def wait_logged(self, pattern: str, times: int = 1) -> None:
        """Wait until any of the masters has logged that."""
        eventually(
            lambda: sum(bool(re.search(pattern, it)) for it in self.forwarder.lines) >= times,
            lambda: f"no {pattern}: " + "\n".join(self.forwarder.lines[-20:]),
        )

    def link(self) -> Link:
        """A session."""
        client = self._stack.enter_context(connect(self.address))
        return Link(client, self._stack.enter_context(accept(self.upstream)))

    def assert_serves(self) -> None:
        """A new client gets through."""
        link = self.link()
        assert_alive(link)
        link.close()

    def wait_gone(self, pid: int) -> None:
        """Wait until that process has ended."""
        eventually(lambda: not is_running(pid), lambda: "\n".join(self.forwarder.lines[-20:]))

    def wait_alone(self, master: int, workers: int) -> None:
        """No process is left but this master and its workers, which can be asked what it has."""
        eventually(
            lambda: set(members(self.forwarder.pid)) == {master, *procfs.children(master)},
            lambda: "\n".join(self.forwarder.lines[-20:]),
        )
        eventually(lambda: len(procfs.children(master)) == workers)
        assert self.status()["predecessors"] == []

    def stop(self) -> None:
        """Stop the master that the pid file names. Result: nothing is left."""
        self.signal(signal.SIGTERM)
        self.assert_nothing_left()

    def assert_nothing_left(self) -> None:
        """No process, no file, and the port is free."""
        pid = self.forwarder.pid
        eventually(
            lambda: not members(pid),
            lambda: f"left: {members(pid)}: " + "\n".join(self.forwarder.lines[-20:]),
            within_s=60,
        )
        assert not self.pid_file.exists()
        assert not self.control.exists()
        assert listeners(self.address) == 0


def is_running(pid: int) -> bool:
    with suppress(OSError):
        return state(pid) not in "ZX"
    return False


def assert_alive(link: Link) -> None:
    carry(link.client, link.upstream, b"x" * 1000)
    carry(link.upstream, link.client, b"y" * 1000)
