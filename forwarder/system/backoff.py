"""How long to wait before the next attempt. Pure."""

from __future__ import annotations

from typing import Final

# Above every longest wait; a day of failures would overflow a float.
_MOST_DOUBLINGS: Final = 64


def backoff(failures: int, first_s: float, longest_s: float) -> float:
    """Seconds to wait after ``failures`` in a row, one at least.

    ``first_s`` after the first, twice as long after each further one, never above ``longest_s``.
    """
    return min(first_s * 2.0 ** min(failures - 1, _MOST_DOUBLINGS), longest_s)
