"""The workers of ours as ``Moves`` sees them: who gives sessions up, who can take some."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final

from forwarder.ipc import consignment
from forwarder.ipc.channel import ChannelClosed
from forwarder.ipc.heartbeat import BEAT_S
from forwarder.supervision.move_plan import Taker
from forwarder.supervision.slot import WorkerState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forwarder.ipc.channel import Message
    from forwarder.ipc.consignment import Consignment
    from forwarder.supervision.fleet import Fleet
    from forwarder.supervision.givers import Giver, OnTheirWay
    from forwarder.supervision.slot import WorkerProcess

# A worker that has given no sign of life for so long gets no sessions: it may be stopped.
_QUIET_S: Final = 2.5 * BEAT_S


class WorkerGiver:
    """A worker of ours: one that leaves, or one that an operator moves sessions from."""

    is_foreign = False

    def __init__(self, process: WorkerProcess, fleet: Fleet) -> None:
        self.pid = process.pid
        self.name = f"worker slot={process.slot} pid={process.pid}"
        self._process = process
        self._fleet = fleet

    @property
    def is_gone(self) -> bool:
        """Whether its channel has ended."""
        return self._process.channel.fileno() < 0

    @property
    def is_dead(self) -> bool:
        """Whether it was reaped."""
        return self._process not in self._fleet.processes()

    def sessions(self) -> int:
        """How many it has."""
        return self._fleet.ledger.sessions(self._process.tables.board)

    def ask(self, number: int, limit: int, choice: Message | None) -> None:
        """Send MOVE."""
        with suppress(ChannelClosed):  # it has died; SIGCHLD follows
            consignment.ask(self._process.channel, number, limit, choice or {})
            self._fleet.telling.watch(self._process)

    def settle(self, number: int, refused: Sequence[int] = ()) -> None:
        """Send MOVED."""
        with suppress(ChannelClosed):  # as above
            consignment.confirm(self._process.channel, number, refused=refused)
            self._fleet.telling.watch(self._process)


class Workers:
    """The workers of ours, see ``givers.Workforce``."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def report_to(self, moves: OnTheirWay) -> None:
        """What the fleet and its ledger have to know of it."""
        self._fleet.is_amid_moves = lambda: moves.is_busy
        self._fleet.is_adopting = lambda: moves.is_adopting
        self._fleet.adopt = moves.adopt
        self._fleet.on_moving = moves.on_message
        self._fleet.ledger.afloat = moves.afloat

    def lose(self, rule: str, sessions: int) -> None:
        """Count them as those of a killed worker."""
        self._fleet.ledger.lose(rule, sessions)

    @property
    def must_recount(self) -> bool:
        """Whether the fleet waits until nothing is on its way."""
        return self._fleet.must_recount

    def takers(self, now: float) -> list[Taker]:
        """Those that serve, take what they are sent, and seem well."""
        return [
            self._taker(process)
            for process in self._fleet.serving_processes()
            if process.state is WorkerState.READY
            and now - self._fleet.last_beat(process) < _QUIET_S
            and self._may_be_told(process)
        ]

    def reachable(self) -> list[Taker]:
        """All whose channel has not ended."""
        return [self._taker(it) for it in self._fleet.processes() if self._may_be_told(it)]

    def is_alive(self, pid: int) -> bool:
        """Whether it has not been reaped."""
        return self._find(pid) is not None

    def leaving(self) -> list[Giver]:
        """Those that drain, though the instance does not."""
        return [
            WorkerGiver(process, self._fleet)
            for process in self._fleet.retiring_processes()
            if process.state is WorkerState.DRAINING
        ]

    def serving(self) -> list[Giver]:
        """Those in slots."""
        return [
            WorkerGiver(process, self._fleet)
            for process in self._fleet.serving_processes()
            if process.state is WorkerState.READY
        ]

    def carry(self, pid: int, consignment: Consignment) -> None:
        """Send PARCELS."""
        process = self._find(pid)
        if process is not None:
            with suppress(ChannelClosed):  # it has died; SIGCHLD follows
                consignment.send(process.channel)
                self._fleet.telling.watch(process)

    def holds_back(self, pid: int) -> bool:
        """Whether its channel is full."""
        process = self._find(pid)
        return process is not None and process.channel.has_outbox

    def _find(self, pid: int) -> WorkerProcess | None:
        return next((it for it in self._fleet.processes() if it.pid == pid), None)

    def _taker(self, process: WorkerProcess) -> Taker:
        sessions = self._fleet.ledger.recent_sessions(process.tables.board)
        return Taker(process.pid, process.slot, sessions)

    def _may_be_told(self, process: WorkerProcess) -> bool:
        return process.channel.fileno() >= 0 and not process.channel.has_outbox
