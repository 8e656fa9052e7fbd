"""The limits of all rules in this worker: what admits clients, and what meters their bytes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, Protocol

from forwarder.config.model import Limits
from forwarder.limits.admission import Admission, client_host
from forwarder.limits.gate import STUCK_S
from forwarder.limits.meter import Meter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from forwarder.config.model import Rule
    from forwarder.limits.gate import Holder
    from forwarder.net.sockets import SockAddr
    from forwarder.system.loop import Clock

log = logging.getLogger(__name__)

_NONE: Final = Limits()


class Ruled(Protocol):
    """The upstreams of a rule, whose ``row`` is the place of its numbers."""

    rule: Rule
    row: int


class Held(Protocol):
    """A session. ``held_as``: the key that the gate holds it by; None: not at all."""

    held_as: int | None
    client_address: SockAddr

    @property
    def pool(self) -> Ruled:
        """Which rule it is of."""

    def put_under(self, meters: tuple[Meter, Meter]) -> None:
        """Let each direction ask its meter before it moves. Not while an event is handled."""


class Restrictions:
    """By the row of a rule; a rule without limits is in neither table.

    ``meters`` are those of ``c2u`` and of ``u2c``; ``holder`` is the gate.
    """

    def __init__(
        self,
        loop: Clock,
        holder: Holder,
        defer: Callable[[Callable[[], None]], None],
    ) -> None:
        """``defer``: see ``Poller.defer``."""
        self.admissions: dict[int, Admission] = {}
        self.meters: dict[int, tuple[Meter, Meter]] = {}
        self._loop = loop
        self._defer = defer
        self.holder = holder
        self._known: dict[int, Rule] = {}
        self._max_total = 0
        # Meters are for good: sessions that have one keep it, whatever becomes of their rule.
        self._made: dict[int, tuple[Meter, Meter]] = {}
        self._undecided: list[Callable[[], None]] = []
        self._is_armed = self._is_settling = False

    @property
    def has_undecided(self) -> bool:
        """Whether clients that were accepted wait for a decision."""
        return bool(self._undecided)

    # -- limits that change

    def apply(self, pools: Iterable[Ruled], max_total: int, sessions: Iterable[Held]) -> None:
        """Apply the limits of these rules from now on; ``max_total`` is of all rules together.

        Sessions that have begun are counted as the limits want it, and none is ended. Those of
        rules that are gone keep their bandwidth.
        """
        every = {pool.row: pool.rule for pool in pools}
        wanted = {row: rule for row, rule in every.items() if max_total or rule.limits != _NONE}
        if not (wanted or self._known or self._made):
            return
        for row in wanted.keys() | self._known.keys():
            self._make_admission(row, wanted.get(row), max_total)
        for row, rule in every.items():
            self._make_meters(row, rule.limits.bandwidth)
        self._known, self._max_total = wanted, max_total
        for session in sessions:
            self._hold_as_wanted(session)
            meters = self.meters.get(session.pool.row)
            if meters is not None:
                session.put_under(meters)
        self._settle()

    def _make_admission(self, row: int, rule: Rule | None, max_total: int) -> None:
        if rule is not None and max_total == self._max_total:
            known = self._known.get(row)
            if known is not None and (known.name, known.limits) == (rule.name, rule.limits):
                return
        former = self.admissions.pop(row, None)
        if rule is not None and (rule.limits.has_admission or max_total):
            self.admissions[row] = Admission(self.holder, rule, row, max_total, self._settle)
        if former is not None:
            former.wake_all()

    def _make_meters(self, row: int, bandwidth: float) -> None:
        for meter in self._made.get(row, ()):
            meter.set_rate(bandwidth)
        if bandwidth:
            self.meters[row] = self._made_for(row, bandwidth)
        else:
            self.meters.pop(row, None)

    def _made_for(self, row: int, bandwidth: float) -> tuple[Meter, Meter]:
        """The meters of a row, made if there were none."""
        pair = self._made.get(row)
        if pair is None:
            gate = self.holder.gate
            c2u, u2c = (Meter(self._loop, gate, 2 * row + one, bandwidth) for one in (0, 1))
            pair = self._made[row] = (c2u, u2c)
        return pair

    def wanted(self, session: Held) -> int | None:
        """The key that a session should be held by; None: not at all."""
        admission = self.admissions.get(session.pool.row)
        if admission is not None:
            return admission.key(client_host(session.client_address))
        return 0 if self._max_total else None  # of a rule that is gone

    def _hold_as_wanted(self, session: Held) -> None:
        row, key = session.pool.row, self.wanted(session)
        if key == session.held_as:
            return
        if session.held_as is not None:
            self.holder.let_go(row, session.held_as)
        if key is not None:
            self.holder.hold(row, key)
        session.held_as = key

    # -- sessions that go on in another worker

    def pass_on(self, session: Held) -> None:
        """A session goes to another worker: it stays counted, but we do not hold it any more."""
        if session.held_as is not None:
            self.holder.pass_on(session.pool.row, session.held_as)
            session.held_as = None
            self.settle_soon()

    def take_on(self, session: Held, held_as: int | None, *, is_foreign: bool) -> None:
        """A session has come from another worker, which has held it so; None: not at all.

        Unless it is another instance's, one of a rule that is gone keeps its bandwidth.
        """
        row, bandwidth = session.pool.row, session.pool.rule.limits.bandwidth
        if held_as is not None:
            self.holder.take_on(row, held_as)
            session.held_as = held_as
        self._hold_as_wanted(session)
        meters = self.meters.get(row)
        if meters is None and bandwidth and not is_foreign:
            meters = self._made_for(row, bandwidth)
        if meters is not None:
            session.put_under(meters)
        self.settle_soon()

    # -- sessions that end, clients that have to wait

    def let_go(self, session: Held) -> None:
        """A session that was held has ended. All of a batch are counted at once, at its end."""
        row, key = session.pool.row, session.held_as
        if key is not None:
            session.held_as = None
            self.holder.let_go(row, key)
            self.settle_soon()
            admission = self.admissions.get(row)
            if admission is not None:
                admission.wake_one()

    def settle_soon(self) -> None:
        """Count what the holder owes at the end of the batch, or when the lock is free."""
        if not self._is_settling:
            self._is_settling = True
            self._defer(self._settle)

    def leave_server(self, row: int, *, is_awaited: bool) -> None:
        """A session of a server has ended; it is counted as :meth:`settle_soon` does.

        Unless nobody waits for its place: then with the next decision, or within STUCK_S.
        """
        self.holder.leave_server(row)
        if is_awaited:
            self.settle_soon()
        elif not self._is_armed:
            self._arm()

    def decide_later(self, decide: Callable[[], None]) -> None:
        """The lock cannot be taken: call again. Listeners rest meanwhile, so these are few.

        ``decide`` may come here again.
        """
        self._undecided.append(decide)
        self._arm()

    def _settle(self) -> None:
        self._is_settling = False
        if not self.holder.settle():
            self._arm()

    def _arm(self) -> None:
        if not self._is_armed:
            self._is_armed = True
            self._loop.call_later(STUCK_S, self._try_again)

    def _try_again(self) -> None:
        self._is_armed = False
        self._settle()
        if self._undecided and not self.holder.gate.is_settled:
            self._arm()
            return
        undecided, self._undecided = self._undecided, []
        for decide in undecided:
            try:
                decide()
            except Exception:  # as in Poller: a bug must cost one session, not the worker
                log.exception("relay.bug while deciding about a client")
