"""Starting the newly installed code beside the running one. Decides nothing about the old one.

The successor inherits the listening sockets by number, binds nothing twice, and says over a pipe
when all its workers serve. If the pipe ends without that, it has failed and the old one goes on.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from forwarder.inherit import FDS_VARIABLE
from forwarder.pidfile import FD_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forwarder.pidfile import PidFile

READY_VARIABLE: Final = "FORWARDER_READY_FD"
# A successor that is not ready by then has failed: it is killed, and the old one goes on.
UPGRADE_TIMEOUT_S: Final = 60.0
_READY: Final = b"R"


class Successor:
    """The process of the new code. Owns the read end of its pipe; the master reaps it."""

    def __init__(self, listeners: Sequence[int], pid_file: PidFile | None, now: float) -> None:
        """Execute the same command line anew. What it inherits stays ours, too.

        Raises OSError. Blocks until the new program is being executed.
        """
        self.deadline = now + UPGRADE_TIMEOUT_S
        self._read_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        environment = {
            **os.environ,
            FDS_VARIABLE: ",".join(map(str, listeners)),
            READY_VARIABLE: str(write_fd),
        }
        kept = [*listeners, write_fd]
        if pid_file is not None:
            environment[FD_VARIABLE] = str(pid_file.fileno())
            kept.append(pid_file.fileno())
        try:
            self._process = subprocess.Popen(
                [sys.executable, *sys.orig_argv[1:]],
                env=environment,
                pass_fds=kept,
            )
        except OSError:
            os.close(self._read_fd)
            raise
        finally:
            os.close(write_fd)
        self.pid = self._process.pid

    def fileno(self) -> int:
        """Readable when the successor is ready or has ended."""
        return self._read_fd

    def is_ready(self) -> bool | None:
        """True: it serves. False: it has failed. None: not decided yet."""
        try:
            said = os.read(self._read_fd, 1)
        except BlockingIOError:
            return None
        return said == _READY

    def kill(self) -> None:
        """End a successor that has failed; harmless if it has ended."""
        with suppress(OSError):
            self._process.kill()

    def close(self) -> None:
        """Close the pipe."""
        os.close(self._read_fd)
        self._process.returncode = 0  # the master reaps it; subprocess must not warn or wait


def tell_predecessor() -> None:
    """Say that we serve, if we were started by an upgrade. Says it once."""
    text = os.environ.pop(READY_VARIABLE, "")
    if text.isdigit():
        with suppress(OSError):  # a predecessor that has died meanwhile needs no answer
            os.write(int(text), _READY)
            os.close(int(text))


def has_predecessor() -> bool:
    """Whether an upgrade has started us and waits to hear that we serve."""
    return READY_VARIABLE in os.environ
