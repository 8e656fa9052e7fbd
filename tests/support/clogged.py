"""An upstream that does not answer until told to: its accept queue is full."""

from __future__ import annotations

import contextlib
import selectors
import socket
from typing import TYPE_CHECKING

from support.ends import accept, listen

if TYPE_CHECKING:
    from types import TracebackType


class CloggedUpstream:
    """A listener whose kernel drops every SYN until :meth:`open`."""

    def __init__(self) -> None:
        self.listener = listen(backlog=0)
        self._fillers: list[socket.socket] = []
        while self._is_next_connect_answered():
            pass

    def _is_next_connect_answered(self) -> bool:
        filler = socket.socket()
        filler.setblocking(False)
        filler.connect_ex(self.listener.getsockname())
        with selectors.DefaultSelector() as selector:
            selector.register(filler, selectors.EVENT_WRITE)
            is_answered = bool(selector.select(0.2))
        if is_answered:
            self._fillers.append(filler)
        else:
            filler.close()
        return is_answered

    def open(self) -> None:
        """Empty the queue: the next SYN, a retransmission after a second perhaps, is answered."""
        for _ in range(len(self._fillers)):
            accept(self.listener).close()

    def close(self) -> None:
        """Close everything."""
        for filler in self._fillers:
            filler.close()
        self.listener.close()

    def __enter__(self) -> CloggedUpstream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):
            self.close()
