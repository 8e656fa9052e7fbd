"""The checker: one loop that hears the master, looks names up, and checks servers.

Keeps nothing that the next one could not find in the table or be told again. Ends when the master
has gone.
"""

from __future__ import annotations

import logging
import math
import random
import select
from typing import TYPE_CHECKING, Final

from forwarder.checker.boards import Boards
from forwarder.checker.checks import KINDS, Checks, Needs
from forwarder.checker.loop import Loop
from forwarder.checker.messages import BOARD, CHECKS, GONE, KNOWN, read_checks, say_news
from forwarder.checker.passive import LOOKS_PER_S
from forwarder.ipc.channel import ChannelClosed
from forwarder.stats.board import Board
from forwarder.upstream.asking import Asking

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from forwarder.balancing.table import ServerTable
    from forwarder.checker.loop import Timer
    from forwarder.checker.outcome import Begin
    from forwarder.config.model import CheckKind
    from forwarder.ipc.channel import Channel, Received
    from forwarder.upstream.answers import Answer

log = logging.getLogger(__name__)

# Interval between our signs of life.
BEAT_S: Final = 1.0
# Look-ups that are due within this time are begun together.
GRAIN_S: Final = 0.01


class CheckerProcess:
    """The checker. Owns what it opens, and not the channel."""

    def __init__(
        self,
        channel: Channel,
        beat: Callable[[float], None],
        table: ServerTable,
        look: Callable[[str], Answer] | None = None,
        kinds: Mapping[CheckKind, Begin] = KINDS,
    ) -> None:
        """``channel`` leads to the master; ``beat`` gives it a sign of life, ``look`` looks a
        name up, and ``kinds`` check. Raises OSError.
        """
        self._channel = channel
        self._beat = beat
        self._loop = Loop()
        self._asking = Asking(look)
        needs = Needs(
            loop=self._loop,
            table=table,
            answer=self._asking.answer,
            draw=random.random,
            kinds=kinds,
        )
        self._checks = Checks(needs)
        self._boards = Boards(self._checks)
        self._known = 0  # serial of the CHECKS that the master does not know we know; 0: none
        self._is_over = False
        self._is_looking = False
        self._ask_timer: Timer | None = None

    def run(self) -> None:
        """Do all of it until the master has gone."""
        loop, checks = self._loop, self._checks
        loop.watch(self._channel.fileno(), select.EPOLLIN, self._hear)
        loop.watch(self._asking.fileno(), select.EPOLLIN, self._on_found)
        self._on_beat()
        turn_at = 0.0
        while not self._is_over:
            now = loop.now
            if now >= turn_at:
                checks.turn()
                turn_at = now + checks.grain_s
            self._send()
            loop.turn(min(BEAT_S, max(checks.deadline(), turn_at) - now))
        self._close()

    def _close(self) -> None:
        self._checks.close()
        self._loop.unwatch(self._channel.fileno())
        self._loop.unwatch(self._asking.fileno())
        self._asking.close()
        self._loop.close()

    # -- what wakes us

    def _on_beat(self) -> None:
        self._beat(self._loop.now)
        self._checks.beat()
        self._loop.call_at(self._loop.now + BEAT_S, self._on_beat)

    def _on_found(self, events: int) -> None:
        del events
        self._ask()

    def _ask(self) -> None:
        """Begin the look-ups that are due, and come again when others are."""
        now = self._loop.now
        self._asking.turn(now)
        if self._ask_timer is not None:
            self._ask_timer.cancel()
            self._ask_timer = None
        due_at = self._asking.deadline()
        if due_at < math.inf:
            self._ask_timer = self._loop.call_at(max(due_at, now + GRAIN_S), self._ask)

    def _look(self) -> None:
        """Look for failed connects, as long as there are servers for whom they matter."""
        self._is_looking = any(True for _ in self._checks.watched())
        if self._is_looking:
            self._boards.look()
            self._loop.call_at(self._loop.now + 1 / LOOKS_PER_S, self._look)

    def _hear(self, events: int) -> None:
        """Read messages of the master."""
        del events
        try:
            messages = self._channel.receive()
        except ChannelClosed:
            self._is_over = True
            return
        for received in messages:
            try:
                self._heed(received)
            finally:
                received.close()

    def _heed(self, received: Received) -> None:
        message = received.message
        if received.is_truncated:
            log.error("checker: no descriptor is left for what the master sends; starting over")
            self._is_over = True
        elif message["op"] == CHECKS:
            self._checks.use(read_checks(received))
            self._boards.on_other_servers()
            self._known = int(str(message["serial"]))
            if not self._is_looking:
                self._look()
        elif message["op"] == BOARD:
            self._boards.add(int(str(message["pid"])), Board.read_only(received.fds.pop()))
        elif message["op"] == GONE:
            self._boards.remove(int(str(message["pid"])))
        else:
            self._asking.hear(message, self._loop.now)
            self._ask()

    # -- what the master hears

    def _send(self) -> None:
        """Send what is new; what the master does not take yet waits for a beat."""
        try:
            self._channel.flush()
            if self._channel.has_outbox:
                return
            for message in self._asking.take_answers():
                self._channel.send(message)
            if self._known:
                self._channel.send({"op": KNOWN, "serial": self._known})
                self._known = 0
            news = self._checks.news
            if news:
                for message in say_news(news):
                    self._channel.send(message)
                news.clear()
        except ChannelClosed:
            self._is_over = True
