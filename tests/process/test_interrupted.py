"""Ctrl-C before there is anything to stop: no traceback, and an end that a shell understands."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from support.processes import COMMAND
from support.waiting import PATIENCE_S

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.process

# Runs the service as `python -m forwarder run` does, and interrupts it where it imports a module.
CODE = """\
import os, runpy, signal, sys

module, sys.argv[1:] = sys.argv[1], ["run", "-l", "192.0.2.1:4000", "-r", "127.0.0.1:2"]

class Interrupter:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupter())
runpy.run_module("forwarder", run_name="__main__")
"""
MODULES = [
    "forwarder.cli.main",
    "click",
    "forwarder.config.model",
    "forwarder.relay.relay",
    "uvloop",
    "setproctitle",
    "forwarder.cli.run",
]


@pytest.mark.parametrize("module", MODULES)
def test_an_interrupt_amid_the_imports_ends_it_silently(module: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", CODE, module],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")


def test_the_installed_command_begins_there_too() -> None:
    """The script that pip makes imports this before all others."""
    code = "import signal; import forwarder.__main__; print(signal.getsignal(signal.SIGINT))"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert "function end " in shown


def test_a_command_that_waits_is_interrupted_silently(tmp_path: Path) -> None:
    """Its instance takes the connection, and never answers."""
    path = tmp_path / "c.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        command = subprocess.Popen(
            [*COMMAND, "--control", str(path), "stop"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        sock.settimeout(PATIENCE_S)
        asking, _ = sock.accept()
        with asking:
            assert asking.recv(100)
            command.send_signal(signal.SIGINT)
            assert command.communicate(timeout=PATIENCE_S) == (b"", b"")
    assert command.returncode == -signal.SIGINT


def test_who_has_it_ignored_is_not_interrupted() -> None:
    """As a shell has it for what runs in the background."""
    ended = subprocess.run(
        ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-c", CODE, "click"],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert (ended.returncode, "Traceback" in ended.stderr) == (69, False)
