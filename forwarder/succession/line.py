"""The line of a successor to the master that started it: finding it, and reporting a failure by it.

Only what every command needs, since each may have been started as a successor.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Final

READY_VARIABLE: Final = "FORWARDER_READY_FD"
ENDING: Final = b"E"  # an exit status follows


def take() -> int | None:
    """Our end of the line to the master that started us, the first time; None if there is none."""
    text = os.environ.pop(READY_VARIABLE, "")
    try:
        os.fstat(int(text))
    except (ValueError, OSError):
        return None
    return int(text)


def tell_end(status: int) -> None:
    """Report how we end to a predecessor that waits for us to serve; it is not our parent."""
    fd = take()
    if fd is not None:
        with suppress(OSError):
            os.write(fd, ENDING + str(status).encode())
        os.close(fd)
