"""Closes a socket whose setup fails."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from socket import SocketType
    from types import TracebackType


class ClosedOnFailure:
    """Closes a socket if what is done to it fails. Otherwise it stays its owner's.

    A class, as it is made for each flow: a generator takes several times as long.
    """

    __slots__ = ("_sock",)

    def __init__(self, sock: SocketType) -> None:
        self._sock = sock

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._sock.close()
