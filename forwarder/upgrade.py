"""Starting the newly installed code beside the running one. Decides nothing about the old one.

The successor inherits the listening sockets by number, binds nothing twice, and says over a pipe
when all its workers serve. If it ends without that, it has failed and the old one goes on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from forwarder.inherit import FDS_VARIABLE, LENT_VARIABLE, numbers_as_text
from forwarder.net.sockets import LentSocket
from forwarder.pidfile import FD_VARIABLE

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from forwarder.pidfile import PidFile

READY_VARIABLE: Final = "FORWARDER_READY_FD"
_CONTROL_VARIABLE: Final = "FORWARDER_CONTROL"
# A successor that is not ready by then has failed: it is ended, and the old one goes on.
UPGRADE_TIMEOUT_S: Final = 60.0
# The first lets its workers' sessions end, the second does not, the third leaves it no choice.
_GIVING_UP: Final = (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL)
_GIVING_UP_S: Final = 3.0  # between two of them; a master kills its own workers after 2 s
_READY: Final = b"R"
_READY_WITHOUT_SOME: Final = b"r"  # for some of the sockets it has no rule


class Successor:
    """The process of the new code. Owns the read end of its pipe; the master reaps it."""

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        pid_file: PidFile | None,
        control: str | None,
        now: float,
    ) -> None:
        """Execute the same command line anew. What it inherits stays ours, too.

        ``control`` is the path of our control socket, which it may replace.
        Raises OSError. Blocks until the new program is being executed.
        """
        self.deadline = now + UPGRADE_TIMEOUT_S
        self.has_dropped_some = False  # it turns handshakes away at sockets that it does not serve
        self._signals = list(_GIVING_UP)
        self._read_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        numbers = [sock.fileno() for sock in listeners]
        environment = {
            **os.environ,
            FDS_VARIABLE: numbers_as_text(numbers),
            LENT_VARIABLE: numbers_as_text(
                sock.fileno() for sock in listeners if isinstance(sock, LentSocket)
            ),
            READY_VARIABLE: str(write_fd),
            _CONTROL_VARIABLE: control or "",
        }
        kept = [*numbers, write_fd]
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
        """True: it serves. False: it is about to end. None: not decided yet."""
        try:
            said = os.read(self._read_fd, 1)
        except BlockingIOError:
            return None
        self.has_dropped_some = said == _READY_WITHOUT_SOME
        return said in (_READY, _READY_WITHOUT_SOME)

    def give_up(self, now: float) -> None:
        """Tell it to end, with more emphasis each time; at ``deadline`` is the next time."""
        self.deadline = now + _GIVING_UP_S
        number = self._signals.pop(0) if len(self._signals) > 1 else self._signals[0]
        with suppress(OSError):
            os.kill(self.pid, number)

    def close(self) -> None:
        """Close the pipe."""
        os.close(self._read_fd)
        self._process.returncode = 0  # the master reaps it; subprocess must not warn or wait


def tell_predecessor(*, has_dropped_some: bool) -> None:
    """Say that we serve, all that we have inherited or not, if an upgrade has started us; once."""
    text = os.environ.pop(READY_VARIABLE, "")
    if text.isdigit():
        with suppress(OSError):  # a predecessor that has died meanwhile needs no answer
            os.write(int(text), _READY_WITHOUT_SOME if has_dropped_some else _READY)
            os.close(int(text))


def release_predecessor() -> None:
    """Give up our end of its pipe without a word, as a forked child does."""
    text = os.environ.pop(READY_VARIABLE, "")
    if text.isdigit():
        with suppress(OSError):
            os.close(int(text))


def control_of_predecessor() -> str | None:
    """The path of the control socket of the master that started us, if it has one."""
    return os.environ.get(_CONTROL_VARIABLE) or None


def has_predecessor() -> bool:
    """Whether an upgrade has started us and waits to hear that we serve."""
    return READY_VARIABLE in os.environ
