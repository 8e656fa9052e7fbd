"""Which sessions may be lost, by what has happened and what the instance can. Pure.

EXCUSES is the whole of it: what costs nothing any more is taken out of it, or gets the ability that
spares it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Final

from chaos.wire import FLOW_TIMEOUT_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

OK: Final = "ok"
REFUSED: Final = "refused"  # no connection
RESET: Final = "reset"
CUT: Final = "cut"  # a clean end that came too early
WRONG: Final = "WRONG"  # other bytes than were sent
HUNG: Final = "HUNG"
TURNED_AWAY: Final = "turned away"  # at a limit, as it should
NEVER: Final = (WRONG, HUNG)  # nothing excuses these

YOUNG_S: Final = 2.5  # deposit_after and two beats, with time for a busy machine
NEAR_S: Final = 1.5  # what is under way at an event, datagrams and lines of the log
TAKEN_S: Final = 3.0  # after which a new master has the sessions of orphans
GAP_S: Final = 0.5  # many datagrams of a flow
LINES_S: Final = 2.5  # a worker writes its lines twice a second


class Blow(Enum):
    """What has happened, as far as it can cost anybody anything."""

    DEATH = "a worker has died"
    UPSTREAM = "an upstream has died"
    DESCRIPTORS = "too few descriptors"
    MASTER = "the master was killed"
    DISK = "the disk of the log was full"


class Ability(Enum):
    """What an instance can; see ``place.abilities``."""

    MOVES = "sessions move to another worker before theirs leaves"
    DEPOSIT = "sessions outlive a worker that was killed"


@dataclass(frozen=True)
class Event:
    """A blow from ``since`` until ``until`` (CLOCK_MONOTONIC). ``held``: numbers of the sessions
    that the worker had; ``port`` is that of the upstream; ``of_master``: the master's descriptors.
    """

    blow: Blow
    since: float
    until: float
    held: frozenset[int] = frozenset()
    port: int = 0
    of_master: bool = False


@dataclass(frozen=True)
class Ending:
    """How a session of the load has ended, as its client saw it.

    ``greeted``: when the upstream was there, or None. ``lost``: when each of the datagrams was sent
    that were not answered.
    """

    number: int
    kind: str
    began: float
    ended: float
    outcome: str
    greeted: float | None = None
    sent: int = 0
    received: int = 0
    port: int = 0
    silence_s: float = 0.0
    lost: Sequence[float] = field(default_factory=tuple)
    detail: str = ""


# A client without an address: nobody knows which worker has it.
NAMELESS_KINDS: Final = frozenset({"unix", "unix long"})
GROUP_KINDS: Final = frozenset({"group", "group long"})
NOT_ENDED_AT_ONCE: Final = frozenset({"tcptoudp"})  # the upstream may have something to say yet
NOT_DEPOSITED: Final = NAMELESS_KINDS | {"to unix", "udptotcp", "tcptoudp"}
RESET_KINDS: Final = frozenset({"reset", "reset by upstream"})
DATAGRAM_KINDS: Final = frozenset({"udp", "udptotcp"})


def _is_held(ending: Ending, event: Event) -> bool:
    return ending.number in event.held or ending.kind in NAMELESS_KINDS


def _is_young(ending: Ending, event: Event) -> bool:
    """It may have come to the worker after its sessions were listed, or was not deposited yet."""
    born = ending.began if ending.greeted is None else ending.greeted
    return born > event.since - YOUNG_S


def _is_of_upstream(ending: Ending, event: Event) -> bool:
    """Who has heard nothing of its upstream yet may have been led to that one."""
    return ending.port == event.port or (ending.greeted is None and ending.kind in GROUP_KINDS)


@dataclass(frozen=True)
class Loss:
    """A session that was lost, and what there is to know of it."""

    ending: Ending
    recognised: bool = False  # the log says that its worker's death has cost it bytes
    short_of: Sequence[Event] = ()  # when descriptors were few
    masters: Sequence[Event] = ()  # when masters were killed, until the next one served


@dataclass(frozen=True)
class Excuse:
    """A blow may cost whom ``whom`` says, unless the instance has the ability ``until``."""

    blow: Blow
    whom: Callable[[Loss, Event], bool]
    until: Ability | None = None


EXCUSES: Final = (
    Excuse(Blow.DEATH, lambda it, event: _is_held(it.ending, event), until=Ability.DEPOSIT),
    Excuse(Blow.DEATH, lambda it, event: _is_young(it.ending, event)),
    Excuse(
        Blow.DEATH,
        lambda it, event: it.ending.kind in NOT_DEPOSITED and _is_held(it.ending, event),
    ),
    Excuse(Blow.DEATH, lambda it, event: it.recognised and _is_held(it.ending, event)),
    # What came while descriptors were few may not have been deposited.
    Excuse(
        Blow.DEATH,
        lambda it, event: (
            _is_held(it.ending, event)
            and any(few.until > it.ending.began and few.since < event.until for few in it.short_of)
        ),
    ),
    # The master that had its deposit is dead, and the next one has not taken its sessions yet.
    Excuse(
        Blow.DEATH,
        lambda it, event: (
            _is_held(it.ending, event)
            and any(
                master.since < event.until and event.since < master.until + TAKEN_S
                for master in it.masters
            )
        ),
    ),
    Excuse(Blow.UPSTREAM, lambda it, event: _is_of_upstream(it.ending, event)),
    Excuse(Blow.DESCRIPTORS, lambda it, _: it.ending.greeted is None),
)


def why_lost(loss: Loss, events: Iterable[Event], abilities: frozenset[Ability]) -> str:
    """What excuses the loss of a session; "" if nothing does."""
    ending = loss.ending
    if ending.outcome in NEVER:
        return ""
    for event in events:
        # Who reads slowly hears of it late, but nobody hears of it before.
        if event.since > ending.ended or event.until < ending.began:
            continue
        for excuse in EXCUSES:
            is_meant = excuse.blow is event.blow and excuse.until not in abilities
            if is_meant and excuse.whom(loss, event):
                return event.blow.value
    return ""


# Which blows may cost a flow datagrams that are under way; the flow itself goes on, or anew.
_DATAGRAM_BLOWS: Final = frozenset({Blow.DEATH, Blow.DESCRIPTORS})


def lost_without_excuse(ending: Ending, events: Iterable[Event]) -> list[float]:
    """When those of its lost datagrams were sent that no event explains.

    Those without a gap between them are one: a worker that has no time, and then is killed, leaves
    behind what came long before.
    """
    blows = [event for event in events if event.blow in _DATAGRAM_BLOWS]
    spans: list[list[float]] = []
    for at in ending.lost:
        if spans and at - spans[-1][-1] < GAP_S:
            spans[-1].append(at)
        else:
            spans.append([at])
    return [
        at
        for span in spans
        if not any(
            one.since - NEAR_S <= span[-1] and span[0] <= one.until + NEAR_S for one in blows
        )
        for at in span
    ]


def may_lack_its_line(ending: Ending, events: Iterable[Event]) -> bool:
    """Whether the line of a session in the log may be lost: with its worker, or on a full disk.

    A client that is slow reads from its socket what a worker has left there that died long before.
    """
    late_s = LINES_S + (FLOW_TIMEOUT_S if ending.kind in NOT_ENDED_AT_ONCE else 0.0)
    return any(
        (
            event.blow in {Blow.DEATH, Blow.DISK}
            and event.since - late_s <= ending.ended <= event.until + LINES_S
        )
        or (event.blow is Blow.DEATH and ending.number in event.held)
        for event in events
    )
