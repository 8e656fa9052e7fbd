"""How an instance ends: its sessions first, by themselves or by a reset; counted and reported.

Sessions of old masters that drain belong to it. Decides nothing about when: the master does.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from forwarder.ipc.messages import Op
from forwarder.stats.reasons import Phase
from forwarder.stats.rows import MOVED_IN, MOVED_OUT, SESSIONS_TOTAL
from forwarder.succession.lineage import Left
from forwarder.supervision.sessions import Sessions

if TYPE_CHECKING:
    from forwarder.succession.handover import Handover
    from forwarder.supervision.fleet import Fleet

log = logging.getLogger(__name__)

KILL_AFTER_S: Final = 2.0  # a process that was asked to stop and stays is killed
# Time from the first line about sessions that are left to the next; it doubles each time.
_FIRST_LINE_S: Final = 5.0
_LONGEST_PAUSE_S: Final = 600.0
_SOON_S: Final = 0.001  # a limit of 0 is none


@dataclass(frozen=True, slots=True)
class _Account:
    """What there was when the end began; ``is_whole``: with what an old master has left.

    ``away``: sessions that had gone on in another instance, see :meth:`Ending._away`.
    """

    at: float
    open: int
    total: int
    cut: int
    away: int
    is_whole: bool


class Mortal(Protocol):
    """The master, as far as its end asks something of it."""

    @property
    def is_running(self) -> bool:
        """Whether it serves and is not about to stop."""

    def stop(self) -> None:
        """Let our sessions end."""

    def end(self, phase: Phase) -> None:
        """Reset what is left: its time is up, or the successor wants us gone."""


class Ending:
    """The end of this instance, once it has begun; and all sessions that end with it.

    An heir may ask for it, too: see ``lineage.Elder``.
    """

    def __init__(self, fleet: Fleet, handover: Handover, master: Mortal) -> None:
        self.sessions = Sessions(fleet, lambda: handover.predecessor)
        self._master = master
        self._due_at = math.inf  # when the time of sessions is up, or a kill is due
        self._fleet = fleet
        self._handover = handover
        self._begun: _Account | None = None
        self._next_line = math.inf
        self._pause_s = _FIRST_LINE_S
        self._kills = 0
        self._is_resetting = False
        self._has_ended_those_before = False

    @property
    def is_over(self) -> bool:
        """Whether all have gone: workers, a successor that gives up, and masters before us.

        Or we leave our workers, and they those before us, to the master that serves next.
        """
        if self._leaves_workers:
            return True
        is_alone = self.sessions.before is None and not self._handover.is_under_way
        return is_alone and not self._fleet.processes()

    @property
    def deadline(self) -> float:
        """When :meth:`turn` has something to do; infinite before the end has begun."""
        return min(self._due_at, self._next_line)

    def drain(self, limit_s: float) -> None:
        """Let sessions end, for ``limit_s`` seconds at most, which may be infinite."""
        now = time.monotonic()
        left = self._begin(now)
        log.info("master.stopping how=drain %s limit_s=%s", _as_text(left), _limit(limit_s))
        self._due_at = now + limit_s
        self._next_line = now + self._pause_s
        is_last = not self._handover.has_heir
        for process in self._fleet.processes():
            self._fleet.tell(process, Op.DRAIN, is_last=is_last)
        if is_last:
            self._pass_on_drain()

    def drain_as_last(self) -> None:
        """The heir is stopping: no master serves after us, so silent flows are over."""
        if self._master.is_running:
            self._master.stop()
        for process in self._fleet.processes():
            self._fleet.tell(process, Op.DRAIN, is_last=True)
        self._pass_on_drain()

    def reset(self, phase: Phase, *, with_those_before: bool) -> None:
        """Reset what is left; ``phase`` says why: DRAIN or SHUTDOWN."""
        now = time.monotonic()
        left = self._begin(now)
        if phase is Phase.DRAIN:
            log.warning("master: %d sessions are left after drain_timeout", left.sessions)
        else:
            log.info("master.stopping how=stop %s", _as_text(left))
        self._due_at, self._next_line = now + KILL_AFTER_S, math.inf
        self._is_resetting = True
        for process in self._fleet.processes():
            self._fleet.tell(process, Op.STOP, phase=phase)
        if with_those_before:
            self._end_those_before(phase)

    def end_sessions(self, phase: Phase) -> None:
        """The heir has waited long enough, or has to stop at once."""
        self._master.end(phase)
        self._end_those_before(phase)

    def _end_those_before(self, phase: Phase) -> None:
        before = self.sessions.before
        if before is not None:
            self._has_ended_those_before = True
            before.end_sessions(phase)

    def _kill(self) -> None:
        """Kill the processes that were asked to stop and stay."""
        self._due_at = time.monotonic() + KILL_AFTER_S
        self._fleet.kill("does not stop, killing it")
        self._kills += 1
        before = self.sessions.before
        # It kills its workers when we kill ours, and the one before it a turn later.
        if (
            before is not None
            and self._has_ended_those_before
            and self._kills > len(before.left.masters)
        ):
            before.kill()

    def turn(self, now: float) -> None:
        """Do what is due: log how many sessions are left, reset them, kill workers that stay."""
        if self._leaves_workers:
            self._limit_workers(now)
        if self._begun is None or self.is_over:
            return
        if now >= self._due_at:
            if self._is_resetting:
                self._kill()
            else:
                self._master.end(Phase.DRAIN)
        if now >= self._next_line:
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
            self._next_line = now + self._pause_s
            left_s = _limit(self._due_at - now)
            log.info("master.draining %s left_s=%s", _as_text(self.sessions.left()), left_s)

    @property
    def _leaves_workers(self) -> bool:
        """Whether nobody asks us for their sessions any more: the next one finds only orphans."""
        is_draining = self._begun is not None and not self._is_resetting
        return is_draining and self._handover.is_abandoned

    def _limit_workers(self, now: float) -> None:
        """Nobody but they resets the sessions that are left when their time is up."""
        if self._due_at < math.inf:
            limit_s = max(self._due_at - now, _SOON_S)
            for process in self._fleet.processes():
                self._fleet.telling.leave(process, Op.DRAIN, limit_s, Phase.DRAIN, is_last=False)

    def cancel(self) -> None:
        """Nothing: a stop calls :meth:`drain` or :meth:`reset`."""

    def close(self) -> None:
        """Nothing is open."""

    def sum_up(self) -> dict[str, object]:
        """Log what became of the sessions, and return it. ``cut`` were reset by us.

        Those that an heir has taken over are no longer ours.
        """
        begun = self._begun
        if begun is None:
            return {}
        before = self._handover.predecessor
        late = before.first if before is not None and not begun.is_whole else None
        late = late or Left()
        cut = self.sessions.left().cut - begun.cut - late.cut
        more = self._fleet.ledger.sum(SESSIONS_TOTAL) - begun.total
        moved = max(0, self._away() - begun.away)
        left = self.sessions.left().sessions if self._leaves_workers else 0
        ended = begun.open + late.sessions + more - cut - moved - left
        after_s = round(time.monotonic() - begun.at, 1)
        rest = (f" moved={moved}" if moved else "") + (f" left={left}" if left else "")
        log.info("master.stopped ended=%d cut=%d after_s=%.1f%s", ended, cut, after_s, rest)
        return {"ended": max(0, ended), "cut": cut, "after_s": after_s}

    def _begin(self, now: float) -> Left:
        left = self.sessions.left()
        if self._begun is None:
            total = self._fleet.ledger.sum(SESSIONS_TOTAL)
            before = self._handover.predecessor
            is_whole = before is None or before.first is not None
            self._begun = _Account(now, left.sessions, total, left.cut, self._away(), is_whole)
        return left

    def _away(self) -> int:
        """How many sessions more have gone on in another instance than have come from one."""
        ledger = self._fleet.ledger
        afloat = sum(ledger.afloat().values())
        return ledger.sum(MOVED_OUT) - ledger.sum(MOVED_IN) - afloat

    def _pass_on_drain(self) -> None:
        before = self.sessions.before
        if before is not None:
            before.drain_as_last()


def _as_text(left: Left) -> str:
    """How many sessions there are, and in how many old masters besides."""
    older = len(left.masters) - 1
    return f"sessions={left.sessions}" + (f" predecessors={older}" if older else "")


def _limit(seconds: float) -> str:
    return "none" if seconds == math.inf else f"{seconds:.0f}" if seconds >= 10 else f"{seconds:g}"
