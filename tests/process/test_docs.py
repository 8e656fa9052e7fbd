"""Every command of README.md and docs is executed here, or stands in ELSEWHERE with the reason.

Each page runs from top to bottom in a directory and a network of its own. A command that talks to
an instance finds one. Places of the system are below the directory; see ``support.pages``.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
import pytest
from support.echo import Echo
from support.namespaces import needs_network, network
from support.pages import DOCS, ROOT, Block, blocks, commands, pages, placed
from support.processes import members
from support.programs import debian
from support.waiting import eventually

from forwarder.cli.main import cli
from process.conftest import stop

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.forwarder import Forwarder

    from process.conftest import Launch

pytestmark = pytest.mark.process

# Beginnings of commands that are not executed here, and why.
ELSEWHERE: Final = {
    "make test": "is what runs this",
    "systemctl": "needs systemd; test_unit_file.py runs what it would run",
    "journalctl": "needs systemd",
    "sysctl --system": "changes the machine; test_deploy.py looks whether the settings exist",
    "pipx": "changes the machine; test_packaging.py installs what it would",
    "podman": "needs podman; test_container.py runs what it would run",
    "docker": "needs docker; test_container.py runs what it would run",
    "kubectl": "needs a cluster; test_container.py runs what it would run",
    "python3 -m venv /opt": "changes the machine; the Makefile does it for .venv",
    "/opt/forwarder/bin/pip": "changes the machine; the Makefile does it for .venv",
    "ln -s /opt/forwarder": "changes the machine",
    "nginx -s quit": "sends SIGQUIT, as test_migration.py does",
    "kill": "needs the old program: test_migration.py",
    "mkdir -p /run/systemd": "changes the machine",
    "printf '[Service]": "changes the machine",
}
# What is typed in a page, and what is run for it.
INSTEAD: Final = {
    "make run": "forwarder demo",
    ".venv/bin/forwarder": "forwarder",
    "forwarder convert FILE": "forwarder convert /etc/rinetd.conf",
}
PLACEHOLDERS: Final = {
    "OLD": "/etc/rinetd.conf",
    "NEW": "/etc/forwarder/forwarder.toml",
    "FILE": "/etc/forwarder/forwarder.toml",
}
PLACEHOLDERS_OF: Final = {"convert.md": {**PLACEHOLDERS, "FILE": "/etc/rinetd.conf"}}
# Exit codes that are no failure.
STATUS: Final = {"forwarder diff": {0, 1}}
OURS: Final = "/etc/forwarder/forwarder.toml"
ADDRESSES: Final = ("192.0.2.1", "192.0.2.10", "192.0.2.11", "192.0.2.53")
UPSTREAMS: Final = [("127.0.0.1", 80), ("192.0.2.10", 80), ("192.0.2.11", 80)]
CONFIGURATION: Final = """\
workers = 2
[[forwarding_rules]]
name = "web"
listen = "0.0.0.0:8080"
upstream = "192.0.2.10:80"
[[forwarding_rules]]
name = "dns"
listen = "192.0.2.1:5353"
upstream = "192.0.2.53:53"
protocol = "udp"
"""
RINETD: Final = "0.0.0.0 8080 192.0.2.10 80\n"
PAGES: Final = pages()


def typed(block: Block) -> list[str]:
    """The commands of a block; none if it is something else, or of another program."""
    return commands(block) if block.language in ("", "sh") and not block.name else []


COMMANDS: Final = [command for page in PAGES for block in blocks(page) for command in typed(block)]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def elsewhere(command: str) -> str:
    """The entry of ELSEWHERE that a command begins like, or ""."""
    return next((start for start in ELSEWHERE if f"{command} ".startswith(start)), "")


def stays(arguments: list[str]) -> bool:
    """Whether it is a command that stays in the foreground."""
    if arguments[:1] != ["forwarder"]:
        return False
    first = arguments[1] if len(arguments) > 1 else ""
    return first in ("run", "demo") or (first.startswith("-") and first != "--version")


class Reader:
    """Somebody who follows a page."""

    def __init__(self, page: Path, root: Path, launch: Launch) -> None:
        self._page = page
        self._root = root
        self._launch = launch
        self._instance: Forwarder | subprocess.Popen[bytes] | None = None
        self._placeholders = PLACEHOLDERS_OF.get(page.name, PLACEHOLDERS)
        for place in ("etc/forwarder", "etc/systemd/system", "etc/sysctl.d", "etc/logrotate.d"):
            (root / place).mkdir(parents=True)
        for place in ("run/forwarder", "var/log/forwarder"):
            (root / place).mkdir(parents=True)
        (root / "deploy").symlink_to(ROOT / "deploy")
        # A page may install another file in its place, which this instance is not to read.
        self._own = root / "own.toml"
        for path in (self._own, Path(placed(OURS, root))):
            path.write_text(CONFIGURATION)
        Path(placed("/etc/rinetd.conf", root)).write_text(RINETD)
        self._env = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RUNTIME_DIRECTORY": str(root / "run" / "forwarder"),
        }

    def follow(self) -> None:
        """Write each file and run each command, in their order."""
        for block in blocks(self._page):
            if block.name.startswith("/") and block.name != OURS:
                block.write(self._root)  # what was there
        for block in blocks(self._page):
            if block.name == OURS:
                self._own = block.write(self._root)
            for command in typed(block):
                if not elsewhere(command):
                    self._run(command, f"{name_of(self._page)}:{block.line}: {command}")

    def _run(self, command: str, where: str) -> None:
        command = self._substituted(command)
        arguments = shlex.split(command)
        if stays(arguments):
            self._start(arguments[1:])
            return
        if arguments[0] == "forwarder" and self._instance is None:
            self._start(["-c", str(self._own)])
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {command}"],
            cwd=self._root,
            env=self._env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        allowed = next((codes for start, codes in STATUS.items() if command.startswith(start)), {0})
        assert done.returncode in allowed, f"{where}: status {done.returncode}\n{done.stderr}"
        if arguments[:2] in (["forwarder", "stop"], ["forwarder", "upgrade"]):
            self._forget()

    def _substituted(self, command: str) -> str:
        for written, instead in INSTEAD.items():
            if command.startswith(written):
                command = instead + command.removeprefix(written)
        for word, file in self._placeholders.items():
            command = re.sub(rf"(?<![\w.]){word}(?![\w.])", file, command)
        for address in ("127.0.0.1:8088", "127.0.0.1:80"):
            command = re.sub(r"(?<=-[lr] )ADDR\b", address, command, count=1)
        if self._instance is not None:  # not the instances of other tests that run now
            session = os.getsid(self._instance.pid)
            command = re.sub(r"\bps ax -o\b", f"ps -s {session} -o", command)
            command = re.sub(r"\bps ax\b", f"ps -s {session} -o pid,tty,stat,time,args", command)
        return placed(command, self._root)

    def _start(self, arguments: list[str]) -> None:
        self.close()
        if arguments[0] == "demo":
            process = subprocess.Popen(
                [sys.executable, "-m", "forwarder", *arguments],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            self._instance = process
            eventually(lambda: can_connect(("127.0.0.1", 9000)), "the demo does not listen")
        else:
            self._instance = self._launch(*arguments)

    def _forget(self) -> None:
        """The instance is stopped, or another process has taken its place."""
        assert self._instance is not None
        pid = self._instance.pid
        if members(pid):  # and it may be just about to end
            subprocess.run(["forwarder", "stop"], env=self._env, check=False, capture_output=True)
            eventually(lambda: not members(pid), "the instance does not stop")
        self._instance = None

    def close(self) -> None:
        """End what runs."""
        if isinstance(self._instance, subprocess.Popen):
            self._instance.terminate()
            self._instance.wait()
        elif self._instance is not None:
            assert stop(self._instance, signal.SIGTERM) == 0
        self._instance = None


def can_connect(address: tuple[str, int]) -> bool:
    with suppress(OSError), socket.create_connection(address):
        return True
    return False


@pytest.fixture
def machine(public_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory, and a network in which every port is free."""
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(public_path / "run" / "forwarder"))
    with network(*ADDRESSES), Echo(tcp=UPSTREAMS):
        yield public_path


