"""Readers of a file are kept waiting, so that a test can catch a process that reads."""

from __future__ import annotations

import fcntl
import os
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def kept_from_readers(path: Path) -> Iterator[None]:
    """Whoever opens the file waits until this is left, or for ``lease-break-time``, 45 s.

    By a lease, see fcntl(2). The file must be one's own, and nobody may have it open.
    """
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)  # ignored by default; SIGIO would end us
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield
    finally:
        os.close(fd)
