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


class Ranks(NamedTuple):
    """The weight of each server in each tier, in thousandths; 0 takes no part.

    ``usable`` is what there is to choose from, ``open`` what is left for a session that none of
    these serves: all that no order keeps from it, as configured.
    """

    usable: tuple[tuple[int, ...], ...]
    open: tuple[tuple[int, ...], ...]


def rank(states: Sequence[State], panic: int, *, fails_open: bool) -> Ranks:
    """Sort servers into tiers.

    If some primaries are usable, but less than ``panic`` per cent, all of them are.
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
    everyone = [FULL if fails_open and not state.is_out else 0 for state in states]
    return Ranks(_tiers(states, shares), _tiers(states, everyone))


def _tiers(states: Sequence[State], shares: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    tiers = [[0] * len(states) for _ in range(TIERS)]
    for index, (state, share) in enumerate(zip(states, shares, strict=True)):
        tier = (BACKUPS if state.is_backup else PRIMARIES) if state.weight else LAST
        tiers[tier][index] = (state.weight or 1) * share
    return tuple(map(tuple, tiers))


def in_turn(ranks: Ranks) -> tuple[int, ...]:
    """The weights of the servers that the next sessions go to; 0 for those that come after them."""
    tiers = (*ranks.usable, *ranks.open)
    return next((tier for tier in tiers if any(tier)), tiers[0])