@needs_network
@debian("ip", "ss", "nft", "nstat", "curl", "prlimit", "bash")
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_commands_of_a_page_work(page: Path, machine: Path, launch: Launch) -> None:
    with ExitStack() as stack:
        reader = Reader(page, machine, launch)
        stack.callback(reader.close)
        reader.follow()


def test_no_exception_is_left_without_its_command() -> None:
    used = {elsewhere(command) for command in COMMANDS}
    assert used - {""} == set(ELSEWHERE)


def test_every_block_says_what_it_is() -> None:
    """Pages have commands, files with a place, and nothing that could be either."""
    for page in PAGES:
        for block in blocks(page):
            place = f"{name_of(page)}:{block.line}"
            if block.language in ("", "sh"):
                assert block.name in ("", "old"), place
            else:
                assert block.language in ("text", "mermaid") or block.name.startswith("/"), place


def test_commands_in_running_text_exist() -> None:
    """`forwarder NAME` in a sentence or a table is a command with these options."""
    for page in PAGES:
        for text in re.findall(r"`(?:\.venv/bin/)?forwarder ([^`\n]+)`", page.read_text()):
            words = text.replace("[", " ").replace("]", " ").split()
            command = cli.commands.get(words[0] if not words[0].startswith("-") else "run")
            assert command is not None, (name_of(page), text)
            if isinstance(command, click.Group):
                known_names = [word for word in words[1:2] if word in command.commands]
                command = command.commands[known_names[0]] if known_names else command
            known = {option for param in command.params for option in param.opts} | {"--version"}
            given = {word for word in words if re.match(r"--?[a-z]", word)}
            assert given <= known, (name_of(page), text)


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"]:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" in target:
                continue
            file, _, anchor = target.partition("#")
            path = (page.parent / file).resolve() if file else page
            assert path.exists(), (name_of(page), target)
            if anchor:
                assert anchor in anchors(path), (name_of(page), target)


def anchors(page: Path) -> set[str]:
    """The anchors of the headings of a page, as they are on the web."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


def test_the_index_knows_every_page() -> None:
    for page in PAGES:
        if page.parent == DOCS and page.name != "README.md":
            assert f"]({page.name})" in (DOCS / "README.md").read_text()
