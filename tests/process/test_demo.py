"""``forwarder demo`` as a user runs it: what it prints, how it ends, and that nothing is left."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from support.processes import members

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.process

HOST = "127.0.0.1"
WITHIN_S = 60.0
AVERAGE = re.compile(r"on average to upstream +([0-9.]+) Gbit/s +to client +([0-9.]+) Gbit/s")


def eventually(predicate: Callable[[], bool], within_s: float = WITHIN_S) -> bool:
    """Ask again and again until ``predicate`` holds; False when it never did."""
    deadline = time.monotonic() + within_s
    while not (holds := predicate()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds


def is_free(port: int) -> bool:
    """Whether a server could listen on the port."""
    try:
        socket.create_server((HOST, port)).close()
    except OSError:
        return False
    return True


@pytest.fixture
def port() -> int:
    """A port that is free, and so is the next one.

    Port 0 cannot ask for two in a row. Below the range that clients are given (32768 and up).
    """
    for _ in range(100):
        candidate = 20000 + secrets.randbelow(12000)
        if is_free(candidate) and is_free(candidate + 1):
            return candidate
    pytest.fail("no two free ports in a row")


@contextlib.contextmanager
def demo(port: int, *args: str) -> Iterator[subprocess.Popen[str]]:
    """Run the demo in a session of its own; whatever is left of it afterwards is killed."""
    command = [sys.executable, "-m", "forwarder", "demo", "--port", str(port), *args]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            for pid in members(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def wait_running(process: subprocess.Popen[str]) -> None:
    """Read until the first line of throughput: all processes are there."""
    assert process.stdout is not None
    for line in process.stdout:
        if "Gbit/s" in line:
            return
    pytest.fail("the demo ended before it forwarded anything")


def assert_nothing_left(process: subprocess.Popen[str], port: int) -> None:
    """All processes of the demo are gone, and both ports are free."""
    assert eventually(lambda: not members(process.pid)), members(process.pid)
    assert is_free(port)
    assert is_free(port + 1)


def test_runs_for_the_seconds_given_and_leaves_nothing(port: int) -> None:
    with demo(port, "--seconds", "2") as process:
        out, err = process.communicate(timeout=WITHIN_S)
        assert_nothing_left(process, port)
    assert (process.returncode, err) == (0, "")
    average = AVERAGE.search(out)
    assert average is not None, out
    assert float(average[1]) > 0
    assert float(average[2]) > 0
    assert f"curl http://{HOST}:{port}/" in out


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"HTTP/1.1 200 OK\r\n"),
        (b"GE", b"GE"),
        (b"hello\n" * 5000, b"hello\n" * 5000),
    ],
    ids=["http", "almost-http", "echo"],
)
def test_answers_http_and_echoes_everything_else(port: int, said: bytes, heard: bytes) -> None:
    with demo(port) as process:
        wait_running(process)
        with socket.create_connection((HOST, port), timeout=WITHIN_S) as sock:
            sock.sendall(said)
            sock.shutdown(socket.SHUT_WR)
            with sock.makefile("rb") as answer:
                assert answer.read().startswith(heard)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_success(port: int, number: signal.Signals) -> None:
    with demo(port) as process:
        wait_running(process)
        process.send_signal(number)
        out, err = process.communicate(timeout=WITHIN_S)
        assert_nothing_left(process, port)
    assert (process.returncode, err) == (0, "")
    assert AVERAGE.search(out)


def test_ctrl_c_reaches_every_process_and_ends_it_with_success(port: int) -> None:
    """A terminal signals the whole foreground group, not only the first process."""
    with demo(port) as process:
        wait_running(process)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=WITHIN_S)
        assert_nothing_left(process, port)
    assert (process.returncode, err) == (0, "")


def test_its_processes_notice_when_it_is_killed(port: int) -> None:
    with demo(port) as process:
        wait_running(process)
        assert len(members(process.pid)) >= 6  # itself, upstream, master, guard, worker, client
        process.kill()
        process.communicate(timeout=WITHIN_S)
        assert_nothing_left(process, port)


@pytest.mark.parametrize("offset", [0, 1], ids=["listen", "upstream"])
def test_a_port_that_is_taken_is_named(port: int, offset: int) -> None:
    taken = port + offset
    with socket.create_server((HOST, taken)), demo(port, "--seconds", "2") as process:
        _, err = process.communicate(timeout=WITHIN_S)
        assert process.returncode == 69
        assert f"{HOST}:{taken}" in err
        assert "Address already in use" in err
        assert "Traceback" not in err
        assert eventually(lambda: not members(process.pid))
        assert is_free(port + 1 - offset)
