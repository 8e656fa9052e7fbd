"""Run a command under the restrictions of a unit file, as far as they can be had without systemd.

    python sandbox.py UNIT RUNTIME_DIRECTORY LOGS_DIRECTORY -- COMMAND...

As root. The file system is read-only but for the two directories, other users' processes cannot be
seen, the user is nobody with the unit's capabilities, and system calls are filtered as systemd does
it (src/shared/seccomp-util.c): SystemCallFilter=, RestrictAddressFamilies=, RestrictNamespaces=,
MemoryDenyWriteExecute=. The default directory of control sockets is hidden, for another instance
may have one there. Not done: PrivateTmp= and PrivateDevices=, for tests are in /tmp.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from support.unitfile import read_unit, words

SCRIPT: Final = Path(__file__).resolve()
CONTROL: Final = Path("/run/forwarder")
USER: Final = 61184  # the first that DynamicUser= may choose
_CLONE_NEWNS: Final = 0x00020000
_NAMESPACES: Final = 0x7E020080  # all of the CLONE_NEW* flags
_ALLOW: Final = 0x7FFF0000
_MASKED_EQ: Final = 7  # libseccomp's enum scmp_compare
_EQ: Final = 4


def _error(number: int) -> int:
    return 0x00050000 | number


class _Comparison(ctypes.Structure):
    """struct scmp_arg_cmp of seccomp.h."""

    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
    )


class _Filter:
    """A seccomp filter; it is in force from :meth:`load` on, beside those that are already."""

    def __init__(self, default: int) -> None:
        self._lib = ctypes.CDLL("libseccomp.so.2")
        self._lib.seccomp_init.restype = ctypes.c_void_p
        self._context = ctypes.c_void_p(self._lib.seccomp_init(ctypes.c_uint32(default)))

    def add(self, action: int, name: str, *comparisons: tuple[int, int, int, int]) -> None:
        """A rule for a system call; one that this machine does not have is passed over."""
        number = self._lib.seccomp_syscall_resolve_name(name.encode())
        if number >= 0:
            array = (_Comparison * len(comparisons))(*(_Comparison(*c) for c in comparisons))
            done = self._lib.seccomp_rule_add_array(
                self._context, ctypes.c_uint32(action), number, len(comparisons), array
            )
            assert done == 0, (name, done)

    def load(self) -> None:
        """Restrict this process and all that it starts."""
        assert self._lib.seccomp_load(self._context) == 0


def allowed_calls(filters: list[str]) -> set[str]:
    """The system calls that lines of SystemCallFilter= leave."""
    allowed: set[str] = set()
    for line in filters:
        names = _expand(line.lstrip("~").split())
        allowed = allowed - names if line.startswith("~") else allowed | names
    return allowed


def _expand(names: list[str]) -> set[str]:
    found = {name for name in names if not name.startswith("@")}
    for group in set(names) - found:
        done = subprocess.run(
            ["systemd-analyze", "syscall-filter", group], capture_output=True, text=True, check=True
        )
        lines = [line.strip() for line in done.stdout.splitlines()[1:]]
        found |= _expand([line for line in lines if line and not line.startswith("#")])
    return found


def _mount_read_only(writable: list[str]) -> None:
    """A file system of our own, of which only the directories ``writable`` can be written to."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(_CLONE_NEWNS) == 0, os.strerror(ctypes.get_errno())
    _mount("--make-rprivate", "/")
    _hide_homes([sys.base_prefix, sys.prefix, str(SCRIPT.parents[2])], writable[0])
    for directory in writable:
        _mount("--bind", directory, directory)
    if CONTROL.exists():
        _mount("-t", "tmpfs", "hidden", str(CONTROL))
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    for target in {line.split()[4] for line in lines} - set(writable):
        # Some mounts are below others and cannot be reached; /dev/null has to stay what it is.
        if not target.startswith("/dev"):
            subprocess.run(
                ["mount", "-o", "remount,bind,ro", target], check=False, stderr=subprocess.DEVNULL
            )
    _mount("-t", "proc", "-o", "ro,hidepid=invisible", "proc", "/proc")


def _hide_homes(needed: list[str], spare: str) -> None:
    """ProtectHome=: hide directories that others may not enter, but what is ``needed`` of them."""
    aside: dict[str, str] = {}
    homes: set[str] = set()
    for path in needed:
        closed = [p for p in reversed(Path(path).parents) if not p.stat().st_mode & 1]
        if closed:
            homes.add(str(closed[0]))
            aside[path] = tempfile.mkdtemp(dir=spare)
            _mount("--bind", path, aside[path])
    for home in homes:
        _mount("-t", "tmpfs", "-o", "mode=755", "hidden", home)
    for path, kept in aside.items():
        Path(path).mkdir(parents=True, exist_ok=True)
        _mount("--move", kept, path)
        Path(kept).rmdir()


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def _filter_calls(unit: dict[str, list[str]]) -> None:
    no_namespaces = _Filter(_ALLOW)
    no_namespaces.add(_error(errno.ENOSYS), "clone3")  # its flags cannot be seen
    no_namespaces.add(_error(errno.EPERM), "setns")
    for bit in range(32):
        if _NAMESPACES >> bit & 1:
            for name in ("clone", "unshare"):
                no_namespaces.add(_error(errno.EPERM), name, (0, _MASKED_EQ, 1 << bit, 1 << bit))
    both = mmap.PROT_WRITE | mmap.PROT_EXEC
    no_namespaces.add(_error(errno.EPERM), "mmap", (2, _MASKED_EQ, both, both))
    for name in ("mprotect", "pkey_mprotect"):
        no_namespaces.add(
            _error(errno.EPERM), name, (2, _MASKED_EQ, mmap.PROT_EXEC, mmap.PROT_EXEC)
        )
    allowed = allowed_calls(unit["SystemCallFilter"])
    listed = _Filter(_error(getattr(errno, unit["SystemCallErrorNumber"][-1])))
    for name in sorted(allowed - {"socket"}):
        listed.add(_ALLOW, name)
    for family in words(unit, "RestrictAddressFamilies"):
        listed.add(_ALLOW, "socket", (0, _EQ, getattr(socket, family).value, 0))
    no_namespaces.load()
    listed.load()


def main() -> None:
    """Restrict ourselves and execute the command."""
    split = sys.argv.index("--")
    unit_path, runtime, logs, *stage = sys.argv[1:split]
    unit = dict(read_unit(Path(unit_path)))
    if not stage:
        _mount_read_only([runtime, logs])
        names = [name.lower() for name in words(unit, "AmbientCapabilities")]
        wanted = ",".join(["-all", *(f"+{name.removeprefix('cap_')}" for name in names)])
        command = [
            *("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--no-new-privs"),
            *(f"--inh-caps={wanted}", f"--ambient-caps={wanted}"),
            *(f"--bounding-set={wanted}", sys.executable, str(SCRIPT)),
            *(unit_path, runtime, logs, "restricted", *sys.argv[split:]),
        ]
        os.execvp(command[0], command)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = min(int(unit["LimitNOFILE"][-1]), hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    os.umask(int(unit["UMask"][-1], 8))
    os.environ.update(RUNTIME_DIRECTORY=runtime, LOGS_DIRECTORY=logs)
    _filter_calls(unit)
    command = sys.argv[split + 1 :]
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
