"""A real systemd, in namespaces of its own, and the shipped unit in it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from support import procfs
from support.configured import rule
from support.ends import Link, accept, connect, listen
from support.forwarder import reserve_port
from support.unitfile import read_unit
from support.waiting import PATIENCE_S, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

BOOT: Final = Path(__file__).parent / "boot"
UNIT: Final = Path(__file__).parents[2] / "deploy" / "systemd" / "forwarder.service"
COMMAND: Final = f"{sys.executable} -m forwarder"
FILE: Final = "/etc/forwarder/forwarder.toml"


class Box:
    """A booted systemd. Owns it, and all that runs in it."""

    def __init__(self, directory: Path) -> None:
        self.lines: list[str] = []
        paths = [sys.prefix, sys.base_prefix, str(Path(__file__).parents[2])]
        self._process = subprocess.Popen(
            [str(BOOT), str(directory), *paths],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        # Bash becomes unshare, and its only child systemd.
        self.group = Path("/proc", str(self._process.pid), "cgroup").read_text()
        eventually(self._is_up, lambda: "\n".join(self.lines))

    def _is_up(self) -> bool:
        assert self._process.poll() is None, "\n".join(self.lines)
        children = procfs.children(self._process.pid)
        if not children:
            return False
        self._init = children[0]
        self.group = Path("/proc", str(self._process.pid), "cgroup").read_text()
        return self.run("systemctl", "is-active", "box.target").stdout == "active\n"

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip("\n"))

    def popen(self, *command: str) -> subprocess.Popen[str]:
        """Begin a command in it."""
        enter = ["nsenter", "-t", str(self._init), "-m", "-p", "-u", "-i", "-C", "-r", "-w"]
        clean = ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"]
        return subprocess.Popen(
            [*enter, *clean, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in it."""
        with self.popen(*command) as process:
            out, err = process.communicate(timeout=2 * PATIENCE_S)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def path(self, path: str) -> Path:
        """A file in it, as seen from here."""
        return Path(f"/proc/{self._init}/root{path}")

    def close(self) -> None:
        """End it, and all that is in it: it is process 1 of a namespace."""
        with suppress(ProcessLookupError):
            os.kill(self._init, signal.SIGKILL)
        self._process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        assert self._process.stdout is not None
        self._process.stdout.close()
        inside = self.group.partition("0::")[2].splitlines()[0]
        for mount in Path("/proc/mounts").read_text().splitlines():
            if mount.split()[2] == "cgroup2" and inside.rpartition("/")[2].startswith("forwarder-"):
                top = Path(mount.split()[1] + inside)
                for group in sorted(top.rglob("*"), key=lambda it: -len(it.parts)):
                    if group.is_dir():
                        group.rmdir()
                top.rmdir()
                break


