"""The limits of all rules in this worker: who decides about clients, and who meters their bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from forwarder.config.model import Limits
from forwarder.relay.admission import Admission
from forwarder.relay.meter import Meter

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Iterable

    from forwarder.gate import Holder
    from forwarder.relay.flow import Flow
    from forwarder.relay.session import Session
    from forwarder.upstream.pool import Pool

_NONE: Final = Limits()


class Restrictions:
    """By the row of a rule; a rule without limits is in neither table.

    ``meters`` are those of ``c2u`` and of ``u2c``.
    """

    def __init__(self, loop: AbstractEventLoop, holder: Holder | None) -> None:
        self.admissions: dict[int, Admission] = {}
        self.meters: dict[int, tuple[Meter, Meter]] = {}
        self._loop = loop
        self._holder = holder
        self._known: dict[int, Limits] = {}
        self._max_total = 0

    @property
    def holder(self) -> Holder:
        """The gate; asked for only where there are limits."""
        if self._holder is None:
            raise RuntimeError("a relay without a gate has got a rule with limits")
        return self._holder

    def apply(
        self, pools: Iterable[Pool], max_total: int, sessions: Iterable[Session | Flow]
    ) -> None:
        """Have the limits of these rules from now on; ``max_total`` is of all rules together.

        Sessions that have begun are counted as the limits want it, and none is ended.
        """
        wanted = {
            pool.row: pool.rule.limits for pool in pools if max_total or pool.rule.limits != _NONE
        }
        if wanted == self._known and max_total == self._max_total:
            return
        for row, limits in wanted.items():
            if limits != self._known.get(row) or max_total != self._max_total:
                self._make(row, limits, max_total)
        for row in self._known.keys() - wanted.keys():
            self.admissions.pop(row, None)
            self.meters.pop(row, None)
        self._known, self._max_total = wanted, max_total
        for session in sessions:
            self._hold_as_wanted(session)

    def let_go(self, session: Session | Flow) -> None:
        """A session that was held has ended."""
        row, key = session.pool.row, session.held_as
        if key is not None:
            session.held_as = None
            self.holder.let_go(row, key)
            admission = self.admissions.get(row)
            if admission is not None:
                admission.on_release()

    def _make(self, row: int, limits: Limits, max_total: int) -> None:
        self.admissions.pop(row, None)
        if limits.has_admission or max_total:
            self.admissions[row] = Admission(self.holder, limits, row, max_total)
        old = self._known.get(row)
        if old is not None and old.bandwidth == limits.bandwidth:
            return  # what is owed stays owed
        self.meters.pop(row, None)
        if limits.bandwidth:
            gate = self.holder.gate
            c2u, u2c = (Meter(self._loop, gate, 2 * row + n, limits.bandwidth) for n in (0, 1))
            self.meters[row] = (c2u, u2c)

    def _hold_as_wanted(self, session: Session | Flow) -> None:
        row = session.pool.row
        admission = self.admissions.get(row)
        key = None if admission is None else admission.key(str(session.client_address[0]))
        if key == session.held_as:
            return
        if session.held_as is not None:
            self.holder.let_go(row, session.held_as)
        if key is not None:
            self.holder.hold(row, key)
        session.held_as = key
