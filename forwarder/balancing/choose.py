"""Choosers: which of some servers gets the next session. Pure.

A server is its index in the group, a set of servers a bit mask. ``weights`` are thousandths, one
for each server of the group; 0 takes no part. A chooser is asked with a set that is not empty and
of which each server has a weight. Choosers keep their state when weights change.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from hashlib import blake2b
from itertools import accumulate
from operator import add, itemgetter
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

# Turns that are kept, so that they need not be worked out again: 32 KiB for a group at most. Beyond
# it each costs some 0.5 us and 0.04 us for each server.
LONGEST_CYCLE: Final = 4096
# Turns that a worker leaves to others at first; each costs as much as one that is worked out.
MOST_SKIPPED: Final = 64
# Clients whose server a hash remembers, some 100 bytes each.
REMEMBERED: Final = 4096
_64_BITS: Final = 2**64 - 1
_MAPPED: Final = bytes(10) + b"\xff\xff"


class Chooser(Protocol):
    """One way to choose."""

    def reweigh(self, weights: Sequence[int]) -> None:
        """Use these weights from now on; at least one is not 0."""

    def pick(self, allowed: int, key: bytes) -> int:
        """One of ``allowed``. ``key`` is the client's address, or empty if it has none."""


def indices(mask: int) -> Iterator[int]:
    """The servers of a set, in order."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


def mask_of(weights: Sequence[int]) -> int:
    """The set of servers that have a weight."""
    return sum(1 << index for index, weight in enumerate(weights) if weight)


class Turn:
    """Each in turn, those with more weight more often, and evenly: smooth weighted round robin.

    At each turn everyone earns its weight; the richest one is chosen, and pays what all have
    earned. After as many turns as the weights have in sum, divided by what they have in common,
    everyone has as much as before: from there on the same turns come again, and are only read.
    """

    __slots__ = (
        "_aside",
        "_at",
        "_cycle",
        "_earned",
        "_is_known",
        "_length",
        "_mask",
        "_mask_aside",
        "_members",
        "_part",
        "_start",
        "_sum",
        "_weights",
    )

    def __init__(self, part: float = 0.0) -> None:
        """As many turns as ``part`` of the servers, 0 to 1, have been others' at the start."""
        self._part = part
        self._mask = 0
        self._members: list[int] = []
        self._weights: list[int] = []
        self._sum = 0
        self._earned: list[int] = []
        self._start: list[int] = []  # what they had before the first turn of ``_cycle``
        self._cycle: list[int] = []
        self._at = 0
        self._length = 0  # that of a whole cycle; 0: too long to be kept
        self._is_known = False  # whether ``_cycle`` is whole
        self._aside: Turn | None = None  # turns within a smaller set, and which
        self._mask_aside = 0

    def reweigh(self, weights: Sequence[int]) -> None:
        """See :class:`Chooser`."""
        members = [index for index, weight in enumerate(weights) if weight]
        chosen = [weights[index] for index in members]
        if members == self._members and chosen == self._weights:
            return
        had = dict(zip(self._members, self._earned_now(), strict=True))
        # Who is owed half a turn is owed half a turn, however much less a turn costs now.
        is_new, total = not self._members, sum(chosen)
        earned = [had.get(index, 0) * total // (self._sum or 1) for index in members]
        excess = sum(earned) // len(members)
        self._earned = [one - excess for one in earned]
        self._members, self._weights, self._sum = members, chosen, total
        self._mask = mask_of(weights)
        length = total // math.gcd(*chosen)
        self._length = length if length <= LONGEST_CYCLE else 0
        self._mask_aside = 0
        self._begin_cycle()
        if is_new:
            for _ in range(min(int(len(members) * self._part), MOST_SKIPPED)):
                self._pick_next()
            self._begin_cycle()

    def pick(self, allowed: int, key: bytes = b"") -> int:
        """See :class:`Chooser`."""
        del key
        if allowed != self._mask:
            return self._pick_among(allowed)
        if self._is_known:
            at = self._at
            cycle = self._cycle
            self._at = at + 1 if at + 1 < len(cycle) else 0
            return cycle[at]
        return self._pick_next()

    def _pick_next(self) -> int:
        earned = list(map(add, self._earned, self._weights))
        richest = max(earned)
        place = earned.index(richest)
        earned[place] = richest - self._sum
        self._earned = earned
        if self._length:
            self._cycle.append(self._members[place])
            if len(self._cycle) == self._length:
                if earned == self._start:
                    self._is_known = True
                else:  # the start was not yet as even as what follows
                    self._begin_cycle()
        return self._members[place]

    def _begin_cycle(self) -> None:
        self._cycle, self._start, self._at, self._is_known = [], self._earned, 0, False

    def _earned_now(self) -> list[int]:
        if not self._is_known:
            return self._earned
        had = Counter(self._cycle[: self._at])
        return [
            start + self._at * weight - had[index] * self._sum
            for index, weight, start in zip(self._members, self._weights, self._start, strict=True)
        ]

    def _pick_among(self, allowed: int) -> int:
        """The same for a smaller set, which has turns of its own."""
        aside = self._aside
        if aside is None:
            aside = self._aside = Turn()
        if allowed != self._mask_aside:
            self._mask_aside = allowed
            weights = [0] * allowed.bit_length()
            for index, weight in zip(self._members, self._weights, strict=True):
                if allowed >> index & 1:
                    weights[index] = weight
            aside.reweigh(weights)
        return aside.pick(allowed)


class Least:
    """The one that would have the fewest sessions by its weight; if several, these in turn."""

    __slots__ = ("_last", "_mask", "_members", "_part", "_read", "_rows", "_sessions", "_weights")

    def __init__(self, sessions: Sequence[int], rows: Sequence[int], part: float = 0.0) -> None:
        """``sessions`` is how many each row has now, ``rows`` which one each server has.

        ``part`` is as for :class:`Turn`.
        """
        self._sessions = sessions
        self._rows = rows
        self._part = part
        self._last = -1  # the place of the one chosen last
        self._mask = 0
        self._members: list[int] = []
        self._weights: list[int] = []  # of each member; none if all are the same
        self._read = _reader(rows)

    def reweigh(self, weights: Sequence[int]) -> None:
        """See :class:`Chooser`."""
        members = [index for index, weight in enumerate(weights) if weight]
        if not self._members:
            self._last = int(len(members) * self._part) - 1
        elif members != self._members:
            last = self._members[self._last]
            self._last = sum(index <= last for index in members) - 1
        self._members = members
        chosen = [weights[index] for index in members]
        self._weights = chosen if len(set(chosen)) > 1 else []
        self._read = _reader([self._rows[index] for index in members])
        self._mask = mask_of(weights)

    def pick(self, allowed: int, key: bytes = b"") -> int:
        """See :class:`Chooser`."""
        del key
        loads: tuple[float, ...] = self._read(self._sessions)
        if self._weights:
            pairs = zip(loads, self._weights, strict=True)
            loads = tuple([(load + 1) / weight for load, weight in pairs])
        if allowed != self._mask:
            chances = zip(self._members, loads, strict=True)
            loads = tuple([load if allowed >> index & 1 else math.inf for index, load in chances])
        # Of those that are as good, the one that was chosen longest ago.
        place = (loads * 2).index(min(loads), self._last + 1) % len(loads)
        self._last = place
        return self._members[place]


def _reader(rows: Sequence[int]) -> Callable[[Sequence[int]], tuple[int, ...]]:
    """What reads these rows of a table at once."""
    if len(rows) == 1:
        return lambda table: (table[rows[0]],)
    return itemgetter(*rows)


class Random:
    """Of two that are drawn by weight, the one with fewer sessions by its weight."""

    __slots__ = ("_draw", "_mask", "_members", "_rows", "_sessions", "_sums", "_weights")

    def __init__(
        self, sessions: Sequence[int], rows: Sequence[int], draw: Callable[[], float]
    ) -> None:
        """``draw`` returns a number from 0 to less than 1; the others are as for :class:`Least`."""
        self._sessions = sessions
        self._rows = rows
        self._draw = draw
        self._weights: Sequence[int] = ()
        self._mask = 0
        self._members: list[int] = []
        self._sums: list[int] = []

    def reweigh(self, weights: Sequence[int]) -> None:
        """See :class:`Chooser`."""
        self._weights = tuple(weights)
        self._mask = mask_of(weights)
        self._members, self._sums = self._sums_of(self._mask)

    def _sums_of(self, mask: int) -> tuple[list[int], list[int]]:
        members = list(indices(mask))
        return members, list(accumulate(self._weights[index] for index in members))

    def pick(self, allowed: int, key: bytes = b"") -> int:
        """See :class:`Chooser`."""
        del key
        members, sums = self._members, self._sums
        if allowed != self._mask:
            members, sums = self._sums_of(allowed)
        total, draw, weights = sums[-1], self._draw, self._weights
        place = bisect_right(sums, int(draw() * total))
        one = members[place]
        weight = weights[one]
        if weight == total:
            return one
        drawn = int(draw() * (total - weight))  # of the others
        if drawn >= sums[place] - weight:
            drawn += weight
        other = members[bisect_right(sums, drawn)]
        sessions, rows = self._sessions, self._rows
        if (sessions[rows[other]] + 1) * weight < (sessions[rows[one]] + 1) * weights[other]:
            return other
        return one


class Hash:
    """The same one for the same client: weighted rendezvous hashing.

    Each server draws a number for the client, from the client's address and its own name alone, and
    the highest wins. So all processes on all hosts agree, and when a server goes or comes no client
    changes between two others. Clients without an address are taken in turn.
    """

    __slots__ = ("_is_even", "_known", "_mask", "_members", "_prefix", "_seeds", "_turn")

    def __init__(
        self, names: Sequence[str], prefix: tuple[int, int] = (32, 128), part: float = 0.0
    ) -> None:
        """``names`` are those of the servers; for ``prefix`` see :func:`network_of`."""
        self._seeds = [_number_of(name.encode()) for name in names]
        self._prefix = prefix
        self._turn = Turn(part)
        self._mask = 0
        self._members: list[tuple[int, int, int]] = []  # index, seed and weight
        self._is_even = False  # all weights are the same
        self._known: dict[bytes, int] = {}

    def reweigh(self, weights: Sequence[int]) -> None:
        """See :class:`Chooser`."""
        self._turn.reweigh(weights)
        self._mask = mask_of(weights)
        self._members = [
            (index, self._seeds[index], weight) for index, weight in enumerate(weights) if weight
        ]
        self._is_even = len({weight for weight in weights if weight}) == 1
        self._known.clear()

    def pick(self, allowed: int, key: bytes) -> int:
        """See :class:`Chooser`."""
        if not key:
            return self._turn.pick(allowed)
        if allowed != self._mask:
            return self._winner(key, [one for one in self._members if allowed >> one[0] & 1])
        found = self._known.get(key)
        if found is None:
            found = self._winner(key, self._members)
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[key] = found
        return found

    def _winner(self, key: bytes, members: Sequence[tuple[int, int, int]]) -> int:
        client = _number_of(network_of(key, self._prefix))
        best, winner, is_even = -math.inf, -1, self._is_even
        for index, seed, weight in members:
            number = client ^ seed  # the finalizer of splitmix64, by S. Vigna
            number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & _64_BITS
            number = (number ^ number >> 27) * 0x94D049BB133111EB & _64_BITS
            number ^= number >> 31
            # -ln(u)/w is exponentially distributed with rate w, so the least of several is that of
            # each server as often as its weight says. Negated it has the order of the numbers.
            score = number if is_even else math.log((number + 1) * 2.0**-64) / weight
            if score > best:
                best, winner = score, index
        return winner


class First:
    """The first of them."""

    __slots__ = ()

    def reweigh(self, weights: Sequence[int]) -> None:
        """See :class:`Chooser`; nothing depends on them."""

    def pick(self, allowed: int, key: bytes = b"") -> int:
        """See :class:`Chooser`."""
        del key
        return (allowed & -allowed).bit_length() - 1


def network_of(address: bytes, prefix: tuple[int, int]) -> bytes:
    """The first bits of a packed address: as many as ``prefix`` says for IPv4 and for IPv6.

    An IPv4 client of an IPv6 listener counts as IPv4 (RFC 4291 2.5.5.2).
    """
    address = address.removeprefix(_MAPPED) if len(address) == 16 else address
    cut = 8 * len(address) - prefix[len(address) == 16]
    if cut <= 0:
        return address
    return (int.from_bytes(address, "big") >> cut << cut).to_bytes(len(address), "big")


def _number_of(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big")
