"""The master's handle on one worker: its process, its channel, and what it has acknowledged.

Forks and signals; decides nothing.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

from forwarder.ipc.channel import Channel, channel_pair
from forwarder.supervision.policy import LONGEST_DELAY_S, Backoff
from forwarder.system.backoff import backoff

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Iterable, Mapping

    from forwarder.ipc.channel import Message
    from forwarder.limits.gate import Holdings
    from forwarder.stats.board import Board
    from forwarder.supervision.keeper import Deposit
    from forwarder.upstream.failing import Failing


# Delay before an assignment is sent again, after the worker or we ran out of descriptors. After a
# bug in serving it the delay doubles each time.
RETRY_S: Final = 1.0


class WorkerState(Enum):
    """STARTING until the first assignment is acknowledged; the last three until it is gone."""

    STARTING = "starting"
    READY = "ready"
    HUNG = "hung"
    DRAINING = "draining"
    STOPPING = "stopping"


@dataclass(frozen=True, slots=True)
class WorkerTables:
    """Memory that a worker shares with its master: what it counts, holds, and has deposited."""

    board: Board
    holdings: Holdings
    deposit: Deposit


class WorkerProcess:
    """A forked worker. Owns the master's end of the channel; the master reaps the process."""

    def __init__(
        self, slot: int, pid: int, tables: WorkerTables, channel: Channel, now: float
    ) -> None:
        self.slot = slot
        self.pid = pid
        self.tables = tables
        self.channel = channel
        self.started_at = now
        self.state = WorkerState.STARTING
        self.is_leaving = False  # it was asked to, or does so: its end is no death
        self.cell = 0  # of the heartbeats
        self.sent_serial = 0
        self.applied_serial = 0
        self.logs_revision = 0  # Fleet's: which places of the connection log it knows
        self.names_revision = 0  # Fleet's: which answers about names it knows
        self.generation = 0  # of what it has applied
        self.known_sockets: set[int] = set()  # that it owns, whether it accepts on them or not
        self.serves: set[int] = set()  # the sockets on which it reports that it accepts
        self.refusal = ""  # why it did not put its last assignment in force
        self.refusals = 0  # how often in a row
        self.retry_at = 0.0  # when the assignment it refused is sent again
        self.cut_off_at = 0.0  # since when it has no channel; if it lives, it has no master
        self.deaf_until = 0.0  # Fleet's: when sending to it again makes sense
        self.told: tuple[int, int, tuple[int, ...]] | None = None  # Fleet's: its last assignment
        self.failing: list[Failing] = []  # addresses of upstreams, by its last report

    def on_applied(self, message: Message, now: float) -> None:
        """Take in an acknowledgement; what did not arrive or was refused is sent again later.

        Raises KeyError for nonsense.
        """
        serial, missing, refusal = message["serial"], message["missing"], message["refusal"]
        self.applied_serial = serial if isinstance(serial, int) else 0
        if not serial or missing:
            self.told = None  # again, when there may be descriptors
            self.known_sockets.difference_update(missing if isinstance(missing, list) else ())
            self.deaf_until = now + RETRY_S
        if self.applied_serial != self.sent_serial:
            return
        self.refusal = str(refusal)
        if self.refusal:
            self.refusals += 1
            self.retry_at = now + backoff(self.refusals, RETRY_S, LONGEST_DELAY_S)
        else:
            self.refusals = 0
            self.serves = self.known_sockets

    def must_be_told(self, wanted: tuple[int, int, tuple[int, ...]], now: float) -> bool:
        """Whether ``wanted`` has to be sent to it, now or once more."""
        is_refused = bool(self.refusal) and self.applied_serial == self.sent_serial
        is_over = is_refused and now >= self.retry_at  # while it is at it, its answer is due
        return (self.told != wanted or is_over) and now >= self.deaf_until

    def describe(self, now: float) -> dict[str, object]:
        """The worker, as in the status."""
        return {
            "slot": self.slot,
            "pid": self.pid,
            "state": self.state.value,
            "generation": self.generation,
            "refusal": self.refusal,
            "uptime_s": round(now - self.started_at, 1),
        }

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; a process that has gone just now is no error."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)


def describe_unserved(
    rules: Iterable[dict[str, object]],
    sockets: Mapping[str, Iterable[int]],
    processes: Iterable[WorkerProcess],
) -> list[dict[str, object]]:
    """Rules as in the status, each with how many of its sockets none of the workers accepts on."""
    served = set().union(*(process.serves for process in processes if not process.is_leaving))
    return [
        {**rule, "unserved": sum(i not in served for i in sockets.get(str(rule["name"]), ()))}
        for rule in rules
    ]


class Slot:
    """A stable place for a worker: index, back-off, and the process that fills it, if any."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.backoff = Backoff()
        self.process: WorkerProcess | None = None


def fork_worker(
    slot: int, tables: WorkerTables, now: float, child: Callable[[Channel], None]
) -> WorkerProcess:
    """Fork; ``child`` runs the worker in the new process and must not return.

    It inherits all descriptors.

    Raises OSError (EAGAIN, ENOMEM) with nothing left behind.
    """
    ours, theirs = channel_pair()
    try:
        pid = os.fork()
    except OSError:
        ours.close()
        theirs.close()
        raise
    if pid == 0:
        try:
            child(theirs)
        finally:
            os._exit(70)
    theirs.close()
    return WorkerProcess(slot, pid, tables, ours, now)
