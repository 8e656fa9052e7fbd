"""One fault: before, during and after it, and what is wrong with what was seen."""

from __future__ import annotations

import asyncio
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from support.strace import Injection

from faults.cases import Case, Doing
from faults.instance import Instance
from faults.traffic import HEALTH, HUNG, LOAD, OK, WRONG, Account, Traffic

# How long it may take, after a fault, until all is well: pauses, back-offs of workers, and rests.
RECOVERY_S: Final = 30.0


@dataclass
class Outcome:
    """What a fault has cost, and ``problems``: what it must not have cost."""

    case: Case
    injected: int = 0
    during: Account = field(default_factory=Account)
    recovered_s: float = 0.0
    deaths: int = 0
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


async def try_case(case: Case) -> Outcome:
    """Run it in an instance of its own."""
    outcome = Outcome(case)
    with tempfile.TemporaryDirectory() as name:
        it = Instance(Path(name))
        await it.start()
        try:
            await _try(case, it, outcome, Path(name, "strace"))
        finally:
            left = await it.stop()
        if left:
            outcome.problems.append(f"does not end: {left}")
        outcome.warnings = it.warnings()
        outcome.deaths = it.deaths()
        if not case.may_die:
            outcome.problems += it.bugs()[:3]
        allowed = int(case.doing is Doing.DEATH)
        if outcome.deaths > allowed and not case.may_die:
            outcome.problems.append(f"{outcome.deaths - allowed} workers died")
    return outcome


async def _try(case: Case, it: Instance, outcome: Outcome, trace: Path) -> None:
    traffic = Traffic(it.places)
    before = await _settled(it)
    await traffic.run(HEALTH)
    pids = it.workers if case.is_worker else [it.master]
    injection = Injection(pids, case.calls, case.error, case.when, trace, follows=case.is_worker)
    await asyncio.to_thread(injection.start)
    try:
        mix = LOAD if case.is_worker else HEALTH
        running = asyncio.create_task(traffic.run(mix))
        await it.act(case.doing)
        # What hangs only as long as the fault lasts is a pause.
        await asyncio.wait([running], timeout=8)
    finally:
        await asyncio.to_thread(injection.stop)
    outcome.injected = injection.count
    outcome.during = await running
    # What a worker had open when it was killed the kernel ends by FIN.
    kills = case.doing is Doing.DEATH or case.may_die
    never = (HUNG,) if kills else (WRONG, HUNG)
    if wrong := outcome.during.total(*never):
        outcome.problems.append(f"{wrong} conversations wrong or hung")
    await _recover(it, traffic, outcome)
    if case.doing is Doing.LOAD and not case.may_die:
        await _look_for_leaks(it, before, outcome)


async def _settled(it: Instance) -> dict[str, list[str]]:
    """What is open when nothing goes on; a message may still be under way just after the start."""
    before = it.held()
    while True:
        await asyncio.sleep(0.2)
        now = it.held()
        if now == before:
            return now
        before = now


async def _recover(it: Instance, traffic: Traffic, outcome: Outcome) -> None:
    """Until all conversations of a round succeed, twice."""
    began = time.monotonic()
    good = 0
    while good < 2:
        account = await traffic.run(HEALTH)
        good = good + 1 if account.total() == account.total(OK) else 0
        if time.monotonic() - began > RECOVERY_S:
            outcome.problems.append(f"not well after {RECOVERY_S:.0f} s: {account.text()}")
            return
    outcome.recovered_s = time.monotonic() - began
    if it.forwarder.process.poll() not in (None, 0):
        outcome.problems.append(f"the master has ended: {it.forwarder.process.poll()}")


async def _look_for_leaks(it: Instance, before: dict[str, list[str]], outcome: Outcome) -> None:
    """What is open goes back to what was; flows of UDP end after their timeout."""
    until = time.monotonic() + 15
    while (now := it.held()) != before:
        if time.monotonic() > until:
            for who in now.keys() | before.keys():
                old, new = before.get(who, []), now.get(who, [])
                if old != new:
                    more = [x for x in {*new, *old} if new.count(x) != old.count(x)]
                    counts = {x: new.count(x) - old.count(x) for x in more}
                    outcome.problems.append(f"descriptors of {who}: {counts}")
            return
        await asyncio.sleep(0.1)
