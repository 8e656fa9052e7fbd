"""What to say of a check that failed, in a few words: for one line of a log and a terminal. Pure.

What a server or a command has sent is never shown as it is, and never in full.
"""

from __future__ import annotations

from typing import Final

from forwarder.config.check_values import show_bytes
from forwarder.system.printable import visible

# Of what was sent to us. Arbitrary; a line has room for as much beside the rest.
MOST_SHOWN: Final = 80


def of_error(strerror: str | None) -> str:
    """An error of the system, within a sentence."""
    text = strerror or "unknown error"
    # "Connection refused", but "RPC struct is bad" and "No XENIX semaphores".
    return text[0].lower() + text[1:] if text[1:2].islower() else text


def got(data: bytes | bytearray) -> str:
    """The beginning of an answer."""
    return f"got {quoted(data)}"


def quoted(data: bytes | bytearray) -> str:
    """The beginning of what a server has sent, in quotes, as it would stand in a configuration.

    Of text it is the first line.
    """
    beginning = bytes(data[: MOST_SHOWN + 1])
    line = beginning.splitlines()[0] if beginning else b""
    if not (line and line.isascii() and line.decode().isprintable()):
        line = beginning.rstrip()
    has_more = len(data.rstrip()) > len(line)
    shown = show_bytes(line)
    return f"'{shown[:MOST_SHOWN]}...'" if has_more or len(shown) > MOST_SHOWN else f"'{shown}'"


def last_line(output: bytes) -> str:
    """The last line that is not empty, of what a command has written; "" if there is none."""
    lines = output.decode(errors="backslashreplace").split("\n")
    return next((_cut(visible(found)) for line in reversed(lines) if (found := line.strip())), "")


def within(timeout_s: float) -> str:
    """A timeout, as part of a sentence."""
    return f"within {timeout_s:g} s"


def _cut(text: str) -> str:
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
