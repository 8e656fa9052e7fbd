"""The files of the connection log, opened by the master for the workers.

The master opens them because workers may run as a user who may not. It keeps them open, to lend
them to workers that start later, and reopens them on request.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from forwarder.errors import ExitCode, StartupError

if TYPE_CHECKING:
    from forwarder.config.model import LogPlace

log = logging.getLogger(__name__)

_STDERR: Final = 2
_MODE: Final = 0o640
# O_NONBLOCK: opening a pipe or a terminal must not wait for its other end. Without effect on a
# file. O_CREAT only where it is needed: with it Linux refuses what others own in a directory like
# /tmp (proc_sys_fs(5), protected_regular).
_FLAGS: Final = os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
# By datagrams to a daemon: the workers connect by themselves.
DAEMONS: Final = frozenset({"syslog", "journal"})

Opened: TypeAlias = "list[tuple[LogPlace, int | None]]"
"""Places, with a descriptor unless it is a daemon."""


class LogFiles:
    """The places of the connection log. Owns their descriptors.

    ``revision`` grows with every opening; workers that know an older one need the new places.
    """

    def __init__(self) -> None:
        self.revision = 0
        self.places: Opened = []

    def prepare(self, places: tuple[LogPlace, ...], *, is_strict: bool = False) -> Opened:
        """Open these, for :meth:`use` or :func:`discard`. Raises StartupError with none open.

        Optional places that cannot be opened become /dev/null, unless ``is_strict``.
        """
        opened: Opened = []
        try:
            for place in places:
                open_place = _open if is_strict else _open_or_do_without
                fd = None if place.to in DAEMONS else open_place(place)
                opened.append((place, fd))
        except BaseException:
            discard(opened)
            raise
        return opened

    def use(self, opened: Opened) -> None:
        """Write to these from now on."""
        discard(self.places)
        self.places = opened
        self.revision += 1

    def reopen(self) -> None:
        """Reopen the places, after their files were moved away. On failure keeps the old ones."""
        try:
            self.use(self.prepare(tuple(place for place, _ in self.places), is_strict=True))
        except StartupError as err:
            log.error("log.reopen: %s; going on with the old file", err)
        else:
            log.info("log.reopened places=%d", len(self.places))

    def close(self) -> None:
        """Close all."""
        discard(self.places)
        self.places = []


def discard(places: Opened) -> None:
    """Close the descriptors."""
    for _, fd in places:
        if fd is not None:
            os.close(fd)


def _open_or_do_without(place: LogPlace) -> int:
    """A descriptor for a place; of /dev/null if an optional one fails. Raises StartupError."""
    try:
        return _open(place)
    except StartupError as err:
        if not place.is_optional:
            raise
        log.warning("log.failed %s; going on without, until it is reopened", err)
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)


def _open(place: LogPlace) -> int:
    try:
        if place.to == "stderr":
            return os.dup(_STDERR)
        try:
            # For reading, too, so that a cut line is noticed. A pipe then opens without a reader,
            # and outlives one that goes away (fifo(7)); without a reader lines are lost once it is
            # full.
            return _open_at(place.to, os.O_RDWR)
        except FileNotFoundError:
            return _open_at(place.to, os.O_RDWR | os.O_CREAT)
        except PermissionError:  # it may be writable all the same
            return _open_at(place.to, os.O_WRONLY)
    except OSError as err:
        denied = isinstance(err, PermissionError)
        raise StartupError(
            f"{place.place}: cannot write the connection log to {place.to}: {err.strerror}; "
            "hint: its directory must exist and be writable for the user who starts the forwarder",
            ExitCode.NO_PERMISSION if denied else ExitCode.UNAVAILABLE,
        ) from err


def _open_at(path: str, how: int) -> int:
    """Open a path, unless another user could have made it lead there. Raises OSError.

    The master may write to any file, and workers perhaps to the directory of their log. Linux has
    rules like these for directories like /tmp (proc_sys_fs(5), protected_symlinks and
    protected_hardlinks), which can be turned off, and not for those that a single user owns.
    """
    directory = Path(path).parent.stat()
    is_foreign = directory.st_uid not in (0, os.geteuid())
    is_public = bool(directory.st_mode & stat.S_IWOTH)
    try:
        fd = os.open(path, _FLAGS | how | os.O_NOFOLLOW, _MODE)
    except OSError as err:
        if err.errno != errno.ELOOP:
            raise
        is_sticky = bool(directory.st_mode & stat.S_ISVTX)
        is_ours = Path(path).lstat().st_uid in (0, os.geteuid())
        if is_foreign or (is_public and not is_sticky) or not is_ours:
            raise OSError(errno.ELOOP, "it is a link that another user can lay") from err
        return os.open(path, _FLAGS | how, _MODE)  # /dev/stdout, say
    status = os.fstat(fd)
    if (
        stat.S_ISREG(status.st_mode)
        and status.st_nlink > 1
        and (is_public or (is_foreign and status.st_uid != directory.st_uid))
    ):
        os.close(fd)
        raise OSError(errno.EPERM, "it has other names, too, which another user can give it")
    return fd
