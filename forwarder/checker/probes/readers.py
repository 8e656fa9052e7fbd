"""What answers mean, in whatever pieces they arrive. Pure.

A reader is given each piece, and says what the check has come to as soon as that is clear. It keeps
what a server sends within bounds.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from forwarder.checker.probes.agent_words import parse_words
from forwarder.checker.probes.why import got

if TYPE_CHECKING:
    from forwarder.checker.outcome import Advice

MOST_BYTES: Final = 16 * 1024
"""Of an answer; no more is looked at. As documented for ``expect``."""

# RFC 9112 section 4, with any end of line. A reason need not be there.
_STATUS: Final = re.compile(rb"HTTP/1\.[0-9] ([1-9][0-9]{2})(?: .*)?", re.DOTALL)
_HTTP: Final = b"HTTP/1."
_SWITCHING: Final = 101  # RFC 9110 15.2.2: the only code below 200 that is an answer
# What an agent has to say is a line; arbitrary.
_MOST_OF_A_LINE: Final = 1024
_ENDS_OF_LINES: Final = re.compile(rb"[\r\n]")


class Verdict(NamedTuple):
    """What an answer says of its server; ``is_ours``: nothing, as it cannot be judged.

    ``why`` is empty for a good one.
    """

    is_good: bool
    why: str = ""
    advice: Advice | None = None
    is_ours: bool = False


GOOD: Final = Verdict(is_good=True)


class Reader(Protocol):
    """What reads one answer. ``heard`` is what there is of it, to be shown if no more comes."""

    @property
    def heard(self) -> bytes:
        """The beginning of the answer, not longer than what is looked at."""

    def read(self, data: bytes) -> Verdict | None:
        """Go on with the next piece; None: it takes more. Not called after a verdict."""


class StatusLine:
    """Waits for the status of an answer of HTTP/1; headers and body are not looked at.

    Answers that only say that another one follows are skipped, with their headers (RFC 9110 15.2).
    """

    __slots__ = ("_data", "_good", "_is_skipping", "_line_at", "_looked_at")

    def __init__(self, good: tuple[tuple[int, int], ...]) -> None:
        """``good``: ranges of codes, the first and the last of each."""
        self._good = good
        self._data = bytearray()
        self._line_at = self._looked_at = 0
        self._is_skipping = False

    @property
    def heard(self) -> bytes:
        """See :class:`Reader`."""
        return bytes(self._data)

    def read(self, data: bytes) -> Verdict | None:
        """See :class:`Reader`."""
        heard = self._data
        heard += data[: MOST_BYTES - len(heard)]
        while (end := heard.find(b"\n", self._looked_at)) >= 0:
            line = bytes(heard[self._line_at : end]).removesuffix(b"\r")
            self._line_at = self._looked_at = end + 1
            if self._is_skipping:
                self._is_skipping = line != b""
                continue
            verdict = self._judge(line)
            if verdict:
                return verdict
        self._looked_at = len(heard)
        if not self._is_skipping:
            begun = heard[self._line_at : self._line_at + len(_HTTP)]
            if not _HTTP.startswith(begun):
                return Verdict(False, got(heard[self._line_at :]))
        return Verdict(False, got(heard)) if len(heard) >= MOST_BYTES else None

    def _judge(self, line: bytes) -> Verdict | None:
        """What a status line says; None: another one follows."""
        found = _STATUS.fullmatch(line)
        if found is None:
            return Verdict(False, got(line))
        code = int(found[1])
        if code < 200 and code != _SWITCHING:
            self._is_skipping = True
            return None
        if any(first <= code <= last for first, last in self._good):
            return GOOD
        return Verdict(False, f"http {code}")


class AgentLine:
    """Waits for the one line of an agent; without its end it is none, and might be half a word."""

    __slots__ = ("_data",)

    def __init__(self) -> None:
        self._data = bytearray()

    @property
    def heard(self) -> bytes:
        """See :class:`Reader`."""
        return bytes(self._data)

    def read(self, data: bytes) -> Verdict | None:
        """See :class:`Reader`."""
        heard = self._data
        heard += data[: _MOST_OF_A_LINE - len(heard)]
        end = _ENDS_OF_LINES.search(heard)
        if end is None:
            return Verdict(False, got(heard)) if len(heard) >= _MOST_OF_A_LINE else None
        line = bytes(heard[: end.start()])
        said = parse_words(line)
        if said is None:
            return Verdict(False, got(line))
        return Verdict(said.advice.is_up is not False, said.why, said.advice)
