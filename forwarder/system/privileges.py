"""Giving up rights for good, in a worker, after the master has bound the low ports for it.

The master stays root, but keeps only the capabilities that its work needs: a reload may have to
bind a low port again. It never reads client data.
"""

from __future__ import annotations

import ctypes
import grp
import os
import pwd
import resource
import struct
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from forwarder.errors import ExitCode, StartupError
from forwarder.system import kernel

_PR_SET_NO_NEW_PRIVS: Final = 38  # linux/prctl.h
_PR_CAPBSET_DROP: Final = 24
_CAPABILITY_VERSION_3: Final = 0x20080522  # linux/capability.h, as all below
_LAST_CAPABILITY: Final = 63
_NET_ADMIN: Final = 1 << 12
_NET_RAW: Final = 1 << 13
_PR_SET_KEEPCAPS: Final = 8
_MASTER_CAPABILITIES: Final = (
    1 << 0  # CHOWN: UDP listeners belong to the user of the workers
    | 1 << 1  # DAC_OVERRIDE: the configuration, pid file and control socket may be any user's
    | 1 << 5  # KILL: workers that run as another user
    | 1 << 6  # SETGID and SETUID: to start workers
    | 1 << 7
    | 1 << 10  # NET_BIND_SERVICE
    | 1 << 24  # SYS_RESOURCE: the limit of descriptors, and pipes beyond the user's budget
)


@dataclass(frozen=True, slots=True)
class Identity:
    """The user and group that a worker runs as, by number."""

    uid: int
    gid: int


def raise_descriptor_limit() -> None:
    """Raise the soft limit of descriptors to the hard one; for select() it is often 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS refuses "unlimited"; the soft limit then stays
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def identity_of(user: str | None, group: str | None) -> Identity | None:
    """Numbers of a user and a group; None for our own. The group defaults to the user's own.

    Reads the user database, which may block. Raises StartupError for an unknown name, and when this
    process may not become another user.
    """
    if user is None and group is None:
        return None
    uid, gid = os.geteuid(), os.getegid()
    try:
        if user is not None:
            entry = pwd.getpwnam(user)
            uid, gid = entry.pw_uid, entry.pw_gid
        if group is not None:
            gid = grp.getgrnam(group).gr_gid
    except KeyError as err:
        raise StartupError(
            f"no such user or group: {err.args[0]}; hint: `getent passwd`, `getent group`",
            ExitCode.CONFIG,
        ) from err
    if (uid, gid) == (os.geteuid(), os.getegid()):
        return None
    if os.geteuid() != 0:
        raise StartupError(
            f"user {user!r}, group {group!r}: only root can run its workers as another user; "
            "hint: start as root, or leave user and group out",
            ExitCode.NO_PERMISSION,
        )
    return Identity(uid, gid)


def network_capabilities() -> int:
    """Of our capabilities, those needed to set a mark or to use a client's address.

    CAP_NET_RAW is enough where the kernel accepts it for SO_MARK, too (Linux 5.17).
    """
    permitted = _permitted()
    if permitted & _NET_RAW and kernel.is_linux((5, 17)):
        return _NET_RAW
    return permitted & (_NET_ADMIN | _NET_RAW)


def _permitted() -> int:
    """The capabilities that this process may use."""
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    now = ctypes.create_string_buffer(24)
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).capget(header, now)
    numbers = struct.unpack("6I", now.raw)
    return int(numbers[1] | numbers[4] << 32)


def keep_capabilities_of_a_master(more: int = 0) -> None:
    """Give up every capability that a master does not need, also for programs it executes.

    ``more`` are those that the rules need. Does nothing unless it is root, and ignores refusals of
    the kernel: the workers' own drop is what counts.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() != 0:
        return
    for number in range(_LAST_CAPABILITY + 1):
        if not (_MASTER_CAPABILITIES | more) >> number & 1:
            libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    # Effective, permitted and inheritable, for capabilities 0 to 31 and then 32 to 63. In a
    # container some may be missing, and asking for one of those fails as a whole.
    kept = _permitted() & (_MASTER_CAPABILITIES | more)
    libc.capset(header, struct.pack("6I", kept, kept, 0, 0, 0, 0))


def drop(identity: Identity | None, kept: int = 0) -> None:
    """Become ``identity``, with no group but its own and no way back.

    With None it only closes the way up. A process that is not root then keeps no capability but
    ``kept``: a master may have one to bind low ports, and binds for its workers.
    Raises OSError; the caller must then not go on.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if identity is not None:
        if kept:
            libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0)  # across setresuid, until the next exec
        os.setgroups([])
        os.setresgid(identity.gid, identity.gid, identity.gid)
        os.setresuid(identity.uid, identity.uid, identity.uid)
    # No exec may ever raise rights again (setuid programs, file capabilities). prctl(2), Linux 3.5.
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.geteuid() != 0:
        kept &= _permitted()
        rights = struct.pack("6I", kept, kept, 0, 0, 0, 0)
        libc.capset(struct.pack("Ii", _CAPABILITY_VERSION_3, 0), rights)