class Unit:
    """The shipped unit with one rule, as root and where Python is: not what is tested here."""

    def __init__(self, box: Box, stack: ExitStack) -> None:
        self.box = box
        shown = box.run("journalctl", "-n", "1", "-o", "cat", "--show-cursor").stdout
        self._cursor = shown.rpartition("-- cursor: ")[2].strip()
        self._stack = stack
        self.address: tuple[str, int] = stack.enter_context(reserve_port()).getsockname()
        self.upstream = stack.enter_context(listen())
        self.write()
        box.path("/etc/systemd/system/forwarder.service").write_text(UNIT.read_text())
        self.set_more("")

    def write(self, more: str = "", head: str = "") -> None:
        """The configuration; ``head`` comes before the rule, ``more`` after it."""
        file = self.box.path(FILE)
        file.parent.mkdir(exist_ok=True)
        file.write_text(
            f"workers = 2\n{head}" + rule(self.address, self.upstream.getsockname()) + more
        )

    def set_more(self, more: str) -> None:
        """Other settings of the unit than the shipped ones."""
        shipped = read_unit(UNIT)
        directory = self.box.path("/etc/systemd/system/forwarder.service.d")
        directory.mkdir(exist_ok=True)
        (directory / "test.conf").write_text(
            "[Service]\nDynamicUser=no\nProtectHome=no\nPrivateTmp=no\n"
            + "".join(
                f"{key}=\n{key}={COMMAND} {shipped[key][0].partition(' ')[2]}\n"
                for key in ("ExecStart", "ExecReload")
            )
            + more
        )
        self.systemctl("daemon-reload")

    def systemctl(self, verb: str) -> None:
        """Have systemd do that to it. Result: it says that it is done."""
        names = [] if verb == "daemon-reload" else ["forwarder"]
        done = self.box.run("systemctl", verb, *names)
        assert done.returncode == 0, done.stderr + self.journal()

    def begin(self, verb: str) -> subprocess.Popen[str]:
        """As ``systemctl``, without waiting."""
        return self._stack.enter_context(self.box.popen("systemctl", verb, "forwarder"))

    def show(self, name: str) -> str:
        """A property of the unit."""
        return self.box.run("systemctl", "show", "--value", "-p", name, "forwarder").stdout.strip()

    def master(self) -> int:
        """The main process, by its number in the box."""
        return int(self.show("MainPID"))

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command against it."""
        return self.box.run(sys.executable, "-m", "forwarder", *arguments)

    def upgrade(self) -> int:
        """Upgrade; returns the new main process. The old one has gone, whatever sessions it had."""
        old = self.master()
        done = self.command("upgrade")
        assert done.returncode == 0, done.stderr + self.journal()
        new = int(re.findall(r"pid (\d+) serves", done.stdout)[0])
        eventually(lambda: self.master() == new, self.journal)
        eventually(lambda: not self.is_running(old), self.journal)
        return new

    def workers(self) -> list[int]:
        """The processes of its workers."""
        return [int(pid) for pid in self.box.run("pgrep", "-f", "forwarder: worker").stdout.split()]

    def is_running(self, pid: int) -> bool:
        """Whether there is such a process in the box."""
        return self.box.run("kill", "-0", str(pid)).returncode == 0

    def kill(self, pid: int, number: signal.Signals) -> None:
        """Send a signal to a process of the box."""
        assert self.box.run("kill", f"-{number.value}", str(pid)).returncode == 0

    def link(self) -> Link:
        """A session."""
        client = self._stack.enter_context(connect(self.address))
        return Link(client, self._stack.enter_context(accept(self.upstream)))

    def journal(self) -> str:
        """What it has logged since it was made."""
        after = ["--after-cursor", self._cursor]
        return self.box.run("journalctl", "-u", "forwarder", "-o", "cat", *after).stdout

    def wait_logged(self, pattern: str) -> None:
        """Wait until it has logged that."""
        eventually(lambda: bool(re.search(pattern, self.journal())), self.journal)

    def assert_stopped_well(self) -> None:
        """It has stopped by itself, and nothing of it is left."""
        assert (self.show("ActiveState"), self.show("Result")) == ("inactive", "success")
        assert self.box.run("pgrep", "-f", "forwarder: ").stdout == ""
        assert not any("which is not our child" in line for line in self.box.lines)

    def close(self) -> None:
        """Stop it."""
        self.box.run("systemctl", "kill", "--signal=KILL", "forwarder")
        self.box.run("systemctl", "stop", "forwarder")
        self.box.run("systemctl", "reset-failed", "forwarder")


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """See :class:`Box`."""
    it = Box(tmp_path_factory.mktemp("box"))
    yield it
    it.close()


@pytest.fixture
def unit(box: Box) -> Iterator[Unit]:
    """See :class:`Unit`; not started yet."""
    with ExitStack() as stack:
        it = Unit(box, stack)
        yield it
        it.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Only who is root may mount and make namespaces."""
    can = os.geteuid() == 0 and Path("/lib/systemd/systemd").exists() and shutil.which("nsenter")
    for item in items:
        if not can and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs root and systemd"))
