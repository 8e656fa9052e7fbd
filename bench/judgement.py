"""What bounds a program, from what was seen of it, by thresholds that it tells. Pure.

The thresholds are conventions, not laws: they say where to look first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from bench.stacks import COPYING, IN_KERNEL, INTERPRETER, LOOPBACK, WAKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

KERNEL_SHARE: Final = 0.6  # of samples: above it, work in the program itself is not worth much
COPY_SHARE: Final = 0.25  # of samples
WAKE_SHARE: Final = 0.2  # of samples
INTERPRETER_SHARE: Final = 0.4  # of samples
# Context switches for each unit of work from which on each small piece of it has its own: a MB is
# 16 pieces of 64 KiB, the largest that is read or spliced at once where nothing was tuned.
SWITCHES: Final = {"MB": 8.0, "request": 0.8, "connection": 2.0, "datagram": 0.8}
THREAD_BUSY: Final = 0.9  # of a CPU
THREAD_IDLE: Final = 0.5  # of a CPU, the busiest of the others
MACHINE_BUSY: Final = 0.95  # of all CPUs


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What was seen of a program under a load.

    ``threads`` are their shares of a CPU, by name; ``machine`` the share of all CPUs that was not
    idle; ``kinds`` the shares of samples by :mod:`bench.stacks`, empty if there are none.
    """

    unit: str
    switches: float | None
    threads: Sequence[tuple[str, float]]
    machine: float
    kinds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finding:
    """Whether the program is bound so, and a sentence with figure and threshold."""

    name: str
    holds: bool
    sentence: str

    @property
    def answer(self) -> str:
        """Yes or no, and why."""
        return f"{'yes' if self.holds else 'no'}. {self.sentence}"


def judge(seen: Seen) -> list[Finding]:
    """Every finding that can be made from what there is."""
    found = []
    if seen.kinds:
        found.append(_syscalls_and_copies(seen.kinds))
    if seen.kinds or seen.switches is not None:
        found.append(_wake_ups(seen))
    if seen.kinds:
        found.append(_interpreter(seen.kinds))
    if seen.threads:
        found.append(_single_thread(seen))
    return found


def _syscalls_and_copies(kinds: Mapping[str, float]) -> Finding:
    kernel, copying = sum(kinds[kind] for kind in IN_KERNEL), kinds[COPYING]
    sentence = (
        f"{kernel:.0%} of its samples are in the kernel (syscall bound from "
        f"{KERNEL_SHARE:.0%} on), {copying:.0%} copy (copy bound from {COPY_SHARE:.0%} on), "
        f"{kinds[LOOPBACK]:.0%} deliver on the loopback, which interrupts of a network card would "
        "do elsewhere."
    )
    return Finding(
        "syscall or copy bound", kernel >= KERNEL_SHARE or copying >= COPY_SHARE, sentence
    )


def _wake_ups(seen: Seen) -> Finding:
    holds, parts = False, []
    limit = SWITCHES[seen.unit]
    if seen.switches is not None:
        holds = seen.switches >= limit
        parts.append(
            f"{seen.switches:.2f} context switches for each {seen.unit} (bound from {limit:g} on)"
        )
    if seen.kinds:
        holds = holds or seen.kinds[WAKING] >= WAKE_SHARE
        parts.append(
            f"{seen.kinds[WAKING]:.0%} of its samples wait or wake (bound from {WAKE_SHARE:.0%} on)"
        )
    return Finding("wake-up bound", holds, f"{', '.join(parts)}.")


def _interpreter(kinds: Mapping[str, float]) -> Finding:
    share = kinds[INTERPRETER]
    return Finding(
        "interpreter bound",
        share >= INTERPRETER_SHARE,
        f"{share:.0%} of its samples are in the Python interpreter "
        f"(bound from {INTERPRETER_SHARE:.0%} on).",
    )


def _single_thread(seen: Seen) -> Finding:
    (name, busiest), *others = sorted(seen.threads, key=lambda thread: -thread[1])
    next_one = others[0][1] if others else 0.0
    holds = busiest >= THREAD_BUSY and next_one <= THREAD_IDLE
    if others:
        second = f"the next one {next_one:.0%} (limited from {THREAD_BUSY:.0%} on, with the next "
        second += f"at {THREAD_IDLE:.0%} or below)"
    else:
        second = f"and there is no other (limited from {THREAD_BUSY:.0%} on)"
    sentence = f"{name} has used {busiest:.0%} of a CPU, {second}."
    if seen.machine >= MACHINE_BUSY:
        sentence += (
            f" The machine was {seen.machine:.0%} busy: client, upstream and this program share "
            "its CPUs, and no thread could have had more."
        )
    return Finding("single-thread limited", holds, sentence)
