"""Processes and listening sockets as an operator sees them, and running the command once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from support import procfs, sockdiag
from support.waiting import PATIENCE_S, eventually

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

COMMAND: Final = (sys.executable, "-m", "forwarder")
NOBODY: Final = 65534


def run_command(*arguments: str, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run the command until it ends by itself."""
    return subprocess.run(
        [*prefix, *COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE_S,
        check=False,
    )


def as_nobody() -> list[str]:
    """A prefix that runs a command without any privilege; nothing if we have none ourselves."""
    if os.geteuid():
        return []
    return ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]


def members(session: int) -> list[int]:
    """Processes of a session that still run (a zombie does not)."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):  # of */stat it fails where one has just gone
        with suppress(OSError):
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] not in "ZX":
                found.append(int(process.name))
    return sorted(found)


def state(pid: int) -> str:
    """The letter of proc(5): R, S, T when stopped, Z."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def suspend(pid: int) -> None:
    """Stop a process until SIGCONT; returns when it has stopped."""
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: state(pid) == "T")


def title(pid: int) -> str:
    """What ``ps`` shows."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0 ").decode()


def listeners(address: tuple[str, int]) -> int:
    """How many sockets listen on an IPv4 address."""
    return sum(sock.local == address for sock in sockdiag.listening())


def queued(address: tuple[str, int]) -> int:
    """How many connections wait to be accepted at an IPv4 address."""
    return sum(sock.waiting for sock in sockdiag.listening() if sock.local == address)


def owner(pids: Sequence[int], client: socket.socket) -> int:
    """Which process has accepted the connection of our client socket."""
    found: list[int] = []

    def is_accepted() -> bool:
        accepted = sockdiag.connected(client.getpeername(), client.getsockname())
        if accepted is not None:
            target = f"socket:[{accepted.inode}]"
            found[:] = [pid for pid in pids if target in procfs.descriptors(pid).values()]
        return bool(found)

    eventually(is_accepted, lambda: f"nobody has accepted {client}")
    return found[0]
