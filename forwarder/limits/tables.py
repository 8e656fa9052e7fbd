"""Counting and timing what is limited, in tables of fixed size. Pure: arrays in, numbers out.

The arrays are shared by all workers (see ``gate``), so nothing here is kept in Python objects. The
caller holds the lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_PLACES: Final = 8
_KEY_MASK: Final = 2**64 - 1


def key_of(rule: str, client: str) -> int:
    """The key of a client of a rule in the tables: never 0, the same in all forks of a process."""
    return hash((rule, client)) & _KEY_MASK or 1


def table_words(keys: int) -> int:
    """How many words a :class:`CountTable` for ``keys`` keys, a power of two, needs."""
    return 4 * keys + 1


class CountTable:
    """How many of something each key has. Keys that have none take no room.

    Linear probing; a key that goes is filled up from behind, so there are no tombstones. ``words``
    holds a key and a count for each place, and then the number of keys. Half of the places stay
    free, so that looking for a key is short, however many there are.

    A writer may be killed at any point. Counts are then slightly wrong until they are rebuilt, so
    no count is taken below 0 here.
    """

    __slots__ = ("_mask", "_places", "_words")

    def __init__(self, words: memoryview[int]) -> None:
        """``words``: as many as :func:`table_words` says, all 0 for an empty table."""
        self._words = words
        self._places = len(words) // 2
        self._mask = self._places - 1

    def __len__(self) -> int:
        return self._words[-1]

    def get(self, key: int) -> int:
        """How many a key has."""
        at = self._find(key)
        return self._words[2 * at + 1] if self._words[2 * at] == key else 0

    def add(self, key: int, count: int = 1) -> bool:
        """``count`` more for a key. False if there is no room for a new key."""
        words = self._words
        at = self._find(key)
        if words[2 * at] != key:
            if 2 * words[-1] >= self._places:
                return False
            words[-1] += 1
            words[2 * at + 1] = 0
            words[2 * at] = key
        words[2 * at + 1] += count
        return True

    def remove(self, key: int) -> bool:
        """One less for a key; False if it has none."""
        words = self._words
        at = self._find(key)
        if words[2 * at] != key:
            return False
        count = words[2 * at + 1]
        if count > 1:
            words[2 * at + 1] = count - 1
            return True
        self._close_gap(at)
        words[-1] = max(words[-1], 1) - 1
        return True

    def items(self) -> Iterator[tuple[int, int]]:
        """All keys that have some, with their counts."""
        if not self._words[-1]:
            return  # without a look at memory that was never touched
        words = self._words.tolist()
        for at in range(0, 2 * self._places, 2):
            if words[at]:
                yield words[at], words[at + 1]

    def clear(self) -> None:
        """Forget all."""
        words = self._words
        words[:] = memoryview(bytes(8 * len(words))).cast("Q")

    def _find(self, key: int) -> int:
        """The place of a key, or the free one where it belongs."""
        words, mask = self._words, self._mask
        at = key & mask
        for _ in range(mask + 1):
            found = words[2 * at]
            if found in (key, 0):
                return at
            at = at + 1 & mask
        raise RuntimeError("a table of limits is full")  # half of it is free

    def _close_gap(self, gap: int) -> None:
        """Free a place, and move up those behind it that had to give way to it."""
        words, mask = self._words, self._mask
        at = gap
        while True:
            at = at + 1 & mask
            key = words[2 * at]
            if not key or at == gap:
                break
            # It may move if its own place is not between the gap and where it is now.
            if (at - (key & mask) & mask) >= (at - gap & mask):
                words[2 * gap], words[2 * gap + 1] = key, words[2 * at + 1]
                gap = at
        words[2 * gap] = words[2 * gap + 1] = 0


def pass_at(due: float, now: float, rate: float, burst: float) -> float | None:
    """Let one more pass, at ``rate`` per second on average and ``burst`` at once at most.

    ``due`` is what the last one to pass returned, 0.0 at first: when the next one would be due if
    all came evenly. Returns the new one, None if it may not pass now. (GCRA, ITU-T I.371: a token
    bucket that is one number.)
    """
    interval = 1.0 / rate
    due = max(due, now)
    if due - now > (burst - 1) * interval + 1e-9:
        return None
    return due + interval


class RateTable:
    """When the next one of each key is due; room for a fixed number of keys.

    Each key has one of _PLACES places. When all are taken the earliest due is replaced: if it is
    overdue nothing is lost, else its client is forgiven a part of what it had.
    """

    __slots__ = ("_dues", "_keys", "_sets")

    def __init__(self, keys: memoryview[int], dues: memoryview[float]) -> None:
        self._keys = keys
        self._dues = dues
        self._sets = len(keys) // _PLACES

    def try_pass(self, key: int, now: float, rate: float, burst: float) -> bool:
        """Let one more of a key pass, if it may."""
        at = self._place(key)
        due = pass_at(self._dues[at], now, rate, burst)
        if due is None:
            return False
        self._dues[at] = due
        return True

    def _place(self, key: int) -> int:
        first = key % self._sets * _PLACES
        keys = self._keys[first : first + _PLACES].tolist()
        if key in keys:
            return first + keys.index(key)
        dues = self._dues[first : first + _PLACES].tolist()
        at = first + dues.index(min(dues))
        self._keys[at] = key
        self._dues[at] = 0.0
        return at
