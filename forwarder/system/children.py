"""What a forked child of the master keeps of it."""

from __future__ import annotations

import gc
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

_FIRST: Final = 3  # after the standard ones


def keep_only(kept: Iterable[int]) -> None:
    """Close every descriptor of this process but the standard ones and ``kept``.

    For a child that was forked just now and ends with ``os._exit``: objects inherited from the
    parent still name descriptors that are closed here, and the child uses their numbers again. Such
    an object would close a descriptor of the child if it were collected. So the collector is
    frozen, and the caller runs the child from where it forked, so that its frames hold the other
    objects.
    """
    gc.freeze()
    signal.set_wakeup_fd(-1)
    first = _FIRST
    for fd in sorted({fd for fd in kept if fd >= _FIRST}):
        os.closerange(first, fd)
        first = fd + 1
    os.closerange(first, _table_size())


def fill_standard() -> None:
    """Open /dev/null in the place of standard descriptors that our parent has closed.

    Else what is opened next would get such a number, which every child keeps. Call it before
    anything else is opened. Raises OSError where there is no /dev/null.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) < _FIRST:  # the lowest that is free, open(2)
        os.set_inheritable(fd, True)  # as they are usually
    os.close(fd)


def _table_size() -> int:
    """A number a little above every open descriptor: FDSize in proc_pid_status(5).

    Before close_range(2), Linux 5.9, each number below it costs a system call, and the limit of
    open files may be a thousand million.
    """
    with suppress(OSError):  # not Linux, or no descriptor left to read it
        for line in Path("/proc/self/status").read_bytes().splitlines():
            if line.startswith(b"FDSize:"):
                return int(line.split()[1])
    return os.sysconf("SC_OPEN_MAX")
