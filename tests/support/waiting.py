"""Waiting for something to become true, with a deadline in place of a guess."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

# Far above what anything here takes, so that a loaded machine does not fail a test.
PATIENCE_S: Final = 30.0
# Between two looks.
_SHORTEST_S: Final = 0.005
_LONGEST_S: Final = 0.05


def eventually(
    predicate: Callable[[], bool], what: object = "", within_s: float = PATIENCE_S
) -> None:
    """Return as soon as ``predicate`` holds; fail, saying ``what``, when it does not in time.

    ``what`` may be a callable that describes the state at the time of the failure.
    """
    began = time.monotonic()
    while not predicate():
        waited_s = time.monotonic() - began
        if waited_s > within_s:
            text = what() if callable(what) else what
            raise AssertionError(f"did not come true within {within_s:.0f} s: {text or predicate}")
        # Who waits long looks more rarely: others need the processors for what is waited for.
        time.sleep(min(max(_SHORTEST_S, waited_s / 20), _LONGEST_S))
