"""An event loop, as far as a relay needs one: any of asyncio's will do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable


class Timer(Protocol):
    """A call that is due some time."""

    def cancel(self) -> None:
        """Do not call."""


class Clock(Protocol):
    """The time, and calls that are due some time."""

    def time(self) -> float:
        """Seconds, of a clock that never goes back."""

    def call_later(self, delay: float, callback: Callable[[], object], /) -> Timer:
        """Call once, ``delay`` seconds from now."""


class Loop(Clock, Protocol):
    """A clock that also calls when there is something to read."""

    def call_soon(self, callback: Callable[[], object], /) -> object:
        """Call once, in the next turn of the loop."""

    def add_reader(self, fd: int, callback: Callable[[], object], /) -> object:
        """Call whenever ``fd`` is readable; the descriptor stays the caller's."""

    def remove_reader(self, fd: int, /) -> object:
        """Call no more for ``fd``."""
