"""Measuring peers in turn: rounds are interleaved, so that a busy minute hits all alike."""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.calls import count_calls
from bench.loads import Figures, Outcome, Target, holding
from bench.peers import (
    HELD_PORT,
    HELD_UPSTREAM_PORT,
    HOST,
    LISTEN_PORT,
    UPSTREAM_PORT,
    Peer,
    require_programs,
)
from bench.procs import BenchError, compiled, require_free, running, usage, wait_ready

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from bench.measures import Measure
    from bench.procs import Usage
    from bench.report import Results

PORTS = (LISTEN_PORT, UPSTREAM_PORT, HELD_PORT, HELD_UPSTREAM_PORT)
# The number of the pass that counts system calls, whose other figures are not kept.
CALLS_ROUND = -1


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a run: every measure for every peer, ``rounds`` times, ``seconds`` per load."""

    title: str
    measures: tuple[Measure, ...]
    peers: tuple[Peer, ...]
    rounds: int
    seconds: int

    def check_programs(self) -> None:
        """Raise BenchError when something that is needed is not installed."""
        require_programs(self._tools | {peer.program for peer in self.peers if peer.program})

    def compile(self, directory: Path) -> None:
        """Compile our own loads and upstreams, if this part has a use for them."""
        if "gcc" in self._tools:
            for tool in ("rr", "echo", "udp_flows"):
                compiled(directory, tool)

    @property
    def _tools(self) -> set[str]:
        return {tool for measure in self.measures for tool in measure.needs}


def fits(measure: Measure, peer: Peer) -> bool:
    """Whether a peer can be measured so at all."""
    if peer.command is None and measure.needs_peer:
        return False
    if measure.is_udp and not peer.has_udp:
        return False
    return max(measure.held, measure.sessions) <= peer.max_sessions


def run_rounds(part: Part, directory: Path, results: Results, failures: list[str]) -> None:
    """Run every round; each starts with another peer, so that none always goes first.

    What goes wrong with one peer is noted, and the others go on. Raises BenchError when a port is
    taken: then no figure can be trusted.
    """
    for number in range(part.rounds):
        turn = number % len(part.peers)
        order = part.peers[turn:] + part.peers[:turn]
        for measure in part.measures:
            for peer in order:
                if fits(measure, peer):
                    say(f"round {number + 1}: {measure.name} {peer.name}")
                    with _noted(failures):
                        figures = run_once(measure, peer, part.seconds, directory)
                        results.add(measure.name, peer.name, number, figures)


def run_calls(part: Part, directory: Path, results: Results, failures: list[str]) -> None:
    """Count system calls once for every measure and peer, while the load runs for a second."""
    for measure in part.measures:
        for peer in part.peers:
            if measure.unit and peer.command and not peer.forks and fits(measure, peer):
                say(f"system calls: {measure.name} {peer.name}")
                with _noted(failures):
                    figures = run_once(measure, peer, 1, directory, counts_calls=True)
                    results.add(measure.name, peer.name, CALLS_ROUND, figures)


class RunError(BenchError):
    """One run has failed; nothing is left of it, so that the next can be trusted."""


@contextmanager
def _noted(failures: list[str]) -> Iterator[None]:
    try:
        yield
    except RunError as err:
        say(f"bench: {err}")
        failures.append(str(err))


def say(what: str) -> None:
    """Tell how far we are."""
    print(what, file=sys.stderr)


def run_once(
    measure: Measure, peer: Peer, seconds: int, directory: Path, *, counts_calls: bool = False
) -> Figures:
    """Start upstream and peer, load them, end them; the ports are free before and after."""
    require_free(PORTS)
    try:
        with ExitStack() as stack:
            target = start(stack, measure, peer, seconds, directory)
            figures = load(measure, peer, target, counts_calls=counts_calls)
    except BenchError as err:
        require_free(PORTS)
        raise RunError(f"{measure.name} {peer.name}: {err}") from err
    require_free(PORTS)
    return figures


def start(stack: ExitStack, measure: Measure, peer: Peer, seconds: int, directory: Path) -> Target:
    """Start what is measured, until it is at rest; ``stack`` ends it."""
    if measure.upstream is not None:
        command = measure.upstream(directory)
        upstream = stack.enter_context(running("upstream", command, directory))
        wait_ready(upstream, UPSTREAM_PORT)
    if measure.held:
        command = [str(directory / "echo"), HOST, str(HELD_UPSTREAM_PORT)]
        upstream = stack.enter_context(running("held-upstream", command, directory))
        wait_ready(upstream, HELD_UPSTREAM_PORT)
    port, held_port, pid = UPSTREAM_PORT, HELD_UPSTREAM_PORT, None
    if peer.command is not None:
        child = stack.enter_context(running(peer.name, peer.command(directory), directory))
        wait_ready(child, LISTEN_PORT)
        port, held_port, pid = LISTEN_PORT, HELD_PORT, child.pid
    stack.enter_context(holding(measure.held, held_port))
    return Target(port, pid, seconds, directory)


def load(measure: Measure, peer: Peer, target: Target, *, counts_calls: bool) -> Figures:
    """Load a peer that is at rest: what the load has found, and what each unit has cost."""
    pid, unit = target.peer_pid, measure.unit
    if pid is None or unit is None or peer.forks:
        return measure.load(target).figures
    if counts_calls:
        calls = count_calls(pid, target.directory, lambda: measure.load(target).units)
        return {"calls": calls}
    before = usage(pid)
    outcome = measure.load(target)
    return {**outcome.figures, **per_unit(before, usage(pid), outcome, unit.cpu_ns)}


def per_unit(before: Usage, after: Usage, outcome: Outcome, cpu_scale_ns: float) -> Figures:
    """What each unit of work has cost."""
    return {
        "cpu": (after.cpu_ns - before.cpu_ns) / cpu_scale_ns / outcome.units,
        "switches": (after.switches - before.switches) / outcome.units,
    }
