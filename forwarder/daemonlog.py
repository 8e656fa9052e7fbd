"""The log of the program itself, to stderr, without ever waiting for whoever reads it.

stderr is often a pipe. When its reader stops reading, a write blocks once the pipe is full: the
master would supervise nobody and the workers serve nobody. So lines that nobody takes are dropped,
and their number is told as soon as somebody reads again. Not the connection log: see ``connlog``.
"""

from __future__ import annotations

import logging
import os
import select
from typing import Final

_FORMAT: Final = "%(asctime)s forwarder[%(process)d] %(levelname)s %(message)s"
# A pipe that is writable takes so much without blocking (PIPE_BUF, pipe(7)).
_PART_BYTES: Final = select.PIPE_BUF


class PatientHandler(logging.Handler):
    """Writes to a descriptor, which stays the caller's, as far as that takes it at once."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self._lost = 0
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, or count it as lost."""
        try:
            line = self.format(record) + "\n"
            if self._lost and self._write(f"forwarder: {self._lost} lines of the log were lost\n"):
                self._lost = 0
            if self._lost or not self._write(line):
                self._lost += 1
        except OSError:  # the reader has gone for good; there is nobody to tell
            self._lost += 1
        except Exception:  # noqa: BLE001 - a line that cannot be formatted, logging's own way
            self.handleError(record)

    def _write(self, text: str) -> bool:
        """Whether all of it was taken; what was begun stands there without its end."""
        left = text.encode(errors="backslashreplace")
        while left:
            if not self._poll.poll(0):
                return False
            left = left[os.write(self._fd, left[:_PART_BYTES]) :]
        return True


def start(*, verbose: bool) -> None:
    """Log to stderr from now on; ``verbose`` logs the end of every session, too."""
    handler = PatientHandler(2)
    handler.setFormatter(logging.Formatter(_FORMAT))
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler])
    logging.getLogger("asyncio").setLevel(logging.WARNING)
