"""Failed connects in a row, over all workers: when so many are enough to eject a server. Pure.

Theory of operation
-------------------
A worker counts the connects to each server that failed, and those that did not. The checker looks
LOOKS_PER_S times a second at a server while some of its connects have failed, so of two looks it
knows what happened between them but not in which order. What failed and what worked in the same
span is no row. Before the first look at a server the span is long, and nearly all that worked in it
came before what failed, which was noticed at once; so that counts, but ejects nothing alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from forwarder.config.model import Group

# All workers take the same servers for dead within this time.
LOOKS_PER_S: Final = 10


# Connects that failed in a row: when they were noticed, in monotonic seconds, and how many.
Row: TypeAlias = tuple[tuple[float, int], ...]


def after(row: Row, failed: int, worked: int, group: Group, now: float, *, is_first: bool) -> Row:
    """The row after another look, in whose span so many connects failed, and worked.

    ``is_first``: there was no look shortly before.
    """
    if worked and is_first:
        return ((now, min(failed, max(1, group.fail - 1))),) if failed else ()
    if worked:
        return ()
    found = (*row, (now, failed)) if failed else row
    # Each counts at least once, so no more of them matter than are enough.
    return tuple(one for one in found if now - one[0] <= group.fail_within_s)[-group.fail :]


def length(row: Row) -> int:
    """How many connects have failed in a row."""
    return sum(count for _, count in row)


def is_enough(row: Row, group: Group) -> bool:
    """Whether a server with that row is to be ejected."""
    return 0 < group.fail <= length(row)
