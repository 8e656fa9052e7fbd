"""May this client have a session now? The limits of one rule, in one worker.

Decides together with all other workers, through the gate. Refuses nobody itself; the relay does.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from forwarder.config.model import OnLimit
from forwarder.gate import Busy
from forwarder.limits import key_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from forwarder.config.model import Limits
    from forwarder.gate import Holder

# While clients wait in the queue: when to look whether another worker has room again. A session of
# this worker that ends is noticed at once. Arbitrary.
LOOK_AGAIN_S: Final = 0.05


class Admission:
    """The limits of a rule, whose row is ``row``, and those of the whole process."""

    __slots__ = (
        "_gate",
        "_holder",
        "_limits",
        "_max_total",
        "_row",
        "queues",
        "refused_for",
        "waiting",
    )

    def __init__(self, holder: Holder, limits: Limits, row: int, max_total: int) -> None:
        """``max_total`` is of all rules together; 0 is no limit, as everywhere here."""
        self._holder = holder
        self._gate = holder.gate
        self._limits = limits
        self._row = row
        self._max_total = max_total
        self.queues = limits.on_limit is OnLimit.QUEUE
        """Whether clients wait in the queue at a limit of the rule. See :meth:`reserve`."""
        self.refused_for = ""
        """Which limit the last one that was refused has met."""
        self.waiting: list[Callable[[], None]] = []
        """Called, once, when a session of the rule has ended in this worker."""

    def key(self, client: str) -> int:
        """As what a session of this client is held."""
        return key_of(self._row, client) if self._limits.max_sessions_per_client else 0

    def admit(self, client: str, *, is_reserved: bool = False) -> int | None:
        """Take a client in, if no limit is met. Returns the key that it is held by, or None.

        ``is_reserved``: it has a reservation, which becomes its place or is given back.
        """
        key = self.key(client)
        try:
            with self._gate.locked():
                met = "" if is_reserved else self._rule_limit_met()
                met = met or self._client_limit_met(client, key)
                if not met and not is_reserved:
                    met = self._rate_met()
                if is_reserved:
                    self._gate.let_go(self._holder.mine, self._row, 0)
                if not met and not self._gate.hold(self._holder.mine, self._row, key):
                    met = "max_sessions_per_client, which cannot be kept for so many clients"
        except Busy:
            met = "the lock of the limits"
        self.refused_for = met
        return None if met else key

    def reserve(self) -> float:
        """Take a place for a client that is not known yet. Returns 0, or when to try again."""
        try:
            with self._gate.locked():
                if self._rule_limit_met():
                    return LOOK_AGAIN_S
                if self._rate_met():
                    limits = self._limits
                    wait_s = self._gate.next_pass(
                        self._row, time.monotonic(), limits.rate, limits.burst
                    )
                    return max(wait_s, 0.001)
                self._gate.hold(self._holder.mine, self._row, 0)
        except Busy:
            return LOOK_AGAIN_S
        return 0.0

    def give_back(self) -> None:
        """A reservation was not needed."""
        self._holder.let_go(self._row, 0)

    def on_release(self) -> None:
        """A session of the rule has ended in this worker."""
        waiting, self.waiting = self.waiting, []
        for callback in waiting:
            callback()

    # -- under the lock: which limit is met, or ""

    def _rule_limit_met(self) -> str:
        if self._max_total and self._gate.sessions(0) >= self._max_total:
            return "max_sessions of all rules"
        limit = self._limits.max_sessions
        return "max_sessions" if limit and self._gate.sessions(self._row) >= limit else ""

    def _client_limit_met(self, client: str, key: int) -> str:
        limits = self._limits
        if key and self._gate.sessions_of(key) >= limits.max_sessions_per_client:
            return "max_sessions_per_client"
        if limits.rate_per_client and not self._gate.pass_client(
            key_of(self._row, client),
            time.monotonic(),
            limits.rate_per_client,
            limits.burst_per_client,
        ):
            return "rate_per_client"
        return ""

    def _rate_met(self) -> str:
        limits = self._limits
        if limits.rate and not self._gate.pass_row(
            self._row, time.monotonic(), limits.rate, limits.burst
        ):
            return "rate"
        return ""
