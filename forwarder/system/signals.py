"""Signals as a queue: a handler only notes the number and wakes the selector.

Python runs handlers between bytecodes of the main thread; acting there could interrupt any step of
the master. So :meth:`SignalQueue.take` hands the numbers to the loop, in order. Also describes how
a process ended, which may be by a signal.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import FrameType

OF_A_MASTER = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGCHLD,
)
"""The signals a master handles. A terminal or service manager sends some to all processes."""


def leave_to_the_master(*, but: Iterable[signal.Signals]) -> None:
    """In a forked child: ignore a master's signals, and give ``but`` their default action."""
    for number in OF_A_MASTER:
        signal.signal(number, signal.SIG_DFL if number in but else signal.SIG_IGN)


class SignalQueue:
    """Notes some signals while it is open. Owns its wake-up pipe."""

    def __init__(self, numbers: Iterable[signal.Signals]) -> None:
        """Install handlers for ``numbers``; the old ones come back with :meth:`close`."""
        self._pending: deque[signal.Signals] = deque()
        self._read_fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._old_wakeup = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, self._note) for number in numbers}

    def fileno(self) -> int:
        """Readable when a signal has come."""
        return self._read_fd

    def take(self) -> list[signal.Signals]:
        """The signals since the last call."""
        with suppress(BlockingIOError):
            while os.read(self._read_fd, 512):
                pass
        found = list(self._pending)
        for _ in found:
            self._pending.popleft()
        return found

    def close(self) -> None:
        """Restore the old handlers."""
        for number, old in self._old.items():
            signal.signal(number, old)
        signal.set_wakeup_fd(self._old_wakeup)
        os.close(self._read_fd)
        os.close(self._write_fd)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._pending.append(signal.Signals(number))


def describe_end(status: int) -> str:
    """How a process ended, from its status of waitpid(2)."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exit status {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:  # most real-time signals have no name, signal(7)
        return f"killed by signal {-code}"
