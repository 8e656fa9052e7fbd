"""Checks by a program: what it finds, how it ends, and that it does end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from support.probing import SHORT_S, ask, asking, check, target
from support.waiting import eventually

from forwarder.checker.probes import child
from forwarder.system.signals import OF_A_MASTER

if TYPE_CHECKING:
    from forwarder.config.model import Check

SERVER = target(("127.0.0.1", 80))
# Longer than any test.
FOREVER: Final = "sleep 600"


def shell(script: str, **fields: object) -> Check:
    """A check by a script."""
    return check("command", argv=("/bin/sh", "-c", script), **fields)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("script", "is_good", "why"),
    [
        ("exit 0", True, ""),
        ("echo 3 replicas", True, "3 replicas"),
        ("exit 3", False, "exit status 3"),
        ("echo one; echo two >&2; exit 1", False, "two"),
        ("printf 'no end'; exit 1", False, "no end"),
        ("printf '\\033[2Jx\\n'; exit 1", False, "\\x1b[2Jx"),
        ("kill -TERM $$", False, "killed by SIGTERM"),
        ("kill -SEGV $$", False, "killed by SIGSEGV"),
        ("exec >&- 2>&-; exit 1", False, "exit status 1"),
        ("head -c 65536 /dev/zero; exit 0", True, "\\x00" * 20 + "..."),
    ],
)
def test_its_status_decides_and_its_last_line_says_why(
    script: str, is_good: bool, why: str
) -> None:
    outcome = ask(shell(script), SERVER)
    assert (outcome.is_good, outcome.why, outcome.is_ours) == (is_good, why, False)


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (("/nonexistent",), "cannot run /nonexistent: No such file or directory"),
        (("/etc/passwd",), "cannot run /etc/passwd: Permission denied"),
        (("/bin/sh", "-c", "nonexistent-tool"), "nonexistent-tool: not found"),
    ],
)
def test_a_program_that_is_missing_says_nothing_of_the_server(
    argv: tuple[str, ...], why: str
) -> None:
    outcome = ask(check("command", argv=argv), SERVER)
    assert (outcome.is_good, outcome.is_ours) == (False, True)
    assert outcome.why.endswith(why)


@pytest.mark.parametrize(
    ("where", "server", "host", "port"),
    [
        (("127.0.0.1", 80), "web.example:80", "127.0.0.1", "80"),
        (("::1", 8080), "[::1]:8080", "::1", "8080"),
        ("/run/x", "unix:/run/x", "/run/x", ""),
        ("\0name", "unix:@name", "@name", ""),
    ],
)
def test_its_environment_is_the_server_and_a_path(
    where: tuple[str, int] | str,
    server: str,
    host: str,
    port: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SECRET", "x")
    out = tmp_path / "out"
    assert ask(shell(f"env -0 > {out}"), target(where), server=server).is_good
    found = dict(line.split("=", 1) for line in out.read_text().rstrip("\0").split("\0"))
    assert found.pop("PATH").startswith("/usr/local/sbin:")
    found.pop("PWD", None)  # of the shell
    found.pop("_", None)
    found.pop("SHLVL", None)
    assert found == {
        "FORWARDER_SERVER": server,
        "FORWARDER_HOST": host,
        "FORWARDER_PORT": port,
    }


def test_it_reads_nothing_and_has_signals_limits_and_descriptors_of_its_own(
    tmp_path: Path,
) -> None:
    """As any program does; the checker itself ignores some signals."""
    out = tmp_path / "out"
    before = {number: signal.signal(number, signal.SIG_IGN) for number in OF_A_MASTER[:3]}
    script = "cat; cat /proc/self/status; ulimit -Sn; ls -l /proc/self/fd; ps -o sid= -p $$"
    try:
        with socket.socket():
            outcome = ask(shell(f"{{ {script}; echo $$; }} > {out}"), SERVER)
    finally:
        for number, old in before.items():
            signal.signal(number, old)
    assert outcome.is_good, outcome
    text = out.read_text()
    status = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
    # The shell may block or ignore some itself, but none of those above.
    ignored = int(status["SigIgn"], 16)
    assert not any(ignored >> number - 1 & 1 for number in (*OF_A_MASTER, signal.SIGPIPE))
    assert int(status["SigBlk"], 16) == 0
    lines = text.split("\n")
    limit = next(line for line in lines if line.isdigit())
    assert int(limit) <= 1024
    assert "socket:" not in text
    assert "0 -> /dev/null" in text
    session, pid = (line.strip() for line in lines[-3:-1])
    assert session == pid


def test_one_that_does_not_end_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"echo asking; sleep 600 & echo $$ $! > {pids}; trap '' TERM; wait; {FOREVER}"
    outcome = ask(shell(script, timeout_s=SHORT_S), SERVER)
    assert (outcome.is_good, outcome.is_ours) == (False, False)
    assert outcome.why == "did not end within 0.2 s: asking"
    assert outcome.took_s < 10
    left = [int(pid) for pid in pids.read_text().split()]
    assert len(left) == 2
    eventually(lambda: not any(map(is_alive, left)), "something is alive")


def test_what_it_leaves_behind_is_ended_and_not_waited_for(tmp_path: Path) -> None:
    """A process that has the pipe keeps nobody waiting."""
    pids = tmp_path / "pids"
    outcome = ask(shell(f"sleep 600 & echo $! > {pids}; echo well"), SERVER)
    assert outcome[:2] == (True, "well")
    pid = int(pids.read_text())
    eventually(lambda: not is_alive(pid), f"{pid} is alive")


def test_one_that_writes_without_end_is_ended() -> None:
    outcome = ask(shell("while :; do echo xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx; done"), SERVER)
    assert outcome[:2] == (False, "wrote more than 64 KiB")


@pytest.mark.parametrize("turns", range(4))
def test_a_cancelled_one_is_killed_and_says_nothing(turns: int) -> None:
    with asking(shell(FOREVER), SERVER) as it:
        for _ in range(turns):
            it.turn()
        it.probe.cancel()
        it.until(lambda: not it.loop._watches)
        assert it.outcomes == []


def test_one_that_cannot_be_watched_is_reaped_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a descriptor for it, and before Linux 5.3."""

    def refuse(_pid: int) -> int:
        raise OSError

    monkeypatch.setattr(os, "pidfd_open", refuse)
    assert ask(shell("echo well"), SERVER)[:2] == (True, "well")
    assert not ask(shell(FOREVER, timeout_s=SHORT_S), SERVER).is_good
    with asking(shell(FOREVER), SERVER) as it:
        it.probe.cancel()


def test_with_many_that_the_kernel_does_not_let_go_of_no_more_are_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(child, "_MOST_STUCK", 0)
    outcome = ask(shell("exit 0"), SERVER)
    assert outcome.is_ours
    assert outcome.why == "cannot start /bin/sh: 0 that were killed have not ended yet"


def test_it_ends_with_the_checker_however_that_ends(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    code = f"""
import sys
from support.probing import asking, check, target
run = check("command", argv=("/bin/sh", "-c", "echo $$ > {pids}; exec {FOREVER}"))
with asking(run, target(("127.0.0.1", 80))) as it:
    print("started", flush=True)
    it.outcome()
"""
    here = str(Path(__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": here},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"started\n"
        eventually(lambda: pids.exists() and pids.read_text().endswith("\n"))
        pid = int(pids.read_text())
        assert is_alive(pid)
        process.kill()
    eventually(lambda: not is_alive(pid), f"{pid} is alive")
