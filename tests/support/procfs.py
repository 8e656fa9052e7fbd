"""What the kernel says of a process: descriptors, sockets, pipes, memory, children."""

from __future__ import annotations

import fcntl
import os
import struct
import termios
from contextlib import suppress
from pathlib import Path


def descriptors(pid: int) -> dict[int, str]:
    """Descriptor to what it is, such as ``socket:[123]``."""
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            found[int(entry.name)] = str(entry.readlink())
    return found


def without_pipes(pid: int) -> list[str]:
    """All descriptors but pipes, which a worker may keep in its pool; sorted by kind."""
    return sorted(
        target.partition("[")[0]
        for target in descriptors(pid).values()
        if not target.startswith("pipe:")
    )


def socket_count(pid: int) -> int:
    """How many sockets a process has open."""
    return sum(target.startswith("socket:") for target in descriptors(pid).values())


def pipe_count(pid: int) -> int:
    """How many ends of pipes a process has open."""
    return sum(target.startswith("pipe:") for target in descriptors(pid).values())


def bytes_in_pipes(pid: int) -> int:
    """Bytes that wait in the pipes of which ``pid`` has both ends."""
    ends: dict[str, list[int]] = {}
    for fd, target in descriptors(pid).items():
        if target.startswith("pipe:"):
            ends.setdefault(target, []).append(fd)
    return sum(_waiting(pid, fds[0]) for fds in ends.values() if len(fds) == 2)


def _waiting(pid: int, fd: int) -> int:
    try:
        own = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return 0  # closed meanwhile
    try:
        return waiting_in(own)
    finally:
        os.close(own)


def waiting_in(fd: int) -> int:
    """Bytes that wait in a pipe."""
    return int(struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0\0\0\0"))[0])


def holders(fd: int) -> dict[int, str]:
    """Who else has one of our descriptors, or the other end of our pipe: process ids and titles."""
    wanted = descriptors(os.getpid())[fd]
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if wanted in descriptors(int(process.name)).values():
                found[int(process.name)] = title(int(process.name))
    found.pop(os.getpid(), None)
    return found


def resident_kib(pid: int) -> int:
    """Memory that a process uses, shared pages included (VmRSS)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise LookupError(pid)


def children(pid: int) -> list[int]:
    """Processes started by any thread of ``pid`` that have not been waited for."""
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):
            found += map(int, (thread / "children").read_text().split())
    return sorted(found)


def credentials(pid: int) -> dict[str, str]:
    """Users, groups and capabilities, and all else that the kernel's status has."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def title(pid: int) -> str:
    """What a process calls itself; "" for one that has gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().partition("\0")[0].rstrip()
    except OSError:
        return ""


def cpu_s(pid: int) -> float:
    """Processor time that a process has used, in user and system mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def switches(pid: int) -> int:
    """How often a process has waited for something."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("voluntary_ctxt_switches:"):
            return int(line.split()[1])
    raise LookupError(pid)
