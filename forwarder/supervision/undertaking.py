"""What a master does beside other things: one interface for all of it."""

from __future__ import annotations

from typing import Protocol


class Undertaking(Protocol):
    """A part of the master that acts when it is time. None of its methods blocks."""

    @property
    def deadline(self) -> float | None:
        """When :meth:`turn` has something to do without an event; None or infinite for never."""

    def turn(self, now: float) -> None:
        """Do what is due. Called at every turn of the master, also when nothing is."""

    def cancel(self) -> None:
        """The master begins to stop, or has to hurry: give up what only a running one needs."""

    def close(self) -> None:
        """At the end of the master: close and remove what is still its own. No turn follows."""
