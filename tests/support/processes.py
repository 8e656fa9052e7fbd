"""Processes and listening sockets as an operator sees them, and running the command once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from support.waiting import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMAND: Final = (sys.executable, "-m", "forwarder")
NOBODY: Final = 65534
_LISTEN: Final = "0A"
_ESTABLISHED: Final = "01"


def run_command(*arguments: str, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run the command until it ends by itself."""
    return subprocess.run(
        [*prefix, *COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_S,
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
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] not in "ZX":
                found.append(int(stat.parent.name))
    return sorted(found)


def state(pid: int) -> str:
    """The letter of proc(5): R, S, T when stopped, Z."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def title(pid: int) -> str:
    """What ``ps`` shows."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0 ").decode()


def _rows() -> list[list[str]]:
    return [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]


def _hexadecimal(address: tuple[str, int]) -> str:
    # The kernel prints the address as a number of this machine's byte order.
    number = int.from_bytes(socket.inet_aton(address[0]), sys.byteorder)
    return f"{number:08X}:{address[1]:04X}"


def listeners(address: tuple[str, int]) -> int:
    """How many sockets listen on an IPv4 address."""
    local = _hexadecimal(address)
    return sum(row[1] == local and row[3] == _LISTEN for row in _rows())


def queued(address: tuple[str, int]) -> int:
    """How many connections wait to be accepted at an IPv4 address."""
    local = _hexadecimal(address)
    waiting = [row[4] for row in _rows() if row[1] == local and row[3] == _LISTEN]
    return sum(int(column.partition(":")[2], 16) for column in waiting)


def owner(pids: Sequence[int], client: socket.socket) -> int:
    """Which process has accepted the connection of our client socket."""
    local, remote = _hexadecimal(client.getpeername()), _hexadecimal(client.getsockname())
    # The kernel tells its table in pieces: rows are missed while others come and go. Hence again.
    for _ in range(20):
        for row in _rows():
            if row[1:3] == [local, remote] and row[3] == _ESTABLISHED:
                wanted = f"socket:[{row[9]}]"
                for pid in pids:
                    for entry in Path(f"/proc/{pid}/fd").iterdir():
                        with suppress(OSError):
                            if str(entry.readlink()) == wanted:
                                return pid
        time.sleep(0.05)
    raise LookupError(local)
