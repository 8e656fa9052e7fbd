"""Who sessions are taken from: what ``Moves`` asks of each, and how a worker of ours does it."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from forwarder.ipc import consignment
from forwarder.ipc.channel import ChannelClosed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forwarder.ipc.channel import Message
    from forwarder.supervision.fleet import Fleet
    from forwarder.supervision.slot import WorkerProcess


class Giver(Protocol):
    """A process that gives sessions up, when it is asked. It answers by PARCELS.

    None of its methods blocks or raises: one that cannot be told anything any more is gone.
    """

    @property
    def pid(self) -> int:
        """The process from whom PARCELS come, see ``Moves.on_message``."""

    @property
    def name(self) -> str:
        """What to call it in the log."""

    @property
    def is_foreign(self) -> bool:
        """Whether its sessions are another instance's, counted there until they are ours."""

    @property
    def is_gone(self) -> bool:
        """Whether it cannot be told anything any more."""

    @property
    def is_dead(self) -> bool:
        """Whether its process has ended, for sure: then it has claimed nothing."""

    def sessions(self) -> int:
        """About how many it has."""

    def ask(self, number: int, limit: int, choice: Message | None) -> None:
        """Ask for up to ``limit`` sessions, perhaps only those that meet a choice."""

    def settle(self, number: int, *, is_back: bool = False, refused: Sequence[int] = ()) -> None:
        """A consignment is taken; ``is_back``: it is not, and is to go on where it was.

        ``refused``: so are these of it.
        """


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

    def settle(self, number: int, *, is_back: bool = False, refused: Sequence[int] = ()) -> None:
        """Send MOVED."""
        with suppress(ChannelClosed):  # as above
            consignment.confirm(self._process.channel, number, is_back=is_back, refused=refused)
            self._fleet.telling.watch(self._process)
