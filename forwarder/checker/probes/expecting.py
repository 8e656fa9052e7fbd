"""Answers that have to contain a text, or something that a pattern is found in.

A regular expression may take without end for some texts, and the server chooses the text. So it
gets LIMIT_S of the processor. One that needs more is not used for REST_S, and what it would have
judged meanwhile says nothing of its server. The interpreter looks for signals while it searches,
so that the handler of one can end that.
"""

from __future__ import annotations

import re
import signal
import time
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from forwarder.checker.probes.readers import GOOD, MOST_BYTES, Verdict
from forwarder.checker.probes.why import got

if TYPE_CHECKING:
    from forwarder.config.model import Check

# A sane expression takes less than a millisecond for MOST_BYTES. Both are arbitrary.
LIMIT_S: Final = 0.1
REST_S: Final = 60.0
_TOO_SLOW: Final = Verdict(
    False,
    f"the regular expression of expect took more than {LIMIT_S:g} s, and rests for {REST_S:g} s",
    is_ours=True,
)


class _TimeIsOverError(Exception):
    """Raised within a search."""


class Pattern:
    """A regular expression that never takes long. For the main thread."""

    __slots__ = ("_found", "_rests_until")

    def __init__(self, text: bytes) -> None:
        """``text`` is what the configuration has found right."""
        self._found = re.compile(text)
        self._rests_until = 0.0
        signal.signal(signal.SIGVTALRM, _on_time)

    def is_in(self, data: bytearray) -> bool | None:
        """Whether it is found in these; None if that would take too long."""
        if self._rests_until and time.monotonic() < self._rests_until:
            return None
        try:
            try:
                signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT_S)
                return self._found.search(data) is not None
            finally:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        except _TimeIsOverError:  # also if it came with the last step
            self._rests_until = time.monotonic() + REST_S
            return None


def _on_time(*_: object) -> None:
    raise _TimeIsOverError


class Expecting:
    """Waits until an answer contains a text, or a pattern is found in it; empty: for anything."""

    __slots__ = ("_data", "_expect", "_pattern")

    def __init__(self, check: Check) -> None:
        self._data = bytearray()
        self._expect = check.expect
        self._pattern = compiled(check.expect) if check.is_pattern else None

    @property
    def heard(self) -> bytes:
        """See :class:`Reader`."""
        return bytes(self._data)

    def read(self, data: bytes) -> Verdict | None:
        """See :class:`Reader`."""
        heard = self._data
        # What is new, and as much before it as a text may begin in.
        start = max(0, len(heard) - len(self._expect))
        heard += data[: MOST_BYTES - len(heard)]
        if self._pattern is None:
            is_found: bool | None = heard.find(self._expect, start) >= 0
        else:
            is_found = self._pattern.is_in(heard)
        if is_found is None:
            return _TOO_SLOW
        if is_found:
            return GOOD
        return Verdict(False, got(heard)) if len(heard) >= MOST_BYTES else None


@lru_cache(maxsize=256)  # a configuration has few; arbitrary
def compiled(text: bytes) -> Pattern:
    """The pattern of a check."""
    return Pattern(text)
