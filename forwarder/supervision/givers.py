"""Who sessions are taken from, and who can take them, as ``Moves`` sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from forwarder.ipc.channel import Message, Received
    from forwarder.ipc.consignment import Consignment
    from forwarder.supervision.move_plan import Taker


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

    def settle(self, number: int, refused: Sequence[int] = ()) -> None:
        """A consignment is taken, but for those with these indices, which go on where they were."""


class Departed:
    """A process that has died; others have kept its sessions."""

    pid = 0
    is_foreign = False
    is_gone = is_dead = True

    def __init__(self, name: str) -> None:
        self.name = name

    def sessions(self) -> int:
        """It has none left."""
        return 0

    def ask(self, number: int, limit: int, choice: Message | None) -> None:
        """Nobody is there."""

    def settle(self, number: int, refused: Sequence[int] = ()) -> None:
        """Nobody is there."""


class OnTheirWay(Protocol):
    """All sessions on their way, as the workers' side has to know of them: ``Moves``."""

    @property
    def is_busy(self) -> bool:
        """Whether sessions are, or may be, on their way."""

    @property
    def is_adopting(self) -> bool:
        """Whether sessions of a process that has died are on their way."""

    def afloat(self) -> dict[str, int]:
        """How many sessions of each rule are on their way, and with no worker."""

    def adopt(self, name: str, consignments: Iterable[Consignment]) -> None:
        """Find workers for the sessions of a process that has died."""

    def on_message(self, pid: int, received: Received) -> None:
        """PARCELS or TAKEN of a worker."""


class Workforce(Protocol):
    """The workers, as far as sessions are moved between them: see ``Fleet``."""

    def takers(self, now: float) -> list[Taker]:
        """Those that can take sessions now."""

    def reachable(self) -> list[Taker]:
        """All that can be told something, those that leave as well."""

    def is_alive(self, pid: int) -> bool:
        """Whether one has not been reaped."""

    def leaving(self) -> list[Giver]:
        """Those that leave when their sessions have ended, or go on elsewhere."""

    def serving(self) -> list[Giver]:
        """Those that stay."""

    def carry(self, pid: int, consignment: Consignment) -> None:
        """Send a consignment to one of them, if it can be told."""

    def holds_back(self, pid: int) -> bool:
        """Whether something waits to be sent to one of them."""

    def lose(self, rule: str, sessions: int) -> None:
        """Count sessions of a rule that nobody goes on with."""

    def report_to(self, moves: OnTheirWay) -> None:
        """Tell it what workers say of sessions; and ask it how many are on their way."""

    @property
    def must_recount(self) -> bool:
        """Whether it has to be counted who holds what, for which nothing may be on its way."""
