"""Sessions that go back to their giver, until it has said that it goes on with them.

A giver that is killed before has counted them as moved, and goes on with none: others can.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from forwarder.ipc import claim

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from forwarder.ipc.consignment import Consignment
    from forwarder.supervision.givers import Giver


class _Return(NamedTuple):
    """Some sessions of a consignment, by their indices; how many of each rule.

    Without a consignment its descriptors have not come.
    """

    giver: Giver
    consignment: Consignment | None
    refused: Sequence[int]
    rules: Mapping[str, int]

    def close(self) -> None:
        """Close the descriptors."""
        if self.consignment is not None:
            self.consignment.close()


class Returns:
    """All of them, by the giver's pid and the number. Owns the descriptors."""

    def __init__(self) -> None:
        self._out: dict[tuple[int, int], _Return] = {}

    def __bool__(self) -> bool:
        """Whether there are some."""
        return bool(self._out)

    def add(
        self, giver: Giver, number: int, consignment: Consignment, refused: Sequence[int]
    ) -> None:
        """The giver was told to go on with these; the consignment becomes ours."""
        rules = consignment.rules(refused)
        self._out[giver.pid, number] = _Return(giver, consignment, refused, rules)

    def add_without_descriptors(self, giver: Giver, number: int, rules: Mapping[str, int]) -> None:
        """The giver was told to go on with all; nobody else could."""
        self._out[giver.pid, number] = _Return(giver, None, (), rules)

    def on_taken(self, pid: int, number: int) -> None:
        """The giver goes on with them."""
        if one := self._out.pop((pid, number), None):
            one.close()

    def rules(self) -> Counter[str]:
        """How many sessions of which rule there are."""
        found: Counter[str] = Counter()
        for one in self._out.values():
            found.update(one.rules)
        return found

    def left_behind(self) -> Iterator[tuple[Giver, Mapping[str, int], Consignment | None]]:
        """Givers that have died, and what they have not taken back; the caller's from now on.

        None if there are no descriptors for it: then those sessions have ended.
        """
        for key, one in tuple(self._out.items()):
            if not one.giver.is_dead:
                continue
            del self._out[key]
            rest = None
            with suppress(OSError):
                rest = one.consignment and one.consignment.only(one.refused)
                if rest is not None:
                    claim.give_up(rest.token)  # by whoever was too slow to take them
            yield one.giver, one.rules, rest

    def close(self) -> None:
        """Givers have them, or will be heard of no more."""
        for one in self._out.values():
            one.close()
        self._out.clear()
