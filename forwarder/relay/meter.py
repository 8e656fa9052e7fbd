"""Bandwidth of a rule: what the ways of its sessions may move, and when they may go on.

Theory of operation
-------------------
All workers together keep one number per rule and way in shared memory: until when the line is
taken. Who wants to move draws a quantum if that time has passed, and so takes the line for as long
as the quantum lasts at the rate. What is moved beyond a quantum (a read is not cut into pieces) is
owed, and drawn for before more is moved. So the sum over all workers is the rate, and nobody has to
know how many they are.

A way that has to wait stops reading, so the window of its sender closes, as with a slow receiver;
one timer per rule and way lets those that wait go on, in turn. Nothing polls.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

from forwarder.gate import Busy

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from forwarder.gate import Gate

# A quantum lasts so long at the rate, within the bounds below: short enough to be smooth, long
# enough that drawing it costs nothing beside moving it. Arbitrary.
QUANTUM_S: Final = 0.01
SMALLEST_BYTES: Final = 4 * 1024
LARGEST_BYTES: Final = 256 * 1024
_BUSY_RETRY_S: Final = 0.001


class Waiting(Protocol):
    """A way of a session that waits for its turn."""

    def go_on(self) -> None:
        """Move more; called once for each time that it was told to wait."""


class Meter:
    """One way of all sessions of a rule in one worker."""

    def __init__(self, loop: AbstractEventLoop, gate: Gate, line: int, rate: float) -> None:
        """``rate`` is bytes per second; ``line`` the number of the way in the gate."""
        self._loop = loop
        self._gate = gate
        self._line = line
        self._rate = rate
        self._quantum = min(max(int(rate * QUANTUM_S), SMALLEST_BYTES), LARGEST_BYTES)
        self._left = 0  # drawn and not moved yet; less than 0: owed
        self._waiting: deque[Waiting] = deque()
        self._is_armed = False
        self._is_serving = False

    def room(self, way: Waiting) -> int:
        """How many bytes may be moved now; 0: ``way`` is called when it may go on."""
        if self._is_serving or not self._waiting:
            wait_s = self._draw()
            if not wait_s:
                return self._left
            self._arm(wait_s)
        self._waiting.append(way)
        return 0

    def room_now(self) -> int:
        """How many bytes may be moved now, for something that cannot wait."""
        return 0 if self._waiting or self._draw() else self._left

    def spend(self, moved: int) -> None:
        """So many bytes were moved."""
        self._left -= moved

    def _draw(self) -> float:
        """Have something left. Returns 0, or in how many seconds there may be."""
        while self._left <= 0:
            try:
                wait_s = self._gate.draw(self._line, time.monotonic(), self._quantum / self._rate)
            except Busy:
                return _BUSY_RETRY_S
            if wait_s > 0:
                return wait_s
            self._left += self._quantum
        return 0.0

    def _arm(self, wait_s: float) -> None:
        if not self._is_armed:
            self._is_armed = True
            self._loop.call_later(wait_s, self._serve)

    def _serve(self) -> None:
        """Let those that wait go on, each once, as long as there is something left."""
        self._is_armed = False
        turn, self._waiting = self._waiting, deque()
        wait_s = 0.0
        while turn and not (wait_s := self._draw()):
            self._is_serving = True
            try:
                turn.popleft().go_on()
            finally:
                self._is_serving = False
        turn.extend(self._waiting)  # who was not served stays in front
        self._waiting = turn
        if turn:
            self._arm(wait_s or self._draw())
