"""How often to log what may happen thousands of times a second. Pure.

At once when it begins, then every so often, with a count of what happened in between.
"""

from __future__ import annotations

from typing import Final

# A failing upstream of a busy rule fails thousands of times a second; log it this often at most.
INTERVAL_S: Final = 10.0
# Things to remember; one more replaces the one that may be logged again first. Arbitrary; usually
# more than there are rules that fail at the same time.
MAX_KNOWN: Final = 4096


class Rarely:
    """Remembers what was logged when. One for each process or part of it; does not log."""

    __slots__ = ("_interval_s", "_known")

    def __init__(self, interval_s: float = INTERVAL_S) -> None:
        self._interval_s = interval_s
        # When each thing may be logged again, which is their order, and how often it was left out.
        self._known: dict[str, tuple[float, int]] = {}

    def note(self, about: str, now: float) -> str | None:
        """Note that ``about`` has happened, at ``now``, in seconds of a monotonic clock.

        Returns None to leave it out this time; else what to add to the message: nothing, or how
        often it was left out since the last time.
        """
        until, unsaid = self._known.get(about, (now, 0))
        if now < until:
            self._known[about] = (until, unsaid + 1)
            return None
        self._known.pop(about, None)
        if len(self._known) >= MAX_KNOWN:
            del self._known[next(iter(self._known))]
        self._known[about] = (now + self._interval_s, 0)
        return f" ({unsaid} more since the last report)" if unsaid else ""
