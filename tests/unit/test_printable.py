"""Names of others in logs and on terminals; answers of who is no forwarder."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.processes import run_command

from forwarder.succession.inherit import FDS_VARIABLE, from_environment
from forwarder.system import daemonlog
from forwarder.system.printable import field, visible

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EVIL = "\x1b[31mred\x07\x9b2J\u202e\nINFO forged"


@given(st.text())
def test_nothing_that_a_terminal_obeys_is_left(text: str) -> None:
    assert visible(text).isprintable()
    assert not text.isprintable() or visible(text) == text


def test_a_name_writes_no_second_line_into_the_log() -> None:
    near, far = os.pipe()
    handler = daemonlog.PatientHandler(far)
    handler.setFormatter(daemonlog.OneLine("%(levelname)s %(message)s"))
    handler.emit(logging.LogRecord("x", logging.INFO, "", 0, "name %s", (EVIL,), None))
    os.close(far)
    written = os.read(near, 4096).decode()
    os.close(near)
    assert written.count("\n") == 1
    assert written.rstrip("\n").isprintable()


class Impostor:
    """Listens at a path, and gives this answer to every request."""

    def __init__(self, path: Path, answer: bytes) -> None:
        self.path = path
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.bind(str(path))
        self._sock.listen()
        self._answer = answer
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            client, _ = self._sock.accept()
            with client:
                if not client.recv(4096):
                    return
                client.sendall(self._answer)

    def close(self) -> None:
        """End it."""
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(str(self.path))
        self._thread.join()
        self._sock.close()


@pytest.fixture
def impostor(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Where one listens that gives the answer of the test's parameter."""
    it = Impostor(tmp_path / "control.sock", request.param)
    yield it.path
    it.close()


def answer(**fields: object) -> bytes:
    """A line, with raw characters in its strings once it is read."""
    return json.dumps({"ok": True, **fields}).encode() + b"\n"


@pytest.mark.process
@pytest.mark.parametrize(
    "impostor",
    [
        answer(version=EVIL, state=EVIL, rules=[{"name": EVIL, "addresses": [EVIL]}]),
        answer(report=EVIL, sessions=[{"id": EVIL, "rule": EVIL, "client": EVIL}]),
        json.dumps({"ok": False, "error": EVIL, "problems": [EVIL]}).encode() + b"\n",
    ],
    indirect=True,
)
@pytest.mark.parametrize("command", ["status", "sessions", "reload"])
def test_who_listens_at_the_path_does_not_steer_the_terminal(impostor: Path, command: str) -> None:
    """Root asks at a path in /tmp, where anybody may have put a socket."""
    shown = run_command(command, "--control", str(impostor))
    for line in (shown.stdout + shown.stderr).splitlines():
        assert line.isprintable(), line


@pytest.mark.process
@pytest.mark.parametrize("impostor", [b"no json\n", b"[" * 100_000 + b"\n"], indirect=True)
def test_who_is_no_forwarder_is_called_so(impostor: Path) -> None:
    shown = run_command("status", "--control", str(impostor))
    assert shown.returncode != 0
    assert "is no forwarder" in shown.stderr


@pytest.mark.parametrize("text", ["abc", "3-", "-1", "1-99999999999", "9" * 5000, "7-3", "0x3"])
def test_a_variable_that_is_not_from_a_predecessor_is_ignored(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv(FDS_VARIABLE, text)
    assert from_environment() == []


def test_a_service_manager_that_names_too_many_descriptors_is_not_followed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", "9" * 5000)
    monkeypatch.setattr(os, "sysconf", lambda _: 0)
    assert from_environment() == []
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("web", "web"),
        ("tcp 127.0.0.1:80", '"tcp 127.0.0.1:80"'),
        ("a=b", '"a=b"'),
        ('the "old" one', r'"the \"old\" one"'),
        ("", '""'),
    ],
)
def test_a_name_of_several_words_is_one_value_in_the_log(name: str, value: str) -> None:
    assert field(name) == value
