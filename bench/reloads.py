"""What became of the clients while programs were reloaded, as a table. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from bench.report import Table, rounds

OUTCOMES: Final = ("served", "refused", "reset", "cut", "wrong", "late")
LATE_S: Final = 15  # storm.c gives up on a connection after this long


@dataclass(slots=True)
class Reloads:
    """So many reloads in so many seconds at so many new connections a second.

    ``rounds`` are counts for each program and round: the outcomes, ``left`` processes more than
    before, and ``seconds``.
    """

    reloads: int
    seconds: int
    rate: int
    rounds: dict[str, list[dict[str, int]]] = field(default_factory=dict)

    def add(self, name: str, found: dict[str, int]) -> None:
        self.rounds.setdefault(name, []).append(found)

    def table(self) -> Table:
        """The sums over all rounds; processes left are those of the worst round."""
        columns = ("connections", "refused", "reset", "cut", "wrong", f"over {LATE_S} s")
        rows = [["", *columns, "processes more than before", "seconds"]]
        for name, every in self.rounds.items():
            total: Counter[str] = Counter()
            for found in every:
                total.update(found)
            counts = [sum(total[outcome] for outcome in OUTCOMES)]
            counts += [total[outcome] for outcome in OUTCOMES[1:]]
            counts += [max(found["left"] for found in every), total["seconds"]]
            rows.append([name, *(f"{count:,}" for count in counts)])
        many = max(map(len, self.rounds.values()), default=0)
        return Table(
            f"reload: {rounds(many)} of {self.reloads} reloads in {self.seconds} s, "
            f"{self.rate:,} new connections/s",
            rows,
        )
