"""The process that looks names up for all workers, side by side. Keeps nothing and decides nothing.

Threads wait for the name servers; a system call that may take a minute cannot be cancelled, so the
process never waits for them and ends without them. It ends when the master has gone.
"""

from __future__ import annotations

import selectors
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from forwarder.ipc.channel import ChannelClosed
from forwarder.upstream.answers import Answer
from forwarder.upstream.lookup import Lookups, look_up, with_lifetime
from forwarder.upstream.messages import read_hosts, say_answers
from forwarder.upstream.schedule import LIMIT_S, Schedule
from forwarder.upstream.ttl import lifetimes

if TYPE_CHECKING:
    from collections.abc import Callable

    from forwarder.ipc.channel import Channel

# Messages of the master, each with names: look them up from now on, no longer, soon.
WANT, FORGET, HURRY = "want", "forget", "hurry"
# Our own message.
FOUND: Final = "found"
# Interval between our signs of life.
BEAT_S: Final = 1.0
# When no thread can be started: the pause before the next attempt.
NO_THREAD_S: Final = 1.0


class NamesProcess:
    """The main thread: hears the master, hands out work, sends the answers."""

    def __init__(
        self,
        channel: Channel,
        beat: Callable[[float], None],
        look: Callable[[str], Answer] | None = None,
    ) -> None:
        """``channel`` leads to the master; ``beat`` gives it a sign of life; ``look`` looks up."""
        self._channel = channel
        self._beat = beat
        self._schedule = Schedule()
        self._lookups = Lookups(look or with_lifetime(look_up, lifetimes()))
        self._answers: dict[str, Answer] = {}  # not sent yet
        self._no_thread_until = 0.0

    def run(self) -> None:
        """Look names up until the master has gone."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._channel, selectors.EVENT_READ)
            selector.register(self._lookups, selectors.EVENT_READ)
            with suppress(ChannelClosed):
                while True:
                    now = time.monotonic()
                    self._beat(now)
                    self._turn(now)
                    # What the master does not take yet is sent a beat later.
                    due_at = max(self._schedule.deadline(), self._no_thread_until)
                    selector.select(max(min(BEAT_S, due_at - now), 0.01))
            selector.unregister(self._lookups)
        self._lookups.close()

    def _turn(self, now: float) -> None:
        self._hear(now)
        for host, answer in self._lookups.take():
            is_wanted = self._schedule.done(
                host, now, has_failed=bool(answer.why), good_for_s=answer.good_for_s
            )
            if is_wanted:
                self._answers[host] = replace(answer, since=now)
        for host in self._schedule.overdue(now):
            why = f"no answer within {LIMIT_S:.0f} s"
            self._answers.setdefault(host, Answer((), why, since=now))
        self._begin_due(now)
        self._channel.flush()
        if self._answers and not self._channel.has_outbox:
            for message in say_answers(FOUND, self._answers):
                self._channel.send(message)
            self._answers.clear()

    def _hear(self, now: float) -> None:
        actions: dict[object, Callable[[str], None]] = {
            WANT: lambda host: self._schedule.want(host, now),
            FORGET: self._schedule.forget,
            HURRY: lambda host: self._schedule.hurry(host, now),
        }
        for received in self._channel.receive():
            for host in read_hosts(received.message):
                actions[received.message["op"]](host)

    def _begin_due(self, now: float) -> None:
        if now < self._no_thread_until:
            return
        while self._lookups.have(self._schedule.running + 1) or self._schedule.running == 0:
            host = self._schedule.take(now)
            if host is None:
                return
            self._lookups.begin(host)
        self._no_thread_until = now + NO_THREAD_S
