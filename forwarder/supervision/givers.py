"""Who sessions are taken from, as ``Moves`` sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forwarder.ipc.channel import Message


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
