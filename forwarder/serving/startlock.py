"""One instance at a time looks for others and binds."""

from __future__ import annotations

import logging
import socket
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Generator

log = logging.getLogger(__name__)

# Ten thousand sockets are bound in well under a second.
START_LOCK_S: Final = 5.0


@contextmanager
def start_lock(patience_s: float = START_LOCK_S) -> Generator[bool]:
    """Let one instance at a time probe and bind, so that two that start together see each other.

    The lock is an abstract unix socket of this network namespace (unix(7)): the kernel frees it
    with the process. Blocks up to ``patience_s``; gives whether it is ours. A process that holds it
    longer is ignored at a start, with a warning.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as lock:
        until = time.monotonic() + patience_s
        is_ours = False
        while not is_ours:
            try:
                lock.bind("\0forwarder-start")
                is_ours = True
            except OSError:
                if time.monotonic() >= until:
                    break
                time.sleep(0.01)
        if not is_ours and patience_s:
            log.warning("start: another process holds the start lock; going on without it")
        yield is_ours
