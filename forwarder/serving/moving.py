"""Servers that a name stands for come and go by themselves: when workers and checker are told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

# From one change to the next at the least: each is an assignment with all rules. Arbitrary; at a
# start answers come one by one.
REST_S: Final = 0.2


class Served(Protocol):
    """The service, as far as this asks it."""

    def has_other_members(self) -> bool:
        """Whether it would serve other servers than it does."""


class Moving:
    """What is served follows the answers about names that stand for several servers."""

    def __init__(
        self, service: Served, may_change: Callable[[], bool], on_changed: Callable[[], None]
    ) -> None:
        """``may_change``: whether what is served may change now, which is asked again each turn."""
        self._service = service
        self._may_change = may_change
        self._on_changed = on_changed
        self._is_noted = False
        self._rests_until = 0.0

    def note(self) -> None:
        """There are answers; they may be of other servers."""
        self._is_noted = True

    @property
    def deadline(self) -> float | None:
        """When :meth:`turn` has something to do without an event; None for never."""
        return self._rests_until if self._is_noted and self._may_change() else None

    def turn(self, now: float) -> None:
        """Have other servers served, if there are some."""
        if not self._is_noted or now < self._rests_until or not self._may_change():
            return
        self._is_noted = False
        if self._service.has_other_members():
            self._rests_until = now + REST_S
            self._on_changed()

    def cancel(self) -> None:
        """The workers get nothing more."""
        self._is_noted = False

    def close(self) -> None:
        """There is nothing to close."""
