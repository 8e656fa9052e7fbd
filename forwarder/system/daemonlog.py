"""The program's own log, to stderr. It never waits for its reader.

stderr is often a pipe. When its reader stops reading, a write blocks once the pipe is full: the
master would then supervise no worker, and the workers serve no client. So lines that the reader
does not take are dropped, and counted in a line of the log as soon as it reads again. Not the
connection log: see ``connlog``.
"""

from __future__ import annotations

import logging
import os
import select
import time
from logging import WARNING
from typing import Final

from forwarder.system.printable import visible
from forwarder.system.rarely import Rarely

_FORMAT: Final = "%(asctime)s forwarder[%(process)d] %(levelname)s %(message)s"
# A pipe that is writable takes this much without blocking (PIPE_BUF, pipe(7)).
_PART_BYTES: Final = select.PIPE_BUF


class OneLine(logging.Formatter):
    """A message is one line, whatever names it has in it; only a traceback has more of them."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the interface
        """Everything but the traceback."""
        return visible(super().formatMessage(record))


class PatientHandler(logging.Handler):
    """Writes what a descriptor takes without waiting; the descriptor stays the caller's."""

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
        except OSError:  # the reader has gone for good
            self._lost += 1
        except Exception:  # noqa: BLE001 - a line that cannot be formatted, logging's own way
            self.handleError(record)

    def _write(self, text: str) -> bool:
        """Write ``text`` without waiting. Whether all was taken; a part may be."""
        left = text.encode(errors="backslashreplace")
        while left:
            if not self._poll.poll(0):
                return False
            left = left[os.write(self._fd, left[:_PART_BYTES]) :]
        return True


_rarely: Final = Rarely()


def warn_rarely(logger: logging.Logger, about: str, message: str, level: int = WARNING) -> bool:
    """Log what may happen many times a second: at once, then only now and then, with a count.

    Messages with the same ``about`` count together. Returns whether it was logged.
    """
    more = _rarely.note(about, time.monotonic())
    if more is not None:
        logger.log(level, "%s%s", message, more)
    return more is not None


class RareTracebacks(logging.Filter):
    """Passes an exception at once, and the same one from the same line only now and then.

    Any client may run into a bug, as often as it likes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rarely = Rarely()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write it."""
        if not record.exc_info or record.exc_info[0] is None:
            return True
        kind, _, traceback = record.exc_info
        while traceback is not None and traceback.tb_next is not None:
            traceback = traceback.tb_next
        place = (traceback.tb_frame.f_code.co_filename, traceback.tb_lineno) if traceback else ""
        more = self._rarely.note(f"{record.msg} {kind} {place}", time.monotonic())
        if more:
            record.msg = f"{record.msg}{more}"
        return more is not None


def start(*, verbose: bool) -> None:
    """Log to stderr from now on; ``verbose`` logs the end of every session, too."""
    handler = PatientHandler(2)
    handler.addFilter(RareTracebacks())
    handler.setFormatter(OneLine(_FORMAT))
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler])
    logging.getLogger("asyncio").setLevel(logging.WARNING)
