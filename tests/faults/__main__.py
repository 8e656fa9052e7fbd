"""Try all faults, or those whose name has a word of the command line, and print a table."""

from __future__ import annotations

import asyncio
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Final

from support.namespaces import enter_network

from faults.cases import ALL
from faults.trying import Outcome, try_case

if TYPE_CHECKING:
    from faults.cases import Case

AT_ONCE: Final = 4  # they mostly wait


def row(outcome: Outcome) -> str:
    """A line of the table."""
    during = outcome.during
    cost = during.text() or "nothing"
    said = "; ".join(outcome.warnings[:3])
    cells = [
        outcome.case.name,
        str(outcome.injected),
        f"{cost} of {during.total()}",
        f"{outcome.recovered_s:.1f} s",
        said[:300],
        " | ".join(outcome.problems) or "ok",
    ]
    return "\t".join(cells)


def begin() -> None:
    """Addresses of its own for each process that tries faults."""
    if os.geteuid() == 0:
        enter_network()


def run(case: Case) -> Outcome:
    """Try one; a fault of the trying is a problem, too."""
    try:
        return asyncio.run(try_case(case))
    except Exception as err:  # noqa: BLE001 - the others have their turn
        return Outcome(case, problems=[f"cannot be tried: {err!r}"[:500]])


def main() -> int:
    """The status is 1 if anything cost what it must not."""
    words = sys.argv[1:]
    chosen = [case for case in ALL if not words or any(word in case.name for word in words)]
    failed = 0
    with ProcessPoolExecutor(AT_ONCE, initializer=begin) as pool:
        for outcome in pool.map(run, chosen):
            failed += bool(outcome.problems)
            print(row(outcome), flush=True)  # noqa: T201 - what it is for
    print(f"{len(chosen)} faults, {failed} with a problem", file=sys.stderr)  # noqa: T201
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
