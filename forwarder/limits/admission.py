"""May this client have a session now? The limits of one rule, in one worker.

Decides together with all other workers, through the gate. Refuses no client itself; the relay does.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from forwarder.config.model import OnLimit
from forwarder.limits.gate import STUCK_S, Busy
from forwarder.limits.tables import key_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from forwarder.config.model import Rule
    from forwarder.limits.gate import Gate, Holder
    from forwarder.net.sockets import SockAddr

# While clients wait in the queue: how often to check whether other workers have made room. A
# session of this worker that ends is noticed at once. Arbitrary.
LOOK_AGAIN_S: Final = 0.05
_NO_ROOM: Final = "max_sessions_per_client, which cannot be kept for so many clients"


def client_host(address: SockAddr) -> str:
    """The name of a client in limits per client: all clients of a unix socket are one."""
    return address[0] if isinstance(address, tuple) else "unix"


class Admission:
    """The limits of a rule, whose row is ``row``, and those of the whole process.

    ``queues``: whether clients wait in the queue at a limit of the rule; see :meth:`reserve`.
    ``met``: the limit that the last client met that was refused or has to wait.
    """

    __slots__ = (
        "_has_rates",
        "_holder",
        "_limits",
        "_limits_clients",
        "_max_total",
        "_name",
        "_row",
        "_settle",
        "_waiting",
        "met",
        "queues",
    )

    def __init__(
        self, holder: Holder, rule: Rule, row: int, max_total: int, settle: Callable[[], None]
    ) -> None:
        """``max_total`` is of all rules together; 0 is no limit, as everywhere here.

        ``settle`` makes the gate count what the holder owes, now or as soon as possible.
        """
        self._holder = holder
        self._settle = settle
        self._limits = limits = rule.limits
        self._limits_clients = bool(limits.max_sessions_per_client or limits.rate_per_client)
        self._has_rates = bool(limits.rate or limits.rate_per_client)
        self._name = rule.name
        self._row = row
        self._max_total = max_total
        self.queues = limits.on_limit is OnLimit.QUEUE
        self.met = ""
        # What to call, once each, when there may be room; in the order of arrival.
        self._waiting: dict[Callable[[], None], None] = {}

    @property
    def is_settled(self) -> bool:
        """Whether a decision now would be right: see the gate."""
        return self._holder.gate.is_settled

    def key(self, client: str) -> int:
        """The key that a session of this client is held by."""
        return key_of(self._name, client) if self._limits.max_sessions_per_client else 0

    def admit(self, client: str) -> int | None:
        """Admit a client, if no limit is met. Returns the key that it is held by, or None.

        Raises Busy: ask again later.
        """
        holder, limits = self._holder, self._limits
        key, now = 0, 0.0
        if self._limits_clients:
            key = self.key(client)
        with holder as gate:
            if self._has_rates:
                now = time.monotonic()
            met = self._rule_limit_met(gate, now)
            if not met and self._limits_clients:
                met = self._client_limit_met(gate, client, key, now)
            if not met and not gate.hold(holder.mine, self._row, key):
                met = _NO_ROOM
            if not met and limits.rate:
                gate.pass_row(self._row, now, limits.rate)
        self.met = met
        return None if met else key

    # -- where clients wait in the queue: a place first, then a client

    def reserve(self) -> float:
        """Take a place for a client that is not known yet. Returns 0, or when to try again."""
        limits = self._limits
        try:
            with self._holder as gate:
                now = time.monotonic()
                self.met = self._rule_limit_met(gate, now)
                if self.met == "rate":
                    return gate.next_pass(self._row, now, limits.rate, limits.burst) or LOOK_AGAIN_S
                if self.met:
                    return LOOK_AGAIN_S
                gate.hold(self._holder.mine, self._row, 0)
                if limits.rate:
                    gate.pass_row(self._row, now, limits.rate)
        except Busy:
            self.met = ""
            return STUCK_S
        return 0.0

    def admit_reserved(self, client: str) -> int | None:
        """As :meth:`admit`, for a client with a reservation, which is used up."""
        limits = self._limits
        if not self._limits_clients:
            return 0
        key = self.key(client)
        mine = self._holder.mine
        with self._holder as gate:
            met = self._client_limit_met(gate, client, key, time.monotonic())
            gate.let_go(mine, self._row, 0)
            if not met and not gate.hold(mine, self._row, key):
                met = _NO_ROOM
            if met and limits.rate:
                gate.unpass_row(self._row, limits.rate)
        self.met = met
        return None if met else key

    def give_back(self) -> None:
        """A reservation was not needed."""
        self._holder.let_go(self._row, 0, self._limits.rate)
        self._settle()

    def wait(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` when a session of the rule has ended in this worker."""
        self._waiting[callback] = None

    def stop_waiting(self, callback: Callable[[], None]) -> None:
        """Forget a callback that found room by itself."""
        self._waiting.pop(callback, None)

    def wake_one(self) -> None:
        """There is room for one more."""
        for callback in self._waiting:
            del self._waiting[callback]
            callback()
            return

    def wake_all(self) -> None:
        """The limits have changed."""
        waiting, self._waiting = self._waiting, {}
        for callback in waiting:
            callback()

    # -- under the lock: which limit is met, or ""

    def _rule_limit_met(self, gate: Gate, now: float) -> str:
        limits = self._limits
        if self._max_total and gate.sessions(0) >= self._max_total:
            return "max_sessions of all rules"
        if limits.max_sessions and gate.sessions(self._row) >= limits.max_sessions:
            return "max_sessions"
        if limits.rate and not gate.may_pass(self._row, now, limits.rate, limits.burst):
            return "rate"
        return ""

    def _client_limit_met(self, gate: Gate, client: str, key: int, now: float) -> str:
        limits = self._limits
        if key and gate.sessions_of(key) >= limits.max_sessions_per_client:
            return "max_sessions_per_client"
        if limits.rate_per_client and not gate.pass_client(
            key_of(self._name, client), now, limits.rate_per_client, limits.burst_per_client
        ):
            return "rate_per_client"
        return ""
