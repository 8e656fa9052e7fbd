"""What is thought of one server, and of the servers of a group together. Pure.

Theory of operation
-------------------
A server is usable (UP), usable and not at its full weight yet (SLOW), or not usable: DOWN by its
checks, EJECTED by failed connects, UNKNOWN before its first check. Checks change that by so many
in a row, but the first one of all decides alone: before it there is nothing but a guess.

Failed connects eject a server for a time that grows with each ejection. Where there is a check it
is asked, too: the first ejection lasts until a check passes; one that follows soon, because clients
fail where checks pass, lasts its time and then until a check passes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Final, NamedTuple

from forwarder.balancing.table import FULL, Standing
from forwarder.checker.outcome import Advice, Word
from forwarder.config.model import CheckKind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forwarder.checker.outcome import Outcome
    from forwarder.config.model import Group

# The longest ejection; and so long after its return the ejections of a server are forgotten.
LONGEST_EJECTION_S: Final = 300.0
# Where a slow start begins, in thousandths, and its steps: each lets all workers weigh anew.
SLOW_FROM: Final = FULL // 10
SLOW_STEPS: Final = 50
_SHORTEST_STEP_S: Final = 0.1

_NO_ADVICE: Final = Advice()
_USABLE: Final = frozenset({Standing.UP, Standing.SLOW})


class What(StrEnum):
    """What has become of a server."""

    DOWN = "down"
    UP = "up"
    EJECTED = "ejected"
    RETURNED = "returned"
    FAILING = "failing"  # the first failed check of one that is up
    RECOVERING = "recovering"  # the first passed check of one that is down
    REASON = "reason"  # another reason why it is down; no change
    REMARK = "remark"  # something else is worth knowing of one that is up; no change


class Event(NamedTuple):
    """A change to be logged: ``after`` so many checks or connects in a row, because of ``why``."""

    what: What
    why: str
    after: int


@dataclass(frozen=True, slots=True)
class State:
    """What is thought of a server; times are monotonic seconds.

    ``good`` and ``bad`` are outcomes in a row that have changed nothing yet. ``is_checked``: a
    check has ended at least once. ``ejections`` are those that are not forgotten; before
    ``back_at`` an ejected server does not return. ``advice`` is all that its agent has said.
    """

    standing: Standing
    since: float
    good: int = 0
    bad: int = 0
    is_checked: bool = False
    why: str = ""
    ejections: int = 0
    back_at: float = 0.0
    advice: Advice = _NO_ADVICE

    @property
    def is_usable(self) -> bool:
        """Whether it may get sessions, as far as checks and connects go."""
        return self.standing in _USABLE

    @property
    def is_changing(self) -> bool:
        """Whether its next check should come soon."""
        return (
            self.bad > 0 or self.good > 0 or self.standing in (Standing.UNKNOWN, Standing.EJECTED)
        )


Change = tuple[State, tuple[Event, ...]]


def first(group: Group, now: float) -> State:
    """Of a server that nothing is known of."""
    check = group.check
    is_unknown = check is not None and check.starts_down
    return State(Standing.UNKNOWN if is_unknown else Standing.UP, now)


def resumed(
    standing: Standing, since: float, group: Group, now: float, *, is_checked: bool
) -> State:
    """Of a server as another checker has left it."""
    state = State(standing, since, is_checked=is_checked)
    if standing is Standing.EJECTED:
        state = replace(state, ejections=1, back_at=since + group.eject_s)
    return adapted(state, group, now)[0]


def adapted(state: State, group: Group, now: float) -> Change:
    """The state under another configuration of the same server: it stays, if it still can."""
    check = group.check
    advice = state.advice if check and check.kind is CheckKind.AGENT else _NO_ADVICE
    state = replace(state, good=0, bad=0, advice=advice)
    if state.standing is Standing.SLOW and not group.slow_start_s:
        state = replace(state, standing=Standing.UP)
    if state.standing is Standing.EJECTED and not group.fail:
        return _back(state, now, Event(What.RETURNED, "failed connects do not count any more", 0))
    if check is None and state.standing in (Standing.DOWN, Standing.UNKNOWN):
        return _back(state, now, Event(What.UP, "there is no check any more", 0))
    if state.standing is Standing.UNKNOWN and check and not check.starts_down:
        return _back(state, now, Event(What.UP, "not checked yet", 0))
    return state, ()


def checked(state: State, group: Group, outcome: Outcome, now: float) -> Change:
    """After a check. ``group`` has one."""
    check = group.check
    assert check is not None  # noqa: S101 - only a server with a check is checked
    is_good, fall, rise = outcome.is_good, check.fall, check.rise
    advice = state.advice
    if outcome.advice is not None:
        advice = _merged(advice, outcome.advice)
        if outcome.advice.is_up is not None:
            is_good, fall, rise = outcome.advice.is_up, 1, 1
    if not state.is_checked:
        fall = rise = 1
    if not is_good:
        return _failed(replace(state, is_checked=True, advice=advice), outcome.why, fall, now)
    if state.is_usable and state.is_checked and not state.bad and advice == state.advice:
        if outcome.why == state.why:
            return state, ()  # as nearly always
        return replace(state, why=outcome.why), (Event(What.REMARK, outcome.why, 0),)
    return _passed(replace(state, is_checked=True, advice=advice), outcome.why, rise, group, now)


def _failed(state: State, why: str, fall: int, now: float) -> Change:
    if state.standing is Standing.DOWN:
        if why == state.why:
            return (replace(state, good=0) if state.good else state), ()
        return replace(state, good=0, why=why), (Event(What.REASON, why, 0),)
    bad = state.bad + 1
    if bad >= fall or state.standing is Standing.UNKNOWN:
        state = replace(state, standing=Standing.DOWN, since=now, good=0, bad=0, why=why)
        return state, (Event(What.DOWN, why, bad),)
    is_news = bad == 1 and state.is_usable
    return replace(state, bad=bad), (Event(What.FAILING, why, bad),) if is_news else ()


def _passed(state: State, why: str, rise: int, group: Group, now: float) -> Change:
    if state.standing is Standing.UNKNOWN:
        return _back(state, now, Event(What.UP, why, 1))
    if state.standing is Standing.EJECTED:
        if now < state.back_at:
            return replace(state, bad=0), ()
        return _back(state, now, Event(What.RETURNED, why, 1))
    if state.standing is not Standing.DOWN:
        return replace(state, bad=0), ()
    good = state.good + 1
    if good < rise:
        is_news = good == 1
        return replace(state, good=good), (Event(What.RECOVERING, why, good),) if is_news else ()
    state, events = _back(state, now, Event(What.UP, why, good))
    return replace(state, standing=Standing.SLOW) if group.slow_start_s else state, events


def ejected(state: State, group: Group, run: int, now: float) -> Change:
    """After ``run`` failed connects in a row, where :func:`may_eject` allows it."""
    if not state.is_usable:
        return state, ()
    is_forgotten = now >= state.back_at + LONGEST_EJECTION_S
    ejections = 1 if is_forgotten else state.ejections + 1
    times = ejections if group.check is None else ejections - 1
    why = f"{run} failed connects"
    state = replace(
        state,
        standing=Standing.EJECTED,
        since=now,
        good=0,
        bad=0,
        why=why,
        ejections=ejections,
        back_at=now + min(times * group.eject_s, LONGEST_EJECTION_S),
    )
    return state, (Event(What.EJECTED, why, run),)


def released(state: State, now: float) -> Change:
    """No other server of its group is usable: an ejected one returns, see :func:`to_release`."""
    return _back(state, now, Event(What.RETURNED, "no other server is usable", 0))


def later(state: State, group: Group, now: float) -> Change:
    """As time has passed: see :func:`due`."""
    if state.standing is Standing.SLOW and now >= state.since + group.slow_start_s:
        return replace(state, standing=Standing.UP), ()
    if state.standing is Standing.EJECTED and group.check is None and now >= state.back_at:
        return _back(state, now, Event(What.RETURNED, "its time is over", 0))
    return state, ()


def due(state: State, group: Group, now: float) -> float:
    """When :func:`later` or :func:`share` may have something else to say; infinite for never."""
    if state.standing is Standing.SLOW:
        step_s = max(group.slow_start_s / SLOW_STEPS, _SHORTEST_STEP_S)
        return min(now + step_s, state.since + group.slow_start_s)
    if state.standing is Standing.EJECTED and group.check is None:
        return state.back_at
    return math.inf


def share(state: State, group: Group, weight: int, now: float) -> int:
    """What part of its configured ``weight`` it has now, in thousandths.

    Above FULL only where an agent asks for more.
    """
    advice = state.advice
    if not state.is_usable or advice.word in (Word.DRAIN, Word.MAINT):
        return 0
    part = FULL
    if advice.weight is not None and weight:
        part = advice.weight * FULL // weight
    elif advice.percent is not None:
        part = advice.percent * FULL // 100
    if state.standing is Standing.SLOW:
        passed = min(1.0, max(0.0, now - state.since) / group.slow_start_s)
        part = part * (SLOW_FROM + int((FULL - SLOW_FROM) * passed)) // FULL
    return part


def interval_s(state: State, group: Group) -> float:
    """How long after a check the next one comes, before jitter. ``group`` has a check."""
    check = group.check
    assert check is not None  # noqa: S101 - see checked()
    if state.is_changing or not state.is_checked:
        return check.fast_s
    return check.down_s if state.standing is Standing.DOWN else check.every_s


# -- the servers of a group together


def may_eject(index: int, usable: Sequence[bool]) -> bool:
    """Whether a server may be ejected: not the last usable one of its group."""
    return any(is_usable for other, is_usable in enumerate(usable) if other != index)


def to_release(states: Sequence[State], usable: Sequence[bool]) -> list[int]:
    """The ejected servers that have to return, because no server of the group is usable."""
    if any(usable):
        return []
    return [i for i, state in enumerate(states) if state.standing is Standing.EJECTED]


# -- parts


def _back(state: State, now: float, event: Event) -> Change:
    """Usable again."""
    state = replace(state, standing=Standing.UP, since=now, good=0, bad=0, why="")
    return state, (event,)


def _merged(known: Advice, new: Advice) -> Advice:
    """What an agent has said in all: each thing as it was last said."""
    percent = known.percent if new.percent is None and new.weight is None else new.percent
    weight = known.weight if new.percent is None and new.weight is None else new.weight
    return Advice(
        percent,
        weight,
        known.max_sessions if new.max_sessions is None else new.max_sessions,
        known.word if new.word is None else new.word,
    )
