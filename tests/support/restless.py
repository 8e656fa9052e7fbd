"""An operator who never leaves a running forwarder alone."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from support.control import ask
from support.waiting import PATIENCE_S

if TYPE_CHECKING:
    from types import TracebackType

    from support.dialogue_routes import Site


class Restless:
    """Does one thing after the other to a forwarder, in a thread, as long as it is entered.

    ``refused`` are the answers that were no success; ``done`` counts the others.
    """

    def __init__(self, site: Site, *acts: str) -> None:
        """``acts``: ``reload``, ``more`` and ``fewer`` (workers), ``upgrade``."""
        self._site = site
        self._acts = acts
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.refused: list[object] = []
        self.done = 0

    def __enter__(self) -> Restless:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_over.set()
        self._thread.join(2 * PATIENCE_S)

    def _run(self) -> None:
        turn = 0
        while not self._is_over.wait(0.05):
            turn += 1
            for act in self._acts:
                answer = self._act(act, turn)
                if answer.get("ok"):
                    self.done += 1
                else:
                    self.refused.append((act, answer))

    def _act(self, act: str, turn: int) -> dict[str, object]:
        control = self._site.control
        if act == "reload":
            self._site.write(turn)
            return ask(control, "reload")
        if act == "upgrade":
            return ask(control, "upgrade")
        return ask(control, "workers", count="+1" if act == "more" else "-1")
