"""Giving up rights for good, in a worker, after the master has bound the low ports for it.

The master keeps its own: a reload may have to bind a low port again. It never reads client data.
"""

from __future__ import annotations

import ctypes
import grp
import os
import pwd
from dataclasses import dataclass
from typing import Final

from forwarder.errors import ExitCode, StartupError

_PR_SET_NO_NEW_PRIVS: Final = 38  # linux/prctl.h


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom a worker runs as, by number."""

    uid: int
    gid: int


def identity_of(user: str | None, group: str | None) -> Identity | None:
    """Numbers of a user and a group; None for neither. The group defaults to the user's own.

    Reads the user database, which may block. Raises StartupError for an unknown name, and when this
    process may not become somebody else.
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
            f"user {user!r}, group {group!r}: only root can run its workers as somebody else; "
            "hint: start as root, or leave user and group out",
            ExitCode.NO_PERMISSION,
        )
    return Identity(uid, gid)


def drop(identity: Identity | None) -> None:
    """Become ``identity``, with no group but its own and no way back; None only closes the way up.

    Raises OSError; the caller must then not go on.
    """
    if identity is not None:
        os.setgroups([])
        os.setresgid(identity.gid, identity.gid, identity.gid)
        os.setresuid(identity.uid, identity.uid, identity.uid)
    # No exec may ever raise rights again (setuid programs, file capabilities). prctl(2), Linux 3.5.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
