"""Sessions that go on in another worker: asked for, passed on, settled; whoever dies meanwhile.

Theory of operation
-------------------
The master pulls: it asks a giver for some sessions, passes what comes on to a taker, and tells the
giver when they are taken. Only then it asks for more, so what is on its way is bounded, for each
giver by one consignment. It does not look into that. The giver keeps its descriptors until it is
told, and goes on with the sessions if they come back; the master keeps those of the consignment, in
case the giver dies. Whose the sessions are, whoever is killed when, its token says (``ipc.claim``).

::

    WAITING --ask--> ASKED --PARCELS--> OUT --TAKEN--> WAITING, or over if nothing is left
                                         |
                                         +-- refused, late, its taker dead --> back to the giver

If the giver is gone then, they wait here for a worker that takes them.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Final

from forwarder.ipc import claim
from forwarder.ipc.claim import Claimant
from forwarder.ipc.consignment import MAX_SESSIONS, Consignment, Refusal, read_taken
from forwarder.ipc.messages import Op
from forwarder.supervision import move_plan
from forwarder.supervision.givers import Departed
from forwarder.supervision.move_plan import Fate, Outcome, Taker
from forwarder.supervision.returns import Returns
from forwarder.system.daemonlog import warn_rarely

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from forwarder.ipc.channel import Message, Received
    from forwarder.supervision.givers import Giver, Workforce

log = logging.getLogger(__name__)

# An order of an operator is answered when nothing has moved for this long.
ORDER_WITHIN_S: Final = 3.0
# How often to see whether there is a taker for what waits for one. Arbitrary.
_LOOK_S: Final = 0.2


@dataclass(eq=False, slots=True)
class _Order:
    """What an operator wants moved: those that meet a choice, to the worker of a slot."""

    slot: int
    choice: Message
    callback: Callable[[Message], None]
    deadline: float
    outcome: Outcome = field(default_factory=Outcome)
    is_answered: bool = False


@dataclass(eq=False, slots=True)
class _Errand:
    """One giver, and what of its sessions is on its way; at most one consignment."""

    giver: Giver
    began_at: float
    ask_at: float | None  # None: there is nothing left to be asked for
    order: _Order | None = None
    share: int = 0  # sessions at a time; 0: not known yet
    left: int = 0  # by its last answer: could be moved, too; perhaps more
    busy: int = 0  # cannot be moved yet
    meant: int = 0  # of an order: no more sessions than these, whatever another one brings
    moved: int = 0
    failures: int = 0  # consignments in a row that came back
    deaths: int = 0  # of takers in a row that have not answered
    number: int = 0  # of what was asked for and is not settled; 0: nothing
    consignment: Consignment | None = None  # the answer
    rules: Mapping[str, int] = field(default_factory=dict)  # how many sessions of each are in it
    tries: int = 0  # to how many takers it was sent
    taker: int = 0  # the pid of who has it; 0: nobody
    look_at: float = 0.0  # when it is late, or may be sent to the next one

    @property
    def slot(self) -> int | None:
        """Where to, if not anywhere, as when they cannot go back."""
        return None if self.order is None or self.giver.is_gone else self.order.slot

    @property
    def next_look(self) -> float | None:
        """When there is something to do for it without an event."""
        if self.consignment is not None:
            return self.look_at
        return None if self.number else self.ask_at

    @property
    def is_over(self) -> bool:
        """Whether it can be forgotten: that of a worker that leaves only with the worker."""
        is_done = self.ask_at is None and not self.number
        return is_done and (self.order is not None or self.giver.is_gone)

    def settle(self, refused: Sequence[int] = ()) -> None:
        """Tell the giver with what it has to go on; the rest has another one now, or nobody."""
        if not self.giver.is_gone:
            self.giver.settle(self.number, refused)
        self.close()
        self.number = self.taker = self.tries = 0
        self.look_at = 0.0

    def close(self) -> None:
        """Close what is on its way."""
        if self.consignment is not None:
            self.consignment.close()
        self.consignment = None
        self.rules = {}


class Moves:
    """All sessions on their way. Owns the descriptors of the consignments."""

    def __init__(self, force: Workforce) -> None:
        """``force`` has the takers, and those givers that are workers of ours."""
        self._force = force
        force.report_to(self)
        self._errands: list[_Errand] = []
        self._orders: list[_Order] = []
        self._returns = Returns()
        self._avoided: dict[int, float] = {}  # pids of takers, until when
        self._is_ending = False
        # Numbers of an heir, which our workers may hear as well, are others.
        self._numbers = itertools.count((os.getpid() << 32) + 1)
        # Gets what nobody here has asked for; returns whether it has taken it.
        self.pass_on: Callable[[int, Received], bool] = lambda _pid, _received: False

    # -- what others ask

    @property
    def is_busy(self) -> bool:
        """Whether sessions are, or may be, on their way."""
        return bool(self._returns) or any(errand.number for errand in self._errands)

    def afloat(self) -> dict[str, int]:
        """How many sessions of each rule are on their way, and with no worker."""
        found = self._returns.rules()
        for errand in self._errands:
            found.update(errand.rules)
        return found

    def add(self, giver: Giver) -> None:
        """Take over all sessions of a giver, until it has none left or is gone."""
        now = time.monotonic()
        self._errands.append(_Errand(giver, began_at=now, ask_at=now))

    def adopt(self, name: str, consignments: Iterable[Consignment]) -> None:
        """Find workers for the sessions of a process that has died; it is called ``name``."""
        now = time.monotonic()
        for consignment in consignments:
            consignment.number = next(self._numbers)
            errand = _Errand(Departed(name), began_at=now, ask_at=None)
            errand.number, errand.consignment = consignment.number, consignment
            errand.rules = consignment.rules()
            self._errands.append(errand)

    @property
    def is_adopting(self) -> bool:
        """Whether sessions of a process that has died are on their way."""
        return any(isinstance(one.giver, Departed) and one.number for one in self._errands)

    def order(self, choice: Message, slot: int, callback: Callable[[Message], None]) -> str:
        """Move some sessions to the worker of a slot.

        Returns why not; if that is "", it is called back with the fields of an :class:`Outcome`.
        """
        now = time.monotonic()
        takers = self._force.takers(now)
        to = [one.pid for one in takers if one.slot == slot]
        if not to:
            slots = ", ".join(str(one.slot) for one in takers) or "none"
            return f"no worker is ready in slot {slot}; slots with one that is: {slots}"
        order = _Order(slot, choice, callback, now + ORDER_WITHIN_S)
        self._orders.append(order)
        self._errands += [
            _Errand(giver, began_at=now, ask_at=now, order=order, meant=giver.sessions())
            for giver in (*self._force.serving(), *self._force.leaving())
            if giver.pid not in to
        ]
        return ""

    def on_message(self, pid: int, received: Received) -> None:
        """PARCELS of a giver, or TAKEN of a worker. Raises ValueError or KeyError for nonsense."""
        if received.message["op"] == Op.PARCELS:
            self._on_parcels(pid, received)
            return
        number, refused, why = read_taken(received.message)
        self._returns.on_taken(pid, number)
        for errand in self._errands:
            if errand.number == number and errand.taker == pid and errand.consignment is not None:
                self._on_taken(errand, errand.consignment, sorted({*refused}), why)

    # -- as an undertaking

    @property
    def deadline(self) -> float | None:
        """When :meth:`turn` has something to do without an event; None for never."""
        now = time.monotonic()
        looks = [at for one in self._errands if (at := one.next_look) is not None]
        looks += [order.deadline for order in self._orders]
        # What is overdue waits for a taker, or for a count.
        return min((at if at > now else now + _LOOK_S for at in looks), default=None)

    def turn(self, now: float) -> None:
        """Ask givers, and see to what nobody has taken."""
        self._avoided = {pid: until for pid, until in self._avoided.items() if until > now}
        known = {errand.giver.pid for errand in self._errands if errand.order is None}
        for giver in () if self._is_ending else self._force.leaving():
            if giver.pid not in known:
                self.add(giver)
        for dead, rules, rest in self._returns.left_behind():
            if rest is None:
                self._lose(dead.name, rules, "no descriptors left")
            else:
                self.adopt(dead.name, [rest])
        for errand in self._errands:
            self._go_on(errand, now)
        self._errands = [errand for errand in self._errands if not errand.is_over]
        for order in [*self._orders]:
            self._look_at(order, now)

    def cancel(self) -> None:
        """The master stops: ask for nothing more. Givers get what no worker has, before DRAIN."""
        self._is_ending = True
        self.turn(time.monotonic())

    def close(self) -> None:
        """Give up what is left: nothing, unless we end by a failure.

        Givers go on with what nobody has claimed, when they notice.
        """
        self._returns.close()
        for errand in self._errands:
            consignment = errand.consignment
            if consignment is None:
                continue
            claimant = Claimant.NOBODY
            if errand.taker and not self._force.is_alive(errand.taker):
                with suppress(OSError):  # as in _deliver
                    claimant = claim.give_up(consignment.token)
            is_nobodys = errand.giver.is_gone and claimant is Claimant.OTHER
            if (errand.giver.is_dead or is_nobodys) and consignment.claim():
                consignment.abort()
            else:
                consignment.close()

    # -- asking

    def _go_on(self, errand: _Errand, now: float) -> None:
        if errand.consignment is not None:
            self._deliver(errand, errand.consignment, now)
        elif errand.giver.is_gone:  # perhaps before it has answered
            errand.number = 0
            errand.ask_at = None
        elif errand.number or errand.ask_at is None:
            return
        elif self._is_ending:
            self._end(errand, "the forwarder is stopping")
        elif now >= errand.ask_at and not self._force.must_recount:
            self._ask(errand, now)

    def _ask(self, errand: _Errand, now: float) -> None:
        giver, order = errand.giver, errand.order
        if any(one.number for one in self._errands if one.giver.pid == giver.pid):
            return  # by another order
        takers = self._takers(errand, now)
        if takers:
            errand.share = errand.share or move_plan.share(
                giver.sessions(), len(takers), MAX_SESSIONS
            )
            errand.number = next(self._numbers)
            giver.ask(errand.number, errand.share, None if order is None else order.choice)
        elif order is not None:
            self._end(errand, "the worker there is not ready any more")

    def _plan(self, errand: _Errand, now: float) -> None:
        """When to ask again, if at all."""
        left, busy, order = errand.left, errand.busy, errand.order
        if order is not None:  # is about what could be moved when it was given
            left, busy = 0 if order.is_answered else max(0, min(left, errand.meant)), 0
        errand.ask_at = move_plan.next_ask(left, busy, errand.failures, now)
        if errand.ask_at is None:
            self._end(errand)

    def _end(self, errand: _Errand, why: str = "") -> None:
        """There is nothing more to ask for; ``why`` not, if sessions may be left."""
        errand.ask_at = None
        if errand.order is not None:
            outcome = errand.order.outcome
            outcome.busy += errand.busy
            outcome.why = outcome.why or why
        elif errand.moved or (why and not self._is_ending):
            after_s = time.monotonic() - errand.began_at
            rest = f"; the rest stays there: {why}" if why else ""
            what = f"{errand.giver.name}: sessions={errand.moved} after_s={after_s:.1f}{rest}"
            log.log(logging.WARNING if why else logging.INFO, "master.moved from %s", what)

    def _takers(self, errand: _Errand, now: float) -> list[Taker]:
        """Who can take sessions of this giver, with those that are on their way to them."""
        takers = self._force.reachable() if self._is_ending else self._force.takers(now)
        out: Counter[int] = Counter()
        for one in self._errands:
            if one.consignment is not None:
                out[one.taker] += len(one.consignment)
        return [
            Taker(one.pid, one.slot, one.sessions + out[one.pid])
            for one in takers
            if one.pid != errand.giver.pid and errand.slot in (None, one.slot)
        ]

    def _on_parcels(self, pid: int, received: Received) -> None:
        """A giver has answered."""
        number, now = received.message["number"], time.monotonic()
        asked = [one for one in self._errands if one.number == number and one.giver.pid == pid]
        if not asked or asked[0].consignment is not None:
            if not self.pass_on(pid, received):
                raise ValueError("sessions that nobody has asked for")
            return
        errand = asked[0]
        if received.is_truncated:
            what = "no descriptors left to move sessions; raise the limit of open files"
            warn_rarely(log, what, f"master: {what}", logging.ERROR)
            errand.share = max(1, errand.share // 2)
            count = len(received.message["sessions"])  # type: ignore[arg-type]  # else: nonsense
            rules = Consignment.rules_of_truncated(received)
            if not errand.giver.is_foreign:
                self._returns.add_without_descriptors(errand.giver, errand.number, rules)
            self._take_back(errand, "no descriptors left", now, range(count))
            return
        consignment = Consignment.read(received)
        errand.left, errand.busy = consignment.left, consignment.busy
        errand.meant -= len(consignment)
        if not len(consignment):
            errand.number = errand.failures = 0
            self._plan(errand, now)
            return
        consignment.is_foreign = errand.giver.is_foreign
        errand.consignment, errand.rules = consignment, consignment.rules()
        self._deliver(errand, consignment, now)

    # -- what has come

    def _deliver(self, errand: _Errand, consignment: Consignment, now: float) -> None:
        """See to what nobody has taken yet."""
        giver, everything = errand.giver, range(len(consignment))
        if errand.taker and self._force.is_alive(errand.taker):
            is_late = now >= errand.look_at and not self._force.holds_back(errand.taker)
            # It may be stopped. What it has claimed is its own, whenever it says so.
            if is_late and not giver.is_gone and consignment.claim():
                self._avoid(errand.taker, now)
                self._take_back(errand, "the worker there does not answer", now, everything)
            return
        if errand.taker:
            errand.taker, errand.look_at = 0, now
            errand.deaths += 1
            with suppress(OSError):  # it is no token, so nobody will have them
                if claim.give_up(consignment.token) is Claimant.GIVER and not giver.is_dead:
                    errand.settle()  # it goes on with them
                    return
        taker = move_plan.choose(self._takers(errand, now), self._avoided)
        fate = move_plan.fate(
            has_giver=not giver.is_gone,
            has_taker=taker is not None,
            is_ending=self._is_ending,
            tries=errand.tries,
            deaths=errand.deaths,
        )
        if fate is Fate.BACK:
            self._take_back(errand, "the worker there has ended", now, everything)
        elif fate is Fate.RESET:
            self._reset(errand, consignment)
        elif fate is Fate.SEND and taker is not None and now >= errand.look_at:
            errand.taker, errand.look_at = taker.pid, now + move_plan.TAKEN_WITHIN_S
            errand.tries += 1
            self._force.carry(taker.pid, consignment)

    def _on_taken(
        self, errand: _Errand, consignment: Consignment, refused: list[int], why: str
    ) -> None:
        """A worker has answered."""
        now, taken = time.monotonic(), len(consignment) - len(refused)
        if refused and refused[-1] >= len(consignment):
            raise ValueError("an answer about sessions that were not sent")
        if why == Refusal.CLAIMED:
            errand.settle()  # the giver, who is gone for us, goes on with them
            return
        errand.deaths = 0
        errand.moved += taken
        if errand.order is not None:
            errand.order.outcome.moved += taken
            errand.order.deadline = now + ORDER_WITHIN_S
        if not refused:
            errand.failures = 0
            errand.settle()
            self._plan(errand, now)
        elif errand.giver.is_gone:
            self._avoid(errand.taker, now)
            self._keep(errand, consignment, refused, now)
        else:
            self._avoid(errand.taker, now)
            self._take_back(errand, why, now, refused)

    def _avoid(self, pid: int, now: float) -> None:
        self._avoided[pid] = now + move_plan.PASSED_OVER_S

    def _take_back(self, errand: _Errand, why: str, now: float, refused: Sequence[int]) -> None:
        """Let the giver go on with those that were not taken."""
        if errand.order is not None:
            errand.order.outcome.back += len(refused)
        consignment, number = errand.consignment, errand.number
        if consignment is not None and not errand.giver.is_foreign:  # that counts and logs itself
            self._returns.add(errand.giver, number, consignment, refused)
            errand.consignment = None
        errand.settle(refused)
        errand.failures += 1
        is_hopeless = why == Refusal.VERSION or errand.deaths >= move_plan.MOST_DEATHS
        if self._is_ending or is_hopeless or errand.order is not None:
            self._end(errand, why)
        else:
            self._plan(errand, now)

    def _keep(
        self, errand: _Errand, consignment: Consignment, refused: list[int], now: float
    ) -> None:
        """Others may get what was not taken, whose giver is gone."""
        rules = consignment.rules(refused)
        errand.failures += 1
        errand.taker, errand.look_at = 0, now + move_plan.pause(errand.failures)
        try:
            errand.consignment, errand.rules = consignment.only(refused), rules
        except OSError as err:  # they were reset
            self._lose(errand.giver.name, rules, err.strerror or str(err))
            errand.settle()

    def _reset(self, errand: _Errand, consignment: Consignment) -> None:
        """Nobody can go on with them, unless their giver does, who is only gone for us."""
        rules = errand.rules
        if not (errand.giver.is_dead or consignment.claim()):
            errand.settle()
            return
        consignment.abort()
        self._lose(errand.giver.name, rules, "no worker takes them")
        errand.settle()

    def _lose(self, giver: str, rules: Mapping[str, int], why: str) -> None:
        for rule, count in rules.items():
            self._force.lose(rule, count)
        what = f"{sum(rules.values())} sessions of {giver}, which is gone"
        log.error("master: %s, were reset: %s", what, why)

    # -- orders

    def _look_at(self, order: _Order, now: float) -> None:
        """Report what became of an order, when nothing more will."""
        own = [one for one in self._errands if one.order is order]
        if own and now < order.deadline and not self._is_ending:
            return
        self._orders.remove(order)
        order.is_answered = True
        for errand in own:
            errand.ask_at = None  # what has still to be settled will be
            if errand.number:
                order.outcome.silent.append(errand.giver.pid)
        order.callback(asdict(order.outcome))
