"""Which servers of a group may be chosen at all, which of them first, and at what weight. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from forwarder.balancing.table import FULL

if TYPE_CHECKING:
    from collections.abc import Sequence

# The tiers of a group: a server of a later one is chosen only if there is none of an earlier one.
# LAST are those of weight 0.
PRIMARIES, BACKUPS, LAST = range(3)
TIERS: Final = 3


class State(NamedTuple):
    """What is known of a server.

    ``weight`` is as configured or ordered; ``share`` is what part of it the server has by what was
    found out, 0 to FULL; 0 is unusable. ``is_out``: by an order, which nothing overrides.
    """

    weight: int
    share: int
    is_backup: bool
    is_out: bool


class Standings(NamedTuple):
    """The weight of each server in each tier, in thousandths, for all tiers; 0 takes no part.

    ``is_open``: none is usable, so all are used that no order keeps from it.
    """

    tiers: tuple[tuple[int, ...], ...]
    is_open: bool

    @property
    def is_empty(self) -> bool:
        """Whether there is no server at all."""
        return not any(map(any, self.tiers))


def standings(states: Sequence[State], panic: int, *, fails_open: bool) -> Standings:
    """Sort servers into tiers.

    If some primaries are usable, but less than ``panic`` per cent, all of them are used. What of a
    group is usable is not a matter of which servers a session has tried: one that is down is never
    chosen while another one is up.
    """
    shares = [0 if state.is_out else state.share for state in states]
    primaries = [
        index
        for index, state in enumerate(states)
        if state.weight and not (state.is_backup or state.is_out)
    ]
    usable = sum(shares[index] > 0 for index in primaries)
    if 0 < 100 * usable < panic * len(primaries):
        for index in primaries:
            shares[index] = shares[index] or FULL
    found = Standings(_tiers(states, shares), is_open=False)
    if fails_open and found.is_empty:
        shares = [0 if state.is_out else FULL for state in states]
        opened = Standings(_tiers(states, shares), is_open=True)
        return found if opened.is_empty else opened
    return found


def _tiers(states: Sequence[State], shares: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    tiers = [[0] * len(states) for _ in range(TIERS)]
    for index, (state, share) in enumerate(zip(states, shares, strict=True)):
        tier = (BACKUPS if state.is_backup else PRIMARIES) if state.weight else LAST
        tiers[tier][index] = (state.weight or 1) * share
    return tuple(map(tuple, tiers))
