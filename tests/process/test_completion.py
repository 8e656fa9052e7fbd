"""Completion as a user of bash, zsh or fish has it: the script is sourced, a line is typed."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from support.processes import run_command
from support.programs import debian
from support.waiting import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.process

LINES: Final = {
    "forwarder chec": "forwarder check",
    "forwarder run --relay sp": "forwarder run --relay splice",
    "forwarder --rela": "forwarder --relay",
    "forwarder convert --from ox": "forwarder convert --from oxidinetd",
    "forwarder check -c uni": "forwarder check -c unique.toml",
    "forwarder run --workers a": "forwarder run --workers auto",
    "forwarder upstream dis": "forwarder upstream disable",
    "forwarder upstream drain --res": "forwarder upstream drain --reset",
}
"""What is typed, and what a tabulator makes of it."""

BASH: Final = ("bash", "--norc", "--noprofile", "-i")
ZSH: Final = ("zsh", "-f", "-i")
BASH_SETUP: Final = "source <(forwarder completion bash)"
ZSH_SETUP: Final = "autoload -Uz compinit; compinit -D; source <(forwarder completion zsh)"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory with one file, the command on PATH, and no settings of anybody."""
    (tmp_path / "unique.toml").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("INPUTRC", "/dev/null")


class Terminal:
    """An interactive shell at the other end of a pseudo terminal."""

    def __init__(self, command: tuple[str, ...]) -> None:
        self._fd, slave = pty.openpty()
        self.process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", *command], stdin=slave, stdout=slave, stderr=slave
        )
        os.close(slave)
        self.seen = b""

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait_for(self, text: str) -> None:
        """Read until a text has come."""
        deadline = time.monotonic() + PATIENCE_S
        while text.encode() not in self.seen:
            left = deadline - time.monotonic()
            assert left > 0, (text, self.seen[-2000:])
            if select.select([self._fd], [], [], left)[0]:
                self.seen += os.read(self._fd, 65536)

    def close(self) -> None:
        os.close(self._fd)
        self.process.wait(PATIENCE_S)


@pytest.fixture
def terminal(request: pytest.FixtureRequest) -> Iterator[Terminal]:
    """A shell that has sourced the script."""
    command, setup = request.param
    shell = Terminal(command)
    try:
        shell.type(f"{setup}; echo READY$((40 + 2))\n")
        shell.wait_for("READY42")
        yield shell
    finally:
        shell.close()


def complete_all(shell: Terminal) -> None:
    """Type each line and a tabulator; then have the shell print what it has become."""
    for number, (typed, completed) in enumerate(LINES.items()):
        # To the beginning of the line, to make it the argument of an echo.
        shell.type(f"{typed}\t\x01echo IS{number}:$((1 + 1)):\n")
        shell.wait_for(f"\nIS{number}:2:{completed}")


@debian("bash", "setsid")
@pytest.mark.parametrize("terminal", [(BASH, BASH_SETUP)], ids=["bash"], indirect=True)
def test_bash_completes_options_choices_and_files(terminal: Terminal) -> None:
    complete_all(terminal)


@debian("zsh", "setsid")
@pytest.mark.parametrize("terminal", [(ZSH, ZSH_SETUP)], ids=["zsh"], indirect=True)
def test_zsh_completes_options_choices_and_files(terminal: Terminal) -> None:
    complete_all(terminal)


@debian("fish")
def test_fish_completes_options_choices_and_files() -> None:
    asked = "; ".join(f"echo {n}; complete -C '{line}'" for n, line in enumerate(LINES))
    ended = subprocess.run(
        ["fish", "--no-config", "-c", f"forwarder completion fish | source; {asked}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=(1 + len(LINES)) * PATIENCE_S,  # a start for each
    )
    words = [line.partition("\t")[0] for line in ended.stdout.splitlines()]
    for number, completed in enumerate(LINES.values()):
        assert words[words.index(str(number)) + 1] == completed.rpartition(" ")[2], ended


def test_another_shell_is_refused() -> None:
    ended = run_command("completion", "tcsh")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "'bash', 'zsh', 'fish'" in ended.stderr
